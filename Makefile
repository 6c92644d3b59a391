# `make throughput`, `make test` and `make test-slow` do everything from nothing: they make .venv, install, and run.
#
#   PYTHON=python3.12          the interpreter to make .venv with
#   TORCH="torch==2.11.*"      another torch than the newest
#   PYTEST_ARGS="-k se_gate"   arguments of pytest
#   THROUGHPUT_ARGS="--help"   arguments of benchmarks/throughput.py
#   PIP_ARGS=                  show what pip does, not only its errors

PYTHON ?= python3
TORCH ?= torch
PYTEST_ARGS ?= -q -n 2 --dist worksteal --durations=15
THROUGHPUT_ARGS ?=
PIP_ARGS ?= -qq

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS)
STAMP := .venv/.installed

# The stamp is written last, so a broken installation is resumed; it holds the torch that was asked for.
ifneq ($(shell cat $(STAMP) 2> /dev/null),$(TORCH))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml setup.py $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "t2t_fast needs Python 3.11 or newer, and $(PYTHON) is not: try 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	@rm -f $@
	@echo "[1/3] making .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "[2/3] installing $(TORCH) and torchvision: a few gigabytes, one to several minutes"
	@$(PIP) "$(TORCH)" torchvision "setuptools>=77" wheel ninja
	@echo "[3/3] installing t2t_fast, editable, with its C++/CUDA extension where it can be built, and its tools"
	@$(PIP) --no-build-isolation --editable ".[dev]"
	@echo "$(TORCH)" > $@

.PHONY: help install throughput test test-slow lint types format clean

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with everything in it

throughput: $(STAMP) ## measure images per second against timm and the original formulation
	@echo "measuring throughput"
	@$(BIN)/python benchmarks/throughput.py $(THROUGHPUT_ARGS)

test: lint ## ruff, mypy and all tests but the slow ones
	@echo "running the tests; those marked slow are deselected: make test-slow runs them"
	@$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-slow: $(STAMP) ## the tests marked slow: they compile, package or start many processes
	@echo "running the tests marked slow"
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lint: types ## ruff and mypy only
	@echo "checking style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy sees the package as it is installed, with kernels/ inside.
types: $(STAMP) ## mypy only
	@echo "checking types"
	@rm -rf build/types && mkdir -p build/types/t2t_fast
	@ln -s "$(CURDIR)"/t2t_fast/* "$(CURDIR)/kernels" build/types/t2t_fast/
	@$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, builds and caches
	@rm -rf .venv build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache t2t_fast/_C.*
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
