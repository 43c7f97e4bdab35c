# `make demo` and `make test` set themselves up in a virtual environment and run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TORCH ?= 2.13.0

# A torch that is installed already and new enough, in $(HAS_TORCH), is used as it is. Else a CPU build, which is the plain package except
# on x86 Linux; where there is an NVIDIA GPU, the plain package with CUDA.
HAS_TORCH := $(shell $(PYTHON) -c 'import pathlib, torch; assert torch.__version__ >= (2, 11); print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null)
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
CPU_BUILD := $(if $(HAS_GPU),,$(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)))
TORCH_PACKAGE := torch==$(TORCH)$(if $(CPU_BUILD),+cpu --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu)

.PHONY: demo test test-avx2 test-slow test-install test-gpu sanitize lint bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(if $(HAS_TORCH),--system-site-packages) $(VENV)
	$(if $(HAS_TORCH),$@ -c 'import torch' 2>/dev/null || echo '$(HAS_TORCH)' \
	    > $$($@ -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_another_environment.pth)

$(VENV)/.torch: | $(BIN)/python
	$(if $(HAS_TORCH),,$(PIP) install $(TORCH_PACKAGE))
	touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(PIP) install -e .
	touch $@

# The kernels' tests need Triton, which a CPU build of torch does not bring. 3.6.0 comes with torch 2.11; its
# interpreter fails with NumPy 2.4.
NEEDS_TRITON := $(filter Linux,$(shell uname -s))

$(VENV)/.developer: pyproject.toml | $(VENV)/.installed
	$(PIP) install -e '.[dev,bench]'
	$(if $(NEEDS_TRITON),$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) install triton==3.6.0 'numpy<2.4')
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ard demo $(ARGS)

test: $(VENV)/.developer
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS)

# What depends on instruction sets, as on a processor that has nothing beyond AVX2: PyTorch's own kernels, oneDNN, ours, MKL, and
# OpenBLAS, with which NumPy computes the products of Triton's interpreter.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=avx2 ARD_KERNELS_ISA=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 OPENBLAS_CORETYPE=Haswell
AVX2_TESTS := tests/ard_kernels/test_attention_tiles.py tests/ard_kernels/test_attention_triton.py tests/ard_kernels/test_adaln_triton.py \
    tests/ard_kernels/test_gelu.py tests/ard_kernels/test_machine.py tests/ard/test_losses.py tests/ard/test_diffusion.py

test-avx2: $(VENV)/.developer
	$(AVX2) $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS) $(AVX2_TESTS)

test-slow: $(VENV)/.developer
	$(BIN)/python -m pytest -m slow $(ARGS)

test-install: $(VENV)/.developer
	$(BIN)/python -m pytest -m install $(ARGS) tests/test_installation.py

# All that there are; no other modules, which import what a machine with a GPU may lack.
GPU_TESTS := tests/ard_kernels tests/ard/test_sampling.py tests/benchmarks/test_gpu_suite.py

test-gpu: $(VENV)/.developer
	$(BIN)/python -m pytest -m gpu -n 8 --dist worksteal $(ARGS) $(GPU_TESTS)

bench: $(VENV)/.developer
	$(BIN)/python -m pytest --benchmark-only tests/benchmarks $(ARGS)

# The compiled kernels' tests under AddressSanitizer and UBSan, with a copy of the package beside such a build.
SANITIZED := build/sanitize
SANITIZED_TESTS ?= tests/ard_kernels
ISAS ?= portable;avx2;avx512;avx512_bf16;amx_emulated
RUNTIMES = $(foreach name,asan ubsan stdc++,$(shell $(or $(CXX),c++) -print-file-name=lib$(name).so))

sanitize: export PATH := $(abspath $(BIN)):$(PATH)
sanitize: $(VENV)/.developer
	cmake -G Ninja -S . -B $(SANITIZED)/cmake -DARD_SANITIZE=address,undefined "-DARD_INSTRUCTION_SETS=$(ISAS)" -DARD_CUDA=off \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dpybind11_DIR=$$(python -m pybind11 --cmakedir)
	cmake --build $(SANITIZED)/cmake
	rm -rf $(SANITIZED)/ard_kernels && cp -r ard_kernels $(SANITIZED)/ && cp $(SANITIZED)/cmake/_C.* $(SANITIZED)/ard_kernels/
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	    python -m pytest -s -o pythonpath="$(SANITIZED) ." -k "native or compiled" $(ARGS) $(SANITIZED_TESTS)

lint: $(VENV)/.developer
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
