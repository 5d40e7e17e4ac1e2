## SGPO: `make full-pipeline` goes from an untrained model to a measurably better one.
##
# The lines that begin with ## and the texts behind a target's ## are what `make help` prints.
# POSIX sh, GNU make; every target that needs .venv makes it first, or updates it when pyproject.toml or
# constraints.txt is newer. `exec`: a signal to make reaches the program, not only the shell around it.

PYTHON ?= python3
RECIPE ?= recipes/demo.yaml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made-for

export HF_HUB_DISABLE_TELEMETRY = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help full-pipeline test test-all lint format venv clean distclean moved

help: ## this list
	@sed -n 's/^## \{0,1\}//p' $(firstword $(MAKEFILE_LIST))
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf '\n%s\n' 'Variables: RECIPE=recipes/other.yaml, ARGS="-k name" (more for pytest), PYTHON=python3.12.'

full-pipeline: $(STAMP) ## the whole pipeline on the demo world, or on RECIPE=file; steps that are done are skipped
	@exec $(BIN)/sgpo run "$(RECIPE)"

# Many tests wait for processes, so two at a time are quicker also on few cores. A thread each, and whole files:
# what a file shares is made once.
test: $(STAMP) ## all tests but the slow ones
	@OMP_NUM_THREADS=1 exec $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(ARGS)

test-all: $(STAMP) ## all tests
	@OMP_NUM_THREADS=1 exec $(BIN)/python -m pytest $(ARGS)

lint: $(STAMP) ## rules (with the import border), format, types; changes nothing
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: $(STAMP) ## format and sort the code, repair what can be repaired
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

venv: $(STAMP) ## only .venv, ready to use

clean: ## remove caches and build leftovers; .venv and runs/ stay
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . \( -path ./$(VENV) -o -path ./runs -o -path ./.git \) -prune -o \
	  -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## clean, and remove .venv; runs/ stays
	rm -rf $(VENV)

# The stamp holds the directory it was made for: scripts in a copied or moved .venv point to the old place,
# so that is rebuilt. A .venv without a stamp is completed, an unusable one replaced.
# torch comes first, so that a CPU build is taken where pip is configured to find one.
$(STAMP): pyproject.toml constraints.txt $(if $(wildcard $(STAMP)),$(if $(filter-out x$(shell cat $(STAMP)),x$(CURDIR)),moved))
	@rm -f $@; set -e; \
	fits='import sys, pip; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$fits" 2>/dev/null; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not there)" >&2; \
	    echo "hint: name one, as in: make $(or $(MAKECMDGOALS),venv) PYTHON=python3.12" >&2; exit 2; }; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; \
	  rm -rf $(VENV); $(PYTHON) -m venv $(VENV); \
	fi; \
	torch=$$(grep '^torch==' constraints.txt); \
	if [ -t 1 ]; then quiet=; else quiet=-q; fi; \
	echo "installing $$torch (the first time, some minutes)"; \
	$(BIN)/python -m pip install $$quiet "$$torch"; \
	echo "installing sgpo and what else it needs"; \
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'; \
	printf '%s\n' "$(CURDIR)" > $@; \
	echo "$(VENV) is ready"

moved:
	@echo "$(VENV) was made for another directory: making a new one"; rm -rf $(VENV)
