# PrismPrune. Needs Python 3.11 or newer and a package index; `make` alone lists the targets.
#
#   PYTHON=python3.12    the interpreter that the virtual environment is made with
#   PIP_ARGS="..."       options for pip: another index, or one with CPU-only builds of torch
#   PYTEST_ARGS="..."    options for pytest
#   CHAOS_ARGS="..."     options for the chaos tests: --jobs 200 --outage-s 10, --keep FILE to go on later
#   PRISM_PORT=8001      and the other settings of docs/settings.md

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
CHAOS_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) --editable

.DEFAULT_GOAL := help
.PHONY: help serve test check bench chaos clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(VENV)/.serve ## install once, then run broker, worker and front end on http://127.0.0.1:8000
	@exec $(BIN)/python -m service.serve --end-with-parent

test: $(VENV)/.dev ## install once, fetch the demo model once, then run every test that needs no GPU
	$(BIN)/python -m prismprune demo fetch
	$(BIN)/python -m pytest -m "not gpu" $(PYTEST_ARGS)

check: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev ## time selection, and the demo model at several token budgets, on this machine
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.latency

chaos: $(VENV)/.dev ## kill, freeze and overload a running service for an hour; writes docs/reliability.md
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

clean: ## remove the virtual environment and tool caches; the demo model's cache stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

# A stamp is younger than what it was installed from, so the next start installs nothing.
$(VENV)/.serve $(VENV)/.dev: $(VENV)/.%: $(BIN)/python pyproject.toml constraints.txt
	@echo 'Installing .[$*] into $(VENV): once, a few minutes and, with the usual build of torch, some 6 GB'
	$(INSTALL) '.[$*]'
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) > /dev/null || \
		{ echo '$(PYTHON) is not installed. Name a Python of 3.11 or newer: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "PrismPrune needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
