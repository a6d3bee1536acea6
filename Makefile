# Two commands matter: `make demo` and `make test`. Each sets everything up first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# What is installed: what the demo and the services need; the tools and what the tests need besides; what the slow tests need.
STAMP := $(VENV)/.setup-done
DEV_STAMP := $(VENV)/.setup-dev-done
SLOW_STAMP := $(VENV)/.setup-slow-done
SETUP = PYTHON="$(PYTHON)" VENV="$(VENV)" scripts/setup.sh
WORKERS ?= 2
# With compiled tests and services kept, whatever the environment says: hundreds of processes would compile them again.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS)
# One more than cores: the tests of `make test` wait for processes a fifth of their time.
FAST_WORKERS ?= $(shell expr $(WORKERS) + 1)
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install setup demo up test test-slow test-browser test-clients test-vllm check check-deploy format protos protos-check settings-docs bench train-demo clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

install: $(STAMP)  ## Create .venv with exact versions of what the services and the demo need (no-op when up to date)

setup: $(DEV_STAMP)  ## The same, with the tools of development and what the tests need

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@$(SETUP)
	@touch $@

$(DEV_STAMP): $(STAMP)
	@EXTRAS=dev $(SETUP)
	@touch $@

$(SLOW_STAMP): $(DEV_STAMP)
	@EXTRAS=dev,slow $(SETUP)
	@touch $@

demo: install  ## Start everything, ask two images eight questions each, check every answer
	@OMP_NUM_THREADS=$(WORKERS) $(BIN)/lookonce demo $(ARGS)

up: install  ## Start the three processes (ARGS="--model DIR --port 8000")
	@OMP_NUM_THREADS=$(WORKERS) $(BIN)/lookonce up $(ARGS)

test: setup  ## The test suite (under 6 minutes on 2 cores)
	@$(PYTEST) -n $(FAST_WORKERS) -m "not slow and not browser and not vllm" $(ARGS)

test-slow: $(SLOW_STAMP)  ## The sweeps that `make test` leaves out (installs Ray and servers for buckets first)
	@$(PYTEST) -m "slow and not browser and not vllm" --timeout 1800 $(ARGS)

test-browser: setup  ## The playground in a real Chromium (Debian: apt-get install chromium; or CHROMIUM=path)
	@$(PYTEST) -m browser $(ARGS)

test-clients: setup  ## Other people's clients (installs each into .clients first; ARGS="-k langchain" for one)
	@LOOKONCE_TEST_CLIENTS=all $(BIN)/python -m pytest -s tests/clients $(ARGS)

test-vllm: setup  ## vLLM as our engine, and a stock vLLM server over our store (makes .venv-vllm first: 2.5 GB, three minutes)
	@scripts/setup_vllm.sh
	@scripts/test_in_vllm.sh tests/engine/test_any_engine.py tests/vllm/inside
	@LOOKONCE_LM_TENSOR_PARALLEL=2 VLLM_CPU_OMP_THREADS_BIND="0|1" scripts/test_in_vllm.sh tests/engine/test_any_engine.py
	@$(BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

check: setup  ## Lint, formatting, types, who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup  ## Format the code and sort imports
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check-deploy: setup  ## Hold every file of deploy/ to its schema, our rules and the services' settings
	@$(BIN)/python -m deploy.check

protos: setup  ## Generate the gRPC stubs
	@$(BIN)/python scripts/protos.py

protos-check: setup  ## Fail unless the committed stubs are what protos/ generates, byte for byte
	@$(BIN)/python scripts/protos.py --check

settings-docs: setup  ## Write docs/settings.md from the settings classes
	@$(BIN)/python -m lookonce.cli.settings_page > docs/settings.md

bench: setup  ## All benchmarks (ratios within one run; results in benchmarks/results)
	@OMP_NUM_THREADS=2 $(BIN)/python -m benchmarks $(ARGS)

train-demo: install  ## Train the bundled shapes checkpoint again, from nothing (hours)
	@OMP_NUM_THREADS=$(WORKERS) $(BIN)/python -m training.shapes $(ARGS)

clean:  ## Remove the virtual environment, caches and build output
	@rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/results
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
