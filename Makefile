# Everything runs inside .venv, which `make install` makes once and remakes when the pins change.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install train test test-all lint format docs clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "genjax needs Python 3.11 or newer, " + sys.executable + " is " + sys.version.split()[0])'
	@echo "installing into .venv (once, about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) -e ".[test,lint]"
	@touch $(STAMP)

.venv/installed-docs: $(STAMP)
	@$(PIP) -e ".[docs]"
	@touch $@

install: $(STAMP) ## make the environment in .venv

train: $(STAMP) ## train the VAE on real digits; says where pictures and metrics are
	@$(BIN)/python -m experiments.vae

# Most of the tests' time is compilation. XLA's optimiser and its newer code generator, which takes
# twice as long for a small program, are left out here, and in test-all they are not. Bytecode is
# kept even where the environment says otherwise: tests start processes.
test: export XLA_FLAGS := --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 \
	--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 \
	--xla_cpu_collective_call_terminate_timeout_seconds=600
test test-all: export PYTHONDONTWRITEBYTECODE :=
test: $(STAMP) ## the tests; a second run finds its compiled programs in .cache/jax
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-all: $(STAMP) ## the tests and the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "slow or not slow"

lint: $(STAMP) ## ruff and pyright
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

docs: .venv/installed-docs ## build the documentation, warnings are errors
	$(BIN)/python -m sphinx -W -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean: ## remove the environment and what was built
	rm -rf .venv .cache build dist docs/_build
