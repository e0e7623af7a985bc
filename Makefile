# Every target sets up .venv by itself. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS ?= 2
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint format docs bench bench-quick clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Chiasm needs Python 3.10 or newer; run make PYTHON=python3.x"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,video]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo

$(VENV)/.slow: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ray,clients]'
	@touch $@ $(VENV)/.dev $(VENV)/.demo

demo: $(VENV)/.demo ## train a small vision-language model on pictures, evaluate it, write runs/demo/report.html
	$(BIN)/chiasm demo

test: $(VENV)/.dev ## all tests, on CPU and without network
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) -m "not slow"

test-slow: $(VENV)/.slow ## the slower checks: the whole demo, the recipes on real data, Ray, other clients
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## make the generated pages of docs/ again
	$(BIN)/python -m chiasm.presets.page docs/presets

bench: $(VENV)/.dev ## measure against peers, about four hours; tables and JSON in benchmarks/results
	$(BIN)/python benchmarks/run.py

bench-quick: $(VENV)/.dev ## the smallest form of each benchmark, to see that it runs; results in runs/bench-quick
	$(BIN)/python benchmarks/run.py --quick

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
