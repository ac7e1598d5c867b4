# Two commands for a newcomer: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

.PHONY: help setup demo test test-slow check format clean

help:
	@echo "make setup      create $(VENV) with the sd35bench command (no-op when up to date)"
	@echo "make demo       sweep the embedded model, score, recommend, write the HTML report"
	@echo "make test       the default test suite"
	@echo "make test-slow  the long tests"
	@echo "make check      format, lint, types, import contracts, fast tests"
	@echo "make format     apply the formatter and the linter's fixes"
	@echo "make clean      remove $(VENV) and caches (results/ is kept)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "sd35bench needs Python 3.11 to 3.13; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/sd35bench run experiment=demo
	@$(BIN)/sd35bench run experiment=demo-edit
	@$(BIN)/sd35bench recommend demo
	@$(BIN)/sd35bench report demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -q

test-slow: setup
	$(BIN)/pytest -q -m 'slow and not gpu and not weights and not network'

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -q -m 'not slow and not model and not browser and not gpu and not weights and not network'

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
