# make demo       swap the attention of a real Transformer and show the result
# make test       the fast tests
# make sanitize   the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make lint       style, types and dead code; one of them by its name: make ruff, mypy, vulture or clang-format
# make format     let ruff and clang-format rewrite the sources
#
# Everything happens in .venv, made on the first run. TORCH=torch==2.11.0 chooses another torch.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTRAS := test,lint,demo,hf,tasks

# What the installation depends on: with these unchanged nothing is built again.
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -path "*/__pycache__/*")
CPP := $(filter %.cpp %.cu %.h,$(SOURCES))

.PHONY: demo test sanitize lint ruff mypy vulture clang-format format clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python -m longvq_layers.demo

test: install
	$(BIN)/python -m pytest -n $$(getconf _NPROCESSORS_ONLN) -m "not slow"

sanitize: install
	$(BIN)/python csrc/build_support/sanitize.py

# Each takes its configuration from pyproject.toml or .clang-format.
lint: ruff mypy vulture clang-format

ruff: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: install
	$(BIN)/mypy

vulture: install
	$(BIN)/vulture

clang-format: install
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamp means that some torch is installed. It stays, whatever its version, until make clean.
$(VENV)/torch-installed: | $(VENV)/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77"
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@

# The constraint keeps the torch that is there: a dependency that needs another one makes this step fail.
$(VENV)/installed: $(VENV)/torch-installed $(SOURCES)
	$(PIP) install --no-build-isolation --constraint $(VENV)/torch-installed --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output longvq_layers/lib longvq_layers/_build_info.json
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
