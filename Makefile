# Every target makes its own virtual environment first, from the versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
DEMO ?=
PYTEST ?= -n auto --maxprocesses 4
GPU ?=
GPU_PYTHON ?= 3.12
GPU_WHEELS ?= .whl

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-soak lint types imports docs check gpu gpu-wheels

demo: $(INSTALLED)  ## train, predict and evaluate on the built-in phantom; ends with a report
	$(BIN)/python -m normnet.demo $(DEMO)

test: $(INSTALLED)  ## the test suite
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST)

test-slow: $(INSTALLED)  ## what takes long: kills, memory, whole kernels on the host, sanitizers
	$(BIN)/python -m pytest -m slow $(PYTEST) --ignore=tests/hostile -k 'not twenty_kills or train or prepare or predict'

test-soak: $(INSTALLED)  ## half an hour: twenty kills of every command, 2,000 interrupts, 36,000 mutants of scans, growth
	$(BIN)/python -m pytest -m slow $(PYTEST) tests/hostile tests/test_kill.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

docs: $(INSTALLED)  ## docs/_build/html/index.html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

gpu: $(INSTALLED)  ## everything there is to see on a GPU; GPU='--part smoke' chooses, GPU=--help says more
	$(BIN)/python -m benchmarks.session $(GPU)

gpu-wheels:  ## for python -m benchmarks.session --wheels, on a machine with CUDA and torch but no network
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  -c constraints.txt -d $(GPU_WHEELS) monai tyro docstring_parser typeguard \
	  annotated-types pydantic pydantic_core typing-inspection pandas python-dateutil joblib narwhals scikit-learn threadpoolctl scikit-image imageio lazy-loader tifffile

check: lint types imports docs test test-slow

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]' -c constraints.txt
	touch $@
