"""Builds the kernels: one extension module, bssn_fast._C, without anything of torch. The rest is in pyproject.toml.

What cannot be built is left out, and the package works without it. One printed line says what was built and why not the
rest; `bssn_fast/_build_info.py` keeps it for `python -m bssn_fast`. Environment variables:

    CXX, CXXFLAGS, LDFLAGS   the C++ compiler, GCC or Clang (default: the first of c++, g++ and clang++, on Windows
                             clang++), and additions to its flags
    CUDA_HOME                where CUDA is, if nvcc is not on PATH
    BSSN_FAST_CUDA=0         leave the CUDA kernels out
    BSSN_FAST_CUDA_ARCHS     the architectures to compile for: "90", "90;100" or "all" (default: those of the GPUs that
                             are there, all where there is none)
    BSSN_FAST_STRICT=1       for development: warnings are errors, and code that does not compile ends the build
    BSSN_FAST_SANITIZE=1     for development: AddressSanitizer and UndefinedBehaviorSanitizer, no CUDA
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
STRICT = os.environ.get("BSSN_FAST_STRICT") == "1"
SANITIZE = os.environ.get("BSSN_FAST_SANITIZE") == "1"
IS_MAC, IS_WINDOWS = sys.platform == "darwin", sys.platform == "win32"
MACHINE = sysconfig.get_platform().rpartition("-")[2]  # the one to build for, not always this one
IS_X86 = (platform.machine() if MACHINE == "universal2" else MACHINE).lower() in ("x86_64", "amd64")
# One module serves every Python from 3.10 on, but those without a GIL, which have no stable interface.
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")
REINSTALL = "reinstall (pip install --force-reinstall --no-cache-dir)"

BASELINE = "portable"
ISA_FLAGS = {BASELINE: []}
if IS_X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    ]
# Behind the user's flags: the kernels ask whether numbers are finite, which -Ofast lets compilers take for granted.
EXACT = ["-fno-fast-math", "-fno-unsafe-math-optimizations", "-fno-finite-math-only"]
CUDA_ARCHS = ("75", "80", "86", "89", "90", "100", "110", "120")


class NotBuiltError(Exception):
    """A part has to be left out; the message says why and what to do."""


@dataclass(frozen=True)
class Cuda:
    """nvcc, what the C++ compiler needs to work with it, and the architectures to compile for."""

    nvcc: str
    include_flags: list[str]
    library_flags: list[str]
    archs: list[str]

    def arch_flags(self) -> list[str]:
        """Return nvcc's flags for machine code of every architecture and PTX of the newest, for those to come."""
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        return [*flags, f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}"]


@dataclass
class Outcome:
    """What was built, by backend, and why not the rest."""

    built: dict[str, list[str]] = field(default_factory=dict)
    not_built: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        parts = [f"built for {name}: {', '.join(variants)}" for name, variants in self.built.items()]
        parts += [f"not built for {name}: {reason}" for name, reason in self.not_built.items()]
        if "cpu" not in self.built:
            parts.append("the reference backend runs everything on the CPU")
        return f"bssn_fast: {'; '.join(parts)}"

    def as_module(self) -> str:
        return (
            '"""Written by setup.py: what this installation was built with."""\n\n'
            f"SUMMARY: str = {self.summary()!r}\n"
            f"NOT_BUILT: dict[str, str] = {self.not_built!r}\n"
        )


def find_compiler() -> str:
    candidates = ["clang++"] if IS_WINDOWS else ["c++", "g++", "clang++"]
    if os.environ.get("CXX"):
        candidates = [os.environ["CXX"]]
    for command in candidates:
        if shutil.which(split(command)[0]):
            return command
    raise NotBuiltError(
        f"no C++ compiler ({' or '.join(candidates)}) was found; install one or set CXX, then {REINSTALL}"
    )


def find_cuda() -> Cuda:
    if os.environ.get("BSSN_FAST_CUDA") == "0" or SANITIZE:
        raise NotBuiltError("switched off by BSSN_FAST_CUDA=0" if not SANITIZE else "no CUDA in a sanitizer build")
    if IS_WINDOWS:
        raise NotBuiltError("setup.py does not compile CUDA on Windows")
    if not list(CSRC.glob("cuda/*.cu")):
        raise NotBuiltError("there are no CUDA sources")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None:
        raise NotBuiltError(f"nvcc was not found; install the CUDA toolkit or set CUDA_HOME, then {REINSTALL}")
    return Cuda(nvcc, *cuda_paths(nvcc), cuda_archs(nvcc))


def cuda_paths(nvcc: str) -> tuple[list[str], list[str]]:
    """Return nvcc's own flags for headers and libraries: its location tells little, as it may be a wrapper script."""
    report = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = dict(re.findall(r"^#\$ (INCLUDES|LIBRARIES)=(.*)$", report.stderr, flags=re.MULTILINE))
    if len(found) != 2:
        raise NotBuiltError(f"{nvcc} does not tell where its headers and libraries are")
    return shlex.split(found["INCLUDES"]), shlex.split(found["LIBRARIES"])


