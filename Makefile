# make train   the example: a small GAN on handwritten digits, with BSSN in its discriminator; options by ARGS="..."
# make test    lint, types and all tests
# make bench   speed on this machine's CPU, and the report in docs/performance.md; nothing else should run
# make bench-compare   the same against this machine's kept figures
# make evidence   the paper's claims, tried in many small trainings: docs/evidence.md; ARGS=--quick shows that it works
# make gpu     correctness and speed on this machine's GPU in ten minutes, with the Python and torch that it already has;
#              OUTPUT=folder for its files. A second run goes on where the first ended
# make gpu-prepare   on a machine without a GPU: compiles into build/gpu what make gpu on another one would begin with
# make asan    the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make docs    the reference of all public names, in build/docs
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

.PHONY: train test lint bench bench-compare evidence gpu gpu-prepare asan docs format env build clean
.DELETE_ON_ERROR:

# Only the tests need the CUDA kernels, which take minutes to compile: where they are missing Triton serves GPUs. Whoever
# wants them in the other targets sets BSSN_FAST_CUDA=1.
train bench bench-compare evidence asan docs format: export BSSN_FAST_CUDA ?= 0

train: build
	$(BIN)/python examples/train_gan.py $(ARGS)

test: export BSSN_FAST_STRICT = 1
test: build lint
	$(BIN)/python -m pytest $(ARGS)

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
	$(WITH_ASAN) $(BIN)/pytest -p no:cacheprovider --capture=sys tests/backends/test_cpu.py $(ARGS)

docs: build
	$(BIN)/python -W error -m pdoc -d google -o build/docs bssn_fast

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
