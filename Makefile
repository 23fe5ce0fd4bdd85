# Every target starts from a fresh clone with nothing but Python >= 3.10 and pip: the first one that needs it makes .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
SHELL := /bin/bash

.PHONY: help venv demo test test-slow lint bench gpu clean

help:
	@echo "make demo       train, distil, sample and measure on digits; writes outputs/demo/report.html"
	@echo "make test       the tests without the slow ones"
	@echo "make test-slow  trainings that reach a published figure"
	@echo "make lint       ruff, formatting, types"
	@echo "make bench      every script of benchmarks/, held against its bounds"
	@echo "make gpu        checks, kernels' tests and measurements on a CUDA device, in one table"
	@echo "make venv       only create $(VENV); re-created when pyproject.toml changes"
	@echo "make clean      remove $(VENV) and everything that was built; outputs/ stays"

venv: $(STAMP)

# Debian's Python comes without ensurepip; its pip can put another pip into an environment that lacks one. The pip that
# comes with a Python may be too old for editable installs, hence the upgrade. No quiet flag on a terminal: it is long.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python >= 3.10 is needed, $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12 ..." if v < (3, 10) else 0)'
	@echo "Installing into $(VENV): about 6 GB on Linux (PyTorch with CUDA), once, some minutes"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@$(BIN)/python -m pip install -q --upgrade pip
	@$(BIN)/python -m pip install $(if $(CI),-q) -e '.[eval,train,dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/genkit demo

# A process a core; files stay together, since what they set up is theirs.
PYTEST = $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: $(STAMP)
	@$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	@$(PYTEST) -m slow

# Type checkers cannot follow the mapping of top-level folders, so they get a tree of links in which it has happened.
lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@rm -rf .typing && mkdir -p .typing/genkit
	@ln -s $(CURDIR)/genkit/* $(CURDIR)/pipelines $(CURDIR)/training $(CURDIR)/eval $(CURDIR)/configs .typing/genkit/
	@cd .typing && "$(abspath $(BIN))/mypy" --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p genkit

# All of them run, also after one that misses its bound.
bench: $(STAMP)
	@failed=; for script in benchmarks/[a-z]*.py; do \
		echo "== $$script"; $(BIN)/python $$script --check || failed="$$failed $$script"; \
	done; test -z "$$failed" || { echo "missed their bounds:$$failed"; exit 1; }

gpu: $(STAMP)
	@$(BIN)/python benchmarks/gpu/run.py

clean:
	@rm -rf $(VENV) .typing build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
