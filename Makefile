# This project's commands. Every target does its own set-up and redoes only what changed.
#
#   make demo     distil, quantize and run a digit classifier on the real kernels     (SEEDS=5 OUT=demo-output)
#   make test     the whole test suite
#   make test-cuda    on a machine with a GPU: the CUDA kernels' tests there, under compute-sanitizer where it is present,
#                     the torch operators on CUDA tensors, a small run of the benchmarks, and the demos
#   make bench    every kernel against its best peer and the machine's limit
#   make lint     ruff, mypy, clang-format
#
# Overridable: PYTHON (3.11 or newer), TORCH (a pip requirement), VENV.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
SEEDS ?= 5
OUT ?= demo-output
BIN := $(VENV)/bin
INSTALL = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
CXX_SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

.PHONY: demo test test-cuda bench lint build clean
.DEFAULT_GOAL := build

demo: build
	$(BIN)/kdq demo digits --seeds $(SEEDS) --out $(OUT)

test: build
	$(BIN)/python -m pytest

CUDA_TESTS := build/cuda-tests
SANITIZER := $(shell command -v compute-sanitizer)

# Installs anew: what is there may have been built without the operators for CUDA tensors. 77: a test for another GPU.
test-cuda: export KDQ_CUDA = ON
test-cuda: $(VENV)/.deps
	$(INSTALL)
	$(BIN)/cmake -S . -B $(CUDA_TESTS) -G Ninja -DCMAKE_MAKE_PROGRAM="$(abspath $(BIN))/ninja" -DKDQ_TESTS=ON -DKDQ_CUDA=ON
	$(BIN)/cmake --build $(CUDA_TESTS) --target cuda_gpu_tests
	set -e; for test in $(CUDA_TESTS)/tests/cuda/cuda_*_gpu_test; do \
		echo "$$test"; "$$test" || { test $$? = 77; continue; }; \
		for tool in $(if $(SANITIZER),memcheck racecheck); do \
			$(SANITIZER) --tool "$$tool" --error-exitcode 1 "$$test"; \
		done; \
	done
	$(BIN)/python -m pytest --device cuda tests/kernels/test_torch_ops.py tests/kernels/test_attention.py \
		tests/kernels/test_distillation.py tests/kernels/test_conv2d.py tests/kernels/test_cuda_ops.py tests/kernels/test_gpu_peaks.py
	KDQ_CUDA_HOPPER=1 timeout 300 $(BIN)/python -m pytest --device cuda tests/kernels/test_torch_ops.py
	$(BIN)/kdq bench --device cuda --quick --keep-going
	$(BIN)/kdq demo digits --device cuda --seeds 1 --out $(OUT)/cuda-digits
	$(BIN)/kdq demo language --device cuda --quick --out $(OUT)/cuda-language

bench: build
	$(BIN)/pip install --quiet -r benchmarks/requirements.txt
	$(BIN)/kdq bench --threads 1 --threads 2 --json benchmarks/results.json --markdown benchmarks/RESULTS.md \
		--plot benchmarks/results.png --scaling benchmarks/scaling.png
	KDQ_ISA=avx2 $(BIN)/kdq bench --family int8_matmul --family binary_matmul --threads 1 \
		--markdown benchmarks/RESULTS-avx2.md

lint: build $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# Ninja decides what to recompile; a second call compiles nothing.
build: $(VENV)/.installed
	$(BIN)/cmake --build build/editable-*

$(VENV)/.installed: $(VENV)/.deps pyproject.toml setup.py
	$(INSTALL)
	touch $@

$(VENV)/.deps: requirements.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdq-kernels needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)" -r requirements.txt
	touch $@

$(VENV)/.lint: requirements-dev.txt
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf build $(VENV) kdq_kernels/*.so *.egg-info
