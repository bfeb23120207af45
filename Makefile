# make demo    simulate, prepare, train, embed, evaluate and report on this machine's CPU
# make test    ruff, mypy and the tests, as CI runs them
# make format  let ruff put the code in order
# make clean   remove the environment, caches and what the demo wrote
#
# The environment is made once, in .venv, and again when setup.cfg changes.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BASE := $(VENV)/installed-base
TEST := $(VENV)/installed-test
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(BASE)
	$(BIN)/hibio demo --out demo

test: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

format: $(TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		"HiBio needs Python 3.11 or newer, found " + sys.version.split()[0] + \
		"; name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(BASE): setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e . < /dev/null
	@touch $@

# The tests need all of the base, so the base counts as installed too.
$(TEST): setup.cfg pyproject.toml | $(BIN)/python
	$(PIP) install -e ".[test]" < /dev/null
	@touch $(BASE) $@
