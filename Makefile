# make demo   set up, then automatic masks of a photo as an overlay picture
# make test   set up, then lint and the whole test suite
# make asan   the operations' tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make sanitize-cuda   those of the CUDA operations under compute-sanitizer, on a machine with a GPU
#
# PYTHON=python3.12          another interpreter for the virtual environment
# TORCH_ARGS="--index-url ..." where pip looks for torch, e.g. PyTorch's CPU index; by default what pip is configured with
# PIP_ARGS="..."             more arguments for every call of pip
PYTHON ?= python3
TORCH_ARGS ?=
PIP_ARGS ?=
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup demo test lint format bench asan sanitize-cuda clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch and the build tools come first and build isolation is off, so that the build directory of the editable install
# stays valid. segment-anything is the oracle of the tests; of its dependencies they need none.
$(VENV)/.dependencies: constraints.txt | $(BIN)/python
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(PIP) --no-deps segment-anything
	touch $@

$(STAMP): $(VENV)/.dependencies $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable '.[onnx,train,eval,test,dev]'
	touch $@

demo: setup
	$(BIN)/sam-fast demo --output outputs/demo

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh tests/cuda_emulation/*.cpp tests/cuda_emulation/*.h

bench: setup
	$(BIN)/python -m benchmarks.postprocess
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The native operations under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
asan: setup
	$(BIN)/python tests/run_sanitized.py

sanitize-cuda: setup
	$(BIN)/python tests/run_compute_sanitizer.py

clean:
	rm -rf build dist outputs $(VENV)
