# Everything sets itself up in .venv first. `make help` lists the commands.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# the first Python >= 3.11; another one: make book PYTHON=/path/to/python
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# more flags for pip, for instance an index with CPU builds of torch
PIP_ARGS ?=

PROFILE ?=
RECOMPUTE ?=
JOBS ?= 1
BUILD := $(PY) book/build.py --jobs $(JOBS) $(if $(PROFILE),-p profile $(PROFILE)) $(if $(RECOMPUTE),-p recompute $(RECOMPUTE))

.PHONY: help env book check test bench verify publish lock clean

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml requirements.lock
	@[ -n "$(PYTHON)" ] || { echo "error: no Python >= 3.11 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "setting up $(VENV) (once, and again when pyproject.toml or requirements.lock changes)"
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet $(PIP_ARGS) -r requirements.lock -e '.[all]'
	@touch $(READY)

env: $(READY) ## set up .venv

book: $(READY) ## run the chapters whose sources changed and build the page [PROFILE= RECOMPUTE=True JOBS=]
	@$(BUILD)

check: $(READY) ## count the pages, figures and executed cells of the built page [PROFILE=]
	@$(BUILD) --check

test: $(READY) ## run the tests [ARGS="-k on_policy"]
	@$(PY) -m pytest $(ARGS)

bench: $(READY) ## time against named baselines, as ratios
	@$(PY) -m benchmarks

verify: $(READY) ## recompute a random sample of the published runs and compare
	@$(PY) -m lib.verify

publish: $(READY) ## recompute a chapter's runs and store them under data/results: CHAPTER=on_policy PROFILE=cpu
	@[ -n "$(CHAPTER)" ] && [ -n "$(PROFILE)" ] || { echo "usage: make publish CHAPTER=on_policy PROFILE=cpu" >&2; exit 2; }
	@$(PY) -m lib.publish $(CHAPTER) --profile $(PROFILE)

lock: ## renew requirements.lock from pyproject.toml, in a scratch environment
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PYTHON) -m venv $$scratch \
	  && grep '^torch==' requirements.lock > $$scratch/keep.txt \
	  && $$scratch/bin/pip install --quiet $(PIP_ARGS) -r $$scratch/keep.txt && $$scratch/bin/pip install --quiet $(PIP_ARGS) -e '.[all]' \
	  && { sed -n '/^#/p' requirements.lock; $$scratch/bin/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > $$scratch/lock \
	  && cp $$scratch/lock requirements.lock

clean: ## remove the built book (not .venv, not the published results)
	rm -rf _build
