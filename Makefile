# `make demo` and `make test` need Python >= 3.11 and make; they set up everything else in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled at once, because many tests start processes, and all of these import torch and timm.
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python
# Processes side by side: threads that spin while they wait would only take each other's cores.
QUIET := OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0
# This machine's folder in bench/results/.
RESULTS = $(shell $(BIN)/python -c 'import torch; from dinat_triton.bench import harness; print(harness.results_folder(torch.device("cpu")))')

.PHONY: help demo test test-slow test-timm test-gpu mutants lint bench figures notebooks wheel hub clean

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
	@echo "== Naming what a picture shows with dinat_mini; without a network its weights are random, and it says so"
	@$(BIN)/dinat-triton classify --or-random

test: $(VENV)/natten ## the tests, under 6 minutes on two cores
	@echo "== Running the tests: two processes, one thread each"
	@$(QUIET) $(BIN)/python -m pytest -n 2 --ignore=tests/kernels
	@echo "== Running the Triton kernels under the interpreter"
	@$(QUIET) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/kernels

test-slow: $(VENV)/natten ## long sweeps
	@$(QUIET) $(BIN)/python -m pytest -n 2 --ignore=tests/kernels -m "slow and not gpu"

test-timm: $(VENV)/made ## timm's own model tests over all models
	@$(QUIET) $(BIN)/python tests/timm_contract.py

test-gpu: $(VENV)/made ## the tests that need a GPU
	@$(BIN)/python -m pytest -m gpu

mutants: $(VENV)/natten ## plants bugs, and shows which test catches each
	@$(QUIET) $(BIN)/python tests/mutants.py

lint: $(VENV)/made ## ruff and mypy
	@echo "== Linting"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/natten ## the benchmarks of this machine's CPU and the figures drawn of them, under 10 minutes on two cores
	@echo "== Layers side by side with their peers, most of the time to compile FlexAttention"
	@$(BIN)/dinat-triton bench cpu --force --out "$(RESULTS)/cpu.json"
	@echo "== Whole models side by side with timm's, and where their steps go"
	@$(BIN)/dinat-triton bench models --device cpu --force --out "$(RESULTS)/models.json"
	@$(BIN)/dinat-triton bench profile --device cpu --force --out "$(RESULTS)/profile.json"
	@echo "== Python per call"
	@$(BIN)/dinat-triton bench overhead --seconds 0.3 --force --out "$(RESULTS)/overhead.json"
	@echo "== Layers against what the machine allows, and against an H200 on paper"
	@$(BIN)/dinat-triton roofline --results "$(RESULTS)/cpu.json" --force --out "$(RESULTS)/roofline.json"
	@$(BIN)/dinat-triton roofline --arch sm_90 --force --out bench/results/offline/roofline-sm_90.json
	@$(BIN)/python notebooks/figures.py

figures: $(VENV)/made ## the pictures of this README
	@$(BIN)/python notebooks/figures.py

notebooks: $(VENV)/made ## run the notebooks and store their outputs
	@$(BIN)/python notebooks/execute.py

wheel: $(VENV)/made ## the wheel, in dist/
	@$(BIN)/uv build --wheel --quiet && ls dist/*.whl

hub: $(VENV)/made ## the attention as a folder for kernels.get_kernel, in build/hub/
	@$(BIN)/python -m dinat_triton.integrations.hub build/hub

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info
