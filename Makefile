# Every target makes its own virtual environment first, from the versions in constraints.txt.
PYTHON ?= python3
VENV ?= .venv
DEMO ?=
PYTEST ?= -n auto --maxprocesses 4

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow lint types imports docs check

demo: $(INSTALLED)  ## train, predict and evaluate on the built-in phantom; ends with a report
	$(BIN)/python -m normnet.demo $(DEMO)

test: $(INSTALLED)  ## the test suite
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST)

test-slow: $(INSTALLED)  ## what takes long: kills, memory, whole kernels on the host, sanitizers
	$(BIN)/python -m pytest -m slow $(PYTEST)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

docs: $(INSTALLED)  ## docs/_build/html/index.html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

check: lint types imports docs test test-slow

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev,docs]' -c constraints.txt
	touch $@
