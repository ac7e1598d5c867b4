# Two commands for a newcomer: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Twice the cores of a small machine: a tenth of the tests' time is waiting.
JOBS ?= 4
# Setup compiles no module: Python keeps each when it is first imported, unless this forbids it. Then
# torch and diffusers are compiled anew by every process, 10 s each, and the tests start some 150.
export PYTHONDONTWRITEBYTECODE :=
# The compiled core makes eager's latents to 1e-4 in a third of its time, and needs a C++ compiler once.
DEMO_BACKEND ?= $(shell command -v $(CXX) >/dev/null 2>&1 && echo core || echo eager)

.PHONY: help setup demo decide bench bench-gpu bench-gpu-rehearsal test test-slow reliability validity docs check format clean

help:
	@echo "make setup      create $(VENV) with the sd35bench command (no-op when up to date)"
	@echo "make demo       sweep the embedded model, score, recommend, write the HTML report"
	@echo "make decide     on nano: the vendor's claims, an adaptive search, a recommendation, a gate that fails"
	@echo "make bench      the compiled core against its peers, with its targets: results/tables/core.md, 40 min"
	@echo "                (PARTS=block,nano runs some parts only, and keeps the others' figures)"
	@echo "make bench-gpu  the full SD3.5-Medium on a GPU, random weights; writes results/tables/gpu.md"
	@echo "make bench-gpu-rehearsal  the same chain at one layer and 256 px, on any machine"
	@echo "make test       the default test suite"
	@echo "make test-slow  the long tests"
	@echo "make validity   how often the intervals and verdicts are right; prints docs/validity.md's tables"
	@echo "                (nano's part of that page: python -m tests.validity_runs --help)"
	@echo "make reliability  kills, malformed replies, SSRF, limits, load; writes docs/reliability.md"
	@echo "make docs       the site of docs/ in site/, and docs/reference.md from the schemas"
	@echo "make check      format, lint, types, import contracts, fast tests"
	@echo "make format     apply the formatter and the linter's fixes"
	@echo "make clean      remove $(VENV) and caches (results/ is kept)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "sd35bench needs Python 3.11 to 3.13; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/sd35bench run experiment=demo backend=$(DEMO_BACKEND)
	@$(BIN)/sd35bench run experiment=demo-edit backend=$(DEMO_BACKEND)
	@$(BIN)/sd35bench recommend demo
	@$(BIN)/sd35bench report demo

decide: setup
	@$(BIN)/sd35bench run experiment=claims
	@$(BIN)/sd35bench claims claims
	@$(BIN)/sd35bench tune study=tuned steps=4,8,16,28 cfg=1,2,4,7 prompts.limit=32
	@$(BIN)/sd35bench recommend tuned
	@$(BIN)/sd35bench run steps=8 cfg=4 prompts.limit=64 batch_size=16 study=main
	@$(BIN)/sd35bench run steps=4 cfg=4 prompts.limit=64 batch_size=16 study=branch
	@# Half of the steps lost: the gate must say 1, a regression.
	@$(BIN)/sd35bench compare main branch --policy quality --html results/branch/gate.html; test $$? = 1

bench: setup
	@$(BIN)/python kernels/bench/core_page.py $(if $(PARTS),--only $(PARTS))

bench-gpu: setup
	@$(BIN)/python kernels/bench/w8a8_linear.py --device cuda
	@$(BIN)/python kernels/bench/gpu_block.py
	@$(BIN)/sd35bench run experiment=gpu
	@$(BIN)/sd35bench show gpu
	@$(BIN)/sd35bench show gpu --markdown > results/tables/gpu.md

bench-gpu-rehearsal: setup
	@$(BIN)/python kernels/bench/gpu_block.py --rehearse
	@$(BIN)/sd35bench run experiment=gpu --dry-run
	@$(BIN)/sd35bench run -m experiment=gpu study=gpu-rehearsal model.layers=1 width=256 height=256 \
		backend=eager-bf16,compile-bf16,int8-bf16,int8-w8a8-bf16,onnx steps=1,2 prompts.limit=2
	@$(BIN)/sd35bench show gpu-rehearsal

test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -q

test-slow: setup
	$(BIN)/pytest -q -m 'slow and not gpu and not weights and not network'

validity: setup
	@$(BIN)/python -m tests.validity

reliability: setup
	$(BIN)/python -m tests.reliability

docs: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m tests.reference_page
	$(BIN)/mkdocs build --strict

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
	rm -rf $(VENV) build site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
