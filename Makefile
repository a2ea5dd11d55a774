# `make demo` and `make test` need Python >= 3.11 and make; they set up everything else in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: help demo test test-slow test-gpu test-timm lint bench figures wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/made: pyproject.toml
	@echo "== Setting up $(VENV): uv, then torch, timm, triton and the test tools (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(UV) --editable ".[test,notebooks]"
	@touch $@

# NATTEN is an oracle of the tests only; its build reads the installed torch and compiles nothing on a CPU machine.
$(VENV)/natten: $(VENV)/made
	@echo "== Installing NATTEN 0.21.7 as an outside reference"
	@$(UV) "setuptools>=77" wheel cmake ninja
	@$(UV) --no-build-isolation "natten==0.21.7"
	@touch $@

demo: $(VENV)/made ## what runs here, checked against float64 and timed side by side
	@echo "== Running the demo"
	@$(BIN)/dinat-triton demo

test: $(VENV)/natten ## the tests, under 10 minutes on two cores
	@echo "== Running the tests"
	@$(BIN)/python -m pytest

test-slow: $(VENV)/natten ## long sweeps
	@$(BIN)/python -m pytest -m "slow and not gpu"

test-gpu: $(VENV)/made ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu

lint: $(VENV)/made ## ruff and mypy
	@echo "== Linting"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/natten ## the CPU benchmark, side by side with its peers
	@$(BIN)/python bench/cpu.py

wheel: $(VENV)/made ## the wheel, in dist/
	@$(UV) build
	@$(BIN)/python -m build --wheel --installer uv

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info
