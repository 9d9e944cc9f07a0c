# `make bench`, `make test` and `make lint` are each all a newcomer needs: Python >= 3.10, a C++20 compiler and CMake.
# The active virtual environment is used as it is; without one, .venv is made. Nothing outside of it is touched.
.PHONY: help install bench test test-asan test-cuda test-cuda-deep gpu-check lint format clean
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON      ?= python3
TORCH       ?= torch==2.13.0
JOBS        ?= 2
WERROR      ?= OFF
ENV         := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
RUN         := $(ENV)/bin/python
CMAKE       := PATH="$(abspath $(ENV))/bin:$$PATH" $(ENV)/bin/cmake
BUILD_TOOLS := scikit-build-core cmake ninja pybind11
EXTRAS      := bench,test,lint,transformers
CXX_FILES    = $(shell find cpp cuda tests -type f 2>/dev/null | grep -E '\.(h|cuh|cpp|cu|inc)$$')
SOURCES     := $(shell find cpp cuda python CMakeLists.txt pyproject.toml -type f ! -path '*__pycache__*' 2>/dev/null)
STAMP       := $(ENV)/.torch-moe-installed

help:
	@echo 'make bench      time the MoE layer against the dense FFN on real text (about two minutes)'
	@echo 'make test       the quick test suite, then the C++ core under sanitizers, then the CUDA kernels on the CPU'
	@echo 'make lint       ruff, mypy --strict, clang-format'
	@echo 'make test-asan  the C++ core under the address and undefined-behaviour sanitizers'
	@echo 'make gpu-check  build, prove and measure the CUDA kernels on the GPU of this machine (nine minutes at most)'
	@echo 'make test-cuda  the CUDA kernels executed on the CPU; test-cuda-deep: under many more schedules'
	@echo 'make format     rewrite the sources as make lint wants them'
	@echo 'make install    the environment alone: torch, build tools, extras, this package'
	@echo 'make clean      remove build outputs (and .venv)'

$(ENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'torch-moe needs Python >= 3.10; name one with make PYTHON=python3.12' >&2; exit 1; }
	$(PYTHON) -m venv $(ENV) \
	  || { rm -rf $(ENV); echo 'python -m venv failed (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }

# Order matters: torch first, so that nothing else pulls in another build of it, and no build isolation, so that the
# extension is compiled against the torch it will run with. Extras are part of the same step: one resolver run.
$(STAMP): $(SOURCES) Makefile | $(ENV)/bin/python
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install '$(TORCH)'
	$(RUN) -m pip install --quiet $(BUILD_TOOLS)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) PATH="$(abspath $(ENV))/bin:$$PATH" \
	  $(RUN) -m pip install --no-build-isolation --config-settings=cmake.define.MOE_WERROR=$(WERROR) '.[$(EXTRAS)]'
	@touch $@

install: $(STAMP)

bench: $(STAMP)
	mkdir -p benchmarks/out
	$(RUN) -m torch_moe bench --dtype fp32,bf16 --experts 8,16,32 \
	  --output benchmarks/out/bench.jsonl --plot benchmarks/out/bench.png $(BENCH_ARGS)

test: $(STAMP)
	$(RUN) -m pytest -n $(JOBS) -m 'not slow' tests $(TEST_ARGS)
	$(MAKE) test-asan
	$(MAKE) test-cuda

test-asan: $(STAMP)
	$(CMAKE) -S . -B build/asan -G Ninja -DMOE_ASAN=ON -DMOE_WERROR=$(WERROR)
	$(CMAKE) --build build/asan --parallel $(JOBS)
	$(ENV)/bin/ctest --test-dir build/asan --output-on-failure

# On the Python that is there, with its torch: where the GPUs are, nothing may be there to download from.
gpu-check:
	$(if $(VIRTUAL_ENV),$(RUN),$(PYTHON)) benchmarks/gpu_check.py $(GPU_ARGS)

# Every CUDA kernel, executed on the CPU under randomised schedules; needs CUDA's headers and no GPU.
test-cuda: $(STAMP)
	$(CMAKE) -S . -B build/cuda -G Ninja -DMOE_CUDA_ON_CPU=ON -DMOE_WERROR=$(WERROR)
	$(CMAKE) --build build/cuda --parallel $(JOBS) --target moe_cuda_tests
	$(ENV)/bin/ctest --test-dir build/cuda -L cuda --parallel $(JOBS) --output-on-failure

test-cuda-deep: export MOE_CUDA_SEEDS := 50
test-cuda-deep: test-cuda

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy --strict python/torch_moe
	$(ENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(ENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist benchmarks/out .mypy_cache .ruff_cache .pytest_cache .hypothesis
	$(if $(VIRTUAL_ENV),rm -f $(STAMP),rm -rf .venv)
