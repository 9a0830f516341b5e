# Every target prepares .venv by itself when it is missing or older than the two files that describe it: for the demo what
# the package needs, for everything else the extras as well.

PYTHON ?= python3
ARGS   ?=

VENV  := .venv
BIN   := $(VENV)/bin
BASE  := $(VENV)/.base
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip --disable-pip-version-check -qq

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-hosts lint format wheel clean

help:  ## list the targets
	@echo "make TARGET [PYTHON=python3] [ARGS='more arguments for pytest or the demo']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# PyTorch goes first and alone: whichever build of it the machine offers (CPU or CUDA) is then settled for the rest.
# Nothing is compiled beforehand but what a first import reads, since most of PyTorch is never imported.
$(BASE): pyproject.toml constraints.txt
	@echo "install: preparing $(VENV) with the pinned packages"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-compile -c constraints.txt torch
	@$(PIP) install --no-compile -c constraints.txt -e .
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -c 'import unilip.demo, unilip.model'
	@touch $@

$(STAMP): $(BASE)
	@echo "install: adding the packages of all extras (a few minutes the first time)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(BASE)  ## let the embedded model answer, draw, edit and reconstruct; pictures go to demo/
	@echo "demo: running the embedded model, pictures go to demo/"
	@$(BIN)/unilip demo --output demo $(ARGS)

test: $(STAMP)  ## run the tests, without the slow ones, in two processes
	@echo "test: running the tests, without the slow ones"
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## run the slow tests only
	@echo "test-slow: running the slow tests"
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-hosts: $(STAMP)  ## run real clients and evaluation kits, which it installs, against this package
	@echo "test-hosts: installing real clients into environments of their own and running them"
	@$(BIN)/python -m pytest -m hosts tests/hosts/run_*.py $(ARGS)

lint: $(STAMP)  ## check style, layout and types; change nothing
	@echo "lint: ruff (rules and layout), import contracts, then mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/mypy

format: $(STAMP)  ## sort imports, apply safe fixes and lay the code out
	@echo "format: applying safe fixes and the layout"
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

wheel: $(STAMP)  ## build a wheel, embedded model included, into dist/
	@echo "wheel: building into dist/"
	@$(PIP) wheel --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

clean:  ## remove what building, testing and the demo left; keep .venv and runs/
	@echo "clean: removing build outputs, caches and demo/"
	@rm -rf build dist demo src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