def cuda_archs(nvcc: str) -> list[str]:
    """Return the architectures to compile for, the newest last."""
    wish = os.environ.get("BSSN_FAST_CUDA_ARCHS", "").replace(".", "")
    asked = re.findall(r"\d+[a-z]?", wish)
    if asked:
        return sorted(asked, key=lambda arch: int(arch.rstrip("abcdef")))
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\d+)", listed)
    present = gpu_archs()
    if present and wish != "all" and set(present) <= set(known):
        return present
    archs = [arch for arch in CUDA_ARCHS if arch in known]
    if not archs:
        raise NotBuiltError(f"{nvcc} knows none of the architectures {', '.join(CUDA_ARCHS)}")
    return archs


def gpu_archs() -> list[str]:
    """Return the architectures of this machine's GPUs, the newest last."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    answer = subprocess.run(command, capture_output=True, text=True)
    found = re.findall(r"^(\d+)\.(\d)\s*$", answer.stdout, flags=re.MULTILINE) if answer.returncode == 0 else []
    return sorted({major + minor for major, minor in found}, key=int)


def split(text: str) -> list[str]:
    return shlex.split(text, posix=not IS_WINDOWS)


def join(words: list[str]) -> str:
    """Return a command line as ninja hands it to the shell or, on Windows, to the program itself."""
    return subprocess.list2cmdline(words) if IS_WINDOWS else shlex.join(words)


def common_flags() -> list[str]:
    flags = ["-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3"]
    flags += ["-std=c++17", "-fvisibility=hidden"]
    if not IS_WINDOWS:
        flags += ["-fPIC", "-pthread"]
    if IS_MAC:
        flags += split(os.environ.get("ARCHFLAGS", ""))
    if SANITIZE:
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    if STRICT:
        flags += ["-Wall", "-Wextra", "-Werror"]
    if IS_X86:
        flags.append("-DBSSN_ISA_LIST_X86=1")
    return flags


def link_flags(cxx: str, cuda: Cuda | None) -> list[str]:
    if IS_MAC:
        flags = ["-bundle", "-undefined", "dynamic_lookup", "-pthread", *split(os.environ.get("ARCHFLAGS", ""))]
    elif IS_WINDOWS:
        # The library of Python, and Clang's own, which has what __builtin_cpu_supports reads.
        ask = [*split(cxx), "--rtlib=compiler-rt", "-print-libgcc-file-name"]
        runtime = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
        flags = ["-shared", f"-L{Path(sys.base_prefix, 'libs')}", *([runtime] if Path(runtime).is_file() else [])]
    else:
        flags = ["-shared", "-pthread"]
    if SANITIZE:
        flags.append("-fsanitize=address,undefined")
    if cuda:
        flags += [*cuda.library_flags, "-lcudart_static", "-ldl", "-lrt"]
    return flags + split(os.environ.get("LDFLAGS", ""))


def write_ninja(path: Path, build_dir: Path, module: Path, cxx: str, cuda: Cuda | None) -> None:
    """Write the build file of `module`; without `cuda` the sources under csrc/cuda are left out."""
    from ninja.ninja_syntax import Writer

    flags = common_flags()
    user_flags = [*split(os.environ.get("CXXFLAGS", "")), *EXACT]
    # Only the bindings see Python's headers: for another Python nothing else is compiled again.
    binding_flags = [f"-I{sysconfig.get_path('include')}", *["-DPy_LIMITED_API=0x030A0000"] * ABI3]
    cuda_flags = ["-DBSSN_WITH_CUDA=1", *cuda.include_flags] if cuda else []

    with path.open("w") as file:
        ninja = Writer(file)
        ninja.variable("ninja_required_version", "1.5")
        ninja.variable("builddir", str(build_dir))
        ninja.rule("cxx", f"{cxx} $flags -MMD -MF $out.d -c $in -o $out", "C++ $out", "$out.d", deps="gcc")
        ninja.rule("link", f"{cxx} $in -o $out $flags", "link $out")
        if cuda:
            ninja.rule("nvcc", f"{cuda.nvcc} $flags -MD -MF $out.d -c $in -o $out", "CUDA $out", "$out.d", deps="gcc")

        objects = []

        def compile_one(rule: str, source: Path, *extra: list[str], suffix: str = "") -> None:
            out = str(build_dir / source.relative_to(CSRC).with_suffix("")) + f"{suffix}.o"
            command = [word for group in extra for word in group]
            ninja.build(out, rule, str(source), variables={"flags": join(command)})
            objects.append(out)

        # The order matters: of an inline function that several objects contain the linker keeps the first copy, which
        # must be one that every machine can run. So the baseline comes first and the widest vectors last.
        kernels = CSRC / "cpu" / "kernels.cpp"
        for source in sorted({*CSRC.glob("*.cpp"), *CSRC.glob("cpu/*.cpp")} - {kernels}):
            extra = [*binding_flags, *cuda_flags] if source.parent == CSRC else []
            compile_one("cxx", source, flags, extra, user_flags)
        for source in sorted(CSRC.glob("cuda/*.cpp")) if cuda else []:
            compile_one("cxx", source, flags, cuda_flags, user_flags)
        for source in sorted(CSRC.glob("cuda/*.cu")) if cuda else []:
            compile_one("nvcc", source, nvcc_flags(cxx, cuda))
        for isa, isa_flags in ISA_FLAGS.items():
            compile_one("cxx", kernels, flags, user_flags, isa_flags, [f"-DBSSN_ISA={isa}"], suffix=f"_{isa}")
        ninja.build(str(module), "link", objects, variables={"flags": join(link_flags(cxx, cuda))})
        ninja.default(str(module))


def nvcc_flags(cxx: str, cuda: Cuda) -> list[str]:
    flags = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden", "--threads=4"]
    if len(split(cxx)) == 1:  # not "ccache g++"
        flags.append(f"-ccbin={cxx}")
    if STRICT:
        flags.append("-Werror=all-warnings")
    return flags + cuda.arch_flags()


def configuration(cuda: Cuda | None) -> str:
    """Return a name of what is built, for its folder: going back and forth between two then compiles nothing again."""
    parts = [
        "abi3" if ABI3 else sys.implementation.cache_tag,
        sysconfig.get_platform(),
        "asan" * SANITIZE,
        "strict" * STRICT,
    ]
    parts += ["cuda", *cuda.archs] if cuda else []
    return "-".join(part for part in parts if part)


def compile_module(cxx: str, cuda: Cuda | None) -> Path:
    """Bring the module up to date and return its path."""
    build_dir = Path("build") / configuration(cuda)
    build_dir.mkdir(parents=True, exist_ok=True)
    module = build_dir / "_C.so"
    build_file = build_dir / "build.ninja"
    write_ninja(build_file, build_dir, module, cxx, cuda)
    if subprocess.run([sys.executable, "-m", "ninja", "-f", str(build_file)]).returncode:
        if STRICT:
            hint = "; BSSN_FAST_CUDA=0 leaves CUDA out" if cuda else ""
            raise SystemExit(f"bssn_fast: the build failed, see above{hint}")
        raise NotBuiltError(
            f"{'nvcc or the C++ compiler' if cuda else 'the C++ compiler'} failed; {REINSTALL} "
            "with -v to see its messages"
        )
    return module


def compile_what_can_be() -> tuple[Path | None, Outcome]:
    """Return the module with as many backends as possible, or None, and what was built."""
    outcome = Outcome()
    try:
        cxx = find_compiler()
        try:
            cuda = find_cuda()
            module = compile_module(cxx, cuda)
            outcome.built = {"cpu": list(ISA_FLAGS), "cuda": [f"sm_{arch}" for arch in cuda.archs]}
        except NotBuiltError as reason:
            outcome.not_built["cuda"] = str(reason)
            module = compile_module(cxx, None)
            outcome.built = {"cpu": list(ISA_FLAGS)}
    except NotBuiltError as reason:
        outcome.not_built = {"cpu": str(reason), "cuda": "it needs the C++ compiler too"}
        return None, outcome
    return module, outcome


class BuildKernels(build_ext):
    """Compiles through ninja and leaves out, rather than fails on, what cannot be built."""

    outcome = Outcome()

    def build_extension(self, ext: Extension) -> None:
        module, outcome = compile_what_can_be()
        self.outcome = outcome
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if module:
            shutil.copy2(module, target)
        (target.parent / "_build_info.py").write_text(outcome.as_module())
        print(outcome.summary(), flush=True)

    def copy_extensions_to_source(self) -> None:
        """Bring an editable build's results into the source tree, or remove those of an earlier one."""
        for ext in self.extensions:
            in_source = Path(ext.name.replace(".", os.sep)).parent
            shutil.copy2(Path(self.build_lib) / in_source / "_build_info.py", in_source)
            for earlier in in_source.glob("_C.*"):
                earlier.unlink()
        super().copy_extensions_to_source()


class Wheel(bdist_wheel):
    """Says in its name if it has no kernels: of all that a successful build prints, pip shows that name alone."""

    @property
    def wheel_dist_name(self) -> str:
        reason = self.get_finalized_command("build_ext").outcome.not_built.get("cpu")
        if reason:
            self.build_number = "0_no_compiler" if reason.startswith("no C++ compiler") else "0_compiler_failed"
        return super().wheel_dist_name


sources = sorted(str(path) for path in CSRC.rglob("*.c*") if path.suffix in (".cpp", ".cu"))
setup(
    # Optional: the module may be missing from the result. The kernels' sources are listed for the source distribution.
    ext_modules=[Extension("bssn_fast._C", sources, optional=True, py_limited_api=ABI3)],
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
