# make demo   set up, then automatic masks of a photo as an overlay picture
# make test   set up, then lint and the whole test suite
# make asan   the operations' tests under AddressSanitizer and UndefinedBehaviorSanitizer
#
# PYTHON=python3.12          another interpreter for the virtual environment
# PIP_ARGS="--index-url ..." where pip looks, e.g. PyTorch's CPU index; by default what pip is configured with
PYTHON ?= python3
PIP_ARGS ?=
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup demo test lint format bench asan clean

setup: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The build tools are installed first and build isolation is off, so that the editable build directory stays valid.
$(VENV)/.dependencies: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) scikit-build-core pybind11 cmake ninja
	$(BIN)/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; o = p['optional-dependencies']; print('\n'.join(p['dependencies'] + o['onnx'] + o['test'] + o['dev']))" > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	$(PIP) --no-deps segment-anything  # the oracle of the tests; its torchvision is not needed
	touch $@

$(STAMP): $(VENV)/.dependencies $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps --editable .
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
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

bench: setup
	$(BIN)/python -m benchmarks.postprocess
	$(BIN)/python -m pytest benchmarks --benchmark-only

# The native operations under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own.
asan: setup
	$(BIN)/python tests/run_sanitized.py

clean:
	rm -rf build dist outputs $(VENV)
