# On a bare machine with Python 3.11 every target makes the .venv it needs; nothing else is asked for.
#   make test PYTHON=python3.11          another interpreter
#   make test CONSTRAINTS=constraints-cuda.txt

PYTHON ?= python3
CONSTRAINTS ?= constraints-cpu.txt
PIP_FLAGS ?=
BIN := .venv/bin

# One thread per process: the distributed tests run several processes on the same cores.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all lint types clean
.SILENT:

help: ## this list
	awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/dev.stamp ## .venv with everything that development needs

demo: .venv/demo.stamp ## from benchmark files to a three-level report, on this CPU
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo/run.sh

test: .venv/dev.stamp ## all tests for the CPU but the long ones
	$(BIN)/pytest -rfEs -m "not gpu and not multigpu and not slow"

test-all: .venv/dev.stamp ## every test; those that need a GPU skip where there is none
	$(BIN)/pytest -rfEs

lint: .venv/dev.stamp ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev.stamp ## mypy
	$(BIN)/mypy

clean: ## remove what these targets made; runs/ stays
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/demo.stamp: extras := triton,demo
.venv/dev.stamp: extras := triton,demo,hf,dev

.venv/%.stamp: setup.py $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	echo "Installing .[$(extras)] with $(CONSTRAINTS) into .venv (a few minutes the first time) ..."
	$(BIN)/pip install -q $(PIP_FLAGS) -c $(CONSTRAINTS) -e ".[$(extras)]"
	touch $@
