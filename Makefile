# make demo       swap the attention of a real Transformer and show the result
# make test       the fast tests
# make sanitize   the tests of the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make lint       ruff
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

.PHONY: demo test sanitize lint clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python -m longvq_layers.demo

test: install
	$(BIN)/python -m pytest -n $$(getconf _NPROCESSORS_ONLN) -m "not slow"

sanitize: install
	$(BIN)/python csrc/build_support/sanitize.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: $(VENV)/installed

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A stamp, not a test for the package: a torch that is there stays, whatever its version, until make clean.
$(VENV)/torch-installed: | $(VENV)/bin/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	$(PIP) install "setuptools>=77"
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $@

# The constraint holds torch where it is: if a dependency asked for another one, this would fail instead of replacing it.
$(VENV)/installed: $(VENV)/torch-installed $(SOURCES)
	$(PIP) install --no-build-isolation --constraint $(VENV)/torch-installed --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output longvq_layers/lib longvq_layers/_build_info.json
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
