"""setup.py on a project whose kernels are stubs: what is built, what is left out, and what is said about it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import bssn_fast

ROOT = Path(__file__).resolve().parents[1]

STUB_BINDINGS = """
#include <Python.h>
#ifdef BSSN_WITH_CUDA
#error "compiled with CUDA"
#endif
int portable();
#ifdef BSSN_ISA_LIST_X86
int avx2();
int avx512();
static int widest() { return avx512() > avx2() && avx2() > portable() ? avx512() : -1; }
#else
static int widest() { return portable(); }
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "widest", widest());
  return m;
}
"""
STUB_KERNELS = """
#include "width.h"
int BSSN_ISA() { return WIDTH; }
"""
STUB_WIDTH = """
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define WIDTH 64
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
"""
FAILING_NVCC = """#!/bin/sh
case "$*" in
  *--dryrun*) printf '#$ INCLUDES="-I/none"\\n#$ LIBRARIES= "-L/none"\\n' >&2 ;;
  *--list-gpu-arch*) printf 'compute_75\\ncompute_90\\n' ;;
  *) echo "unsupported GNU version" >&2; exit 1 ;;
esac
"""


class Project:
    """A copy of this project with stub kernels, and ways to build it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md"):
            shutil.copy(ROOT / name, root)
        shutil.copytree(ROOT / "docs", root / "docs")
        built = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
        shutil.copytree(ROOT / "bssn_fast", root / "bssn_fast", ignore=built)
        self.write("csrc/bindings.cpp", STUB_BINDINGS)
        self.write("csrc/cpu/kernels.cpp", STUB_KERNELS)
        self.write("csrc/cpu/width.h", STUB_WIDTH)

    def write(self, path: str, text: str) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BSSN_FAST", "CUDA_", "CXX", "LD"))}
        return subprocess.run(
            [sys.executable, *command], cwd=self.root, env=inherited | environment, capture_output=True, text=True
        )

    def build(self, **environment: str) -> str:
        """Build into build/lib and return what was printed."""
        done = self.run("setup.py", "-q", "build", "--build-lib", "build/lib", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def modules(self) -> list[Path]:
        return list((self.root / "build/lib/bssn_fast").glob("_C*"))

    def widest(self) -> int:
        """Import the built module, without torch, and return the width that its widest kernel reports."""
        (module,) = self.modules()
        return int(load_alone(module, "print(module.widest)"))

    def build_info(self) -> tuple[str, dict[str, str]]:
        names: dict[str, object] = {}
        exec((self.root / "build/lib/bssn_fast/_build_info.py").read_text(), names)
        return names["SUMMARY"], names["NOT_BUILT"]


def load_alone(module: Path, statement: str) -> str:
    """Run a statement on an extension module in an interpreter that sees no installed packages."""
    code = (
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('bssn_fast._C', {str(module)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"{statement}\n"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def summaries(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("bssn_fast: ")]


def test_builds_every_instruction_set_and_says_so_in_one_line(project: Project) -> None:
    is_x86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
    (line,) = summaries(project.build())
    assert ("built for cpu: portable, avx2, avx512;" if is_x86 else "built for cpu: portable;") in line
    assert "not built for cuda: there are no CUDA sources" in line
    assert project.build_info() == (line, {"cuda": "there are no CUDA sources"})
    assert project.widest() == (64 if is_x86 else 16)


def test_a_second_build_compiles_only_what_changed(project: Project) -> None:
    project.build()
    assert "no work to do" in project.build()
    header = project.root / "csrc/cpu/width.h"
    later = header.stat().st_mtime + 10
    os.utime(header, (later, later))
    output = project.build()
    assert "kernels_portable.o" in output
    assert "bindings.o" not in output


def test_going_back_and_forth_between_configurations_compiles_nothing_again(project: Project) -> None:
    for environment in ({}, {"BSSN_FAST_STRICT": "1"}):
        assert "kernels_portable.o" in project.build(**environment)
    for environment in ({}, {"BSSN_FAST_STRICT": "1"}):
        assert "no work to do" in project.build(**environment)


def test_without_a_compiler_the_build_succeeds_and_says_why(project: Project) -> None:
    project.build()
    assert len(project.modules()) == 1
    (line,) = summaries(project.build(CXX="/nonexistent"))
    assert "not built for cpu: no C++ compiler (/nonexistent) was found" in line
    assert "the reference backend runs everything" in line
    assert project.modules() == [], "the module of an earlier build must not stay"
    summary, not_built = project.build_info()
    assert summary == line
    assert set(not_built) == {"cpu", "cuda"}


def test_code_that_does_not_compile_is_left_out_unless_strict(project: Project) -> None:
    project.write("csrc/cpu/broken.cpp", "#error broken\n")
    (line,) = summaries(project.build())
    assert "not built for cpu: the C++ compiler failed" in line
    assert project.modules() == []
    strict = project.run("setup.py", "-q", "build", BSSN_FAST_STRICT="1")
    assert strict.returncode != 0
    assert "the build failed" in strict.stderr


@pytest.mark.parametrize("flags", ["-Ofast", "-ffast-math", "-O2 -ffinite-math-only"])
def test_numbers_that_are_not_finite_stay_known_whatever_the_flags(project: Project, flags: str) -> None:
    project.write("csrc/cpu/asks.cpp", "static_assert(__FINITE_MATH_ONLY__ == 0);\n")
    project.build(CXXFLAGS=flags)
    assert len(project.modules()) == 1


def test_warnings_are_errors_only_when_strict(project: Project) -> None:
    project.write("csrc/cpu/warns.cpp", "static int unused;\n")
    project.build()
    assert len(project.modules()) == 1
    assert project.run("setup.py", "-q", "build", BSSN_FAST_STRICT="1").returncode != 0


def test_failing_nvcc_leaves_out_cuda_alone(project: Project) -> None:
    project.write("csrc/cuda/kernels.cu", "")
    project.write("toolkit/bin/nvcc", FAILING_NVCC).chmod(0o755)
    (line,) = summaries(project.build(CUDA_HOME=str(project.root / "toolkit")))
    assert "built for cpu" in line
    assert "not built for cuda: nvcc or the C++ compiler failed" in line
    assert project.widest() > 0


def test_cuda_can_be_switched_off(project: Project) -> None:
    project.write("csrc/cuda/kernels.cu", "")
    (line,) = summaries(project.build(BSSN_FAST_CUDA="0"))
    assert "not built for cuda: switched off by BSSN_FAST_CUDA=0" in line


@pytest.mark.parametrize(
    ("asked", "gpus", "archs"),
    [
        ("9.0;80", "8.6", ["80", "90"]),
        ("", "9.0\\n9.0\\n", ["90"]),
        ("", "9.0\\n7.5\\n", ["75", "90"]),
        ("", "13.0\\n", ["75", "90"]),  # newer than this nvcc
        ("", "No devices were found\\n", ["75", "90"]),
        ("all", "9.0\\n", ["75", "90"]),
    ],
)
def test_cuda_architectures(project: Project, asked: str, gpus: str, archs: list[str]) -> None:
    """Those asked for, else those of the GPUs that are there, else all; and PTX of the newest."""
    project.write("csrc/cuda/kernels.cu", "")
    project.write("toolkit/bin/nvcc", FAILING_NVCC).chmod(0o755)
    project.write("bin/nvidia-smi", f"#!/bin/sh\nprintf '{gpus}'\n").chmod(0o755)
    path = f"{project.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    output = project.build(CUDA_HOME=str(project.root / "toolkit"), PATH=path, BSSN_FAST_CUDA_ARCHS=asked)
    (command,) = [line for line in output.splitlines() if "-gencode" in line]
    flags = [word.removeprefix("-gencode=") for word in command.split() if word.startswith("-gencode")]
    expected = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    assert flags == [*expected, f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def test_one_module_serves_every_python(project: Project) -> None:
    """Its name and the wheel's say so, and the code sees nothing of Python's that an older one lacks."""
    project.build()
    (module,) = project.modules()
    assert module.name in ("_C.abi3.so", "_C.pyd")
    project.write("csrc/bindings.cpp", STUB_BINDINGS.replace("return m;", "return PyTuple_GET_ITEM(m, 0);"))
    assert "the C++ compiler failed" in project.build()


def test_editable_build_follows_what_can_be_built(project: Project) -> None:
    package = project.root / "bssn_fast"
    project.write("bssn_fast/_C.cpython-310-x86_64-linux-gnu.so", "an earlier one, which Python would prefer")
    assert project.run("setup.py", "-q", "build_ext", "--inplace").returncode == 0
    assert len(list(package.glob("_C*"))) == 1
    assert "NOT_BUILT" in (package / "_build_info.py").read_text()
    assert project.run("setup.py", "-q", "build_ext", "--inplace", CXX="/nonexistent").returncode == 0
    assert list(package.glob("_C*")) == []
    assert "/nonexistent" in (package / "_build_info.py").read_text()


def test_wheel_and_source_distribution(project: Project) -> None:
    # A source tree with an editable build in it: its results must not reach either archive.
    project.write("bssn_fast/_build_info.py", "raise AssertionError\n")
    project.write("tests/test_stub.py", "")
    done = project.run("-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr
    (wheel,) = (project.root / "dist").glob("*.whl")
    assert "-0_no_compiler-cp310-abi3-" in wheel.name
    assert wheel.name in done.stdout, "pip shows nothing else of a build"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "SUMMARY" in archive.read("bssn_fast/_build_info.py").decode()
        metadata = archive.read(f"bssn_fast-{bssn_fast.__version__}.dist-info/METADATA").decode()
    assert {"bssn_fast/reference.py", "bssn_fast/backends/reference.py", "bssn_fast/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "build")) or "_C" in name]
    assert "License-Expression: MIT" in metadata

    assert project.run("setup.py", "-q", "sdist").returncode == 0
    (sdist,) = (project.root / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "csrc/bindings.cpp", "csrc/cpu/width.h"} <= files
    assert {"tests/test_stub.py", "docs/design.md", "CHANGELOG.md"} <= files
    assert "bssn_fast/_build_info.py" not in files


def test_the_archives_know_the_repository(project: Project) -> None:
    """The README's links and pictures are absolute in a released archive, and the metadata have the address."""
    done = project.run(str(ROOT / ".github" / "address.py"), "https://forge.example/a/b/", "v1")
    assert done.returncode == 0, done.stderr
    assert project.run("setup.py", "-q", "egg_info").returncode == 0
    metadata = (project.root / "bssn_fast.egg-info" / "PKG-INFO").read_text()
    assert "Project-URL: Repository, https://forge.example/a/b\n" in metadata
    assert "(https://forge.example/a/b/raw/v1/docs/images/speed.png)" in metadata
    assert "(https://forge.example/a/b/blob/v1/docs/performance.md)" in metadata
    assert all(target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", metadata))


def test_one_version() -> None:
    version = bssn_fast.__version__
    assert importlib.metadata.version("bssn_fast") == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == version


def test_no_requirement_can_change_the_users_torch() -> None:
    required = importlib.metadata.requires("bssn_fast") or []
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.6"]


def test_the_installed_module_needs_no_torch_and_agrees_with_what_was_said() -> None:
    from bssn_fast import _build_info

    spec = importlib.util.find_spec("bssn_fast._C")
    assert (spec is None) == ("cpu" in _build_info.NOT_BUILT)
    if spec is not None and spec.origin is not None:
        load_alone(Path(spec.origin), "import sys; assert 'torch' not in sys.modules")
