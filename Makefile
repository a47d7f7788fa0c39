# Everything sets itself up in .venv first. `make help` lists the commands.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# The packages install on these; the first that is there is taken, else a later one, which is not
# tested. Another: make book PYTHON=/path/to/python
PYTHONS := 3.11 3.12
PYTHON ?= $(shell for p in $(PYTHONS:%=python%) python3; do \
  $$p -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' \
  2>/dev/null && echo $$p && break; done)
NO_PYTHON := error: no Python >= 3.11 that can make an environment. Debian and Ubuntu: \
  apt install python3-venv. Or name one: make PYTHON=/path/to/python
# More flags for pip. On Linux the locked torch is the CUDA build of several GB; who has no GPU passes the
# address of the CPU wheels from PyTorch's installation page: PIP_ARGS="--extra-index-url ADDRESS"
PIP_ARGS ?=

PROFILE ?=
RECOMPUTE ?=
JOBS ?= 1
# make passes a misspelt variable over in silence
OWN := VENV PYTHON PIP_ARGS PROFILE RECOMPUTE JOBS CHAPTER ARGS
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
$(foreach v,$(filter-out $(OWN),$(GIVEN)),$(info note: $v is none of this Makefile's: $(OWN)))
BUILD := $(PY) book/build.py --jobs $(JOBS) $(if $(PROFILE),-p profile $(PROFILE)) $(if $(RECOMPUTE),-p recompute $(RECOMPUTE))

.PHONY: help env book check test bench verify publish lock clean
# `check` reads what `book` writes
.NOTPARALLEL:

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml requirements.lock
	@echo "setting up $(VENV) (once, and again when pyproject.toml or requirements.lock changes)"
	@# without pip it is what an interrupted set-up left behind
	@$(PY) -m pip --version >/dev/null 2>&1 || { python="$(PYTHON)"; \
	  [ -n "$$python" ] || { echo "$(NO_PYTHON)" >&2; exit 1; }; \
	  "$$python" -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "error: $$python cannot make $(VENV). Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@$(PY) -m pip install --quiet $(PIP_ARGS) -r requirements.lock -e '.[all]'
	@touch $(READY)

env: $(READY) ## set up .venv

book: $(READY) ## run the chapters whose sources changed and build the page [PROFILE= RECOMPUTE=True; JOBS= chapters at once, if nothing is computed]
	@[ -z "$(CHAPTER)" ] || { echo "error: make book runs every chapter; one alone: $(VENV)/bin/papermill book/$(CHAPTER).ipynb out.ipynb" >&2; exit 2; }
	@$(BUILD)

check: $(READY) ## count the pages, figures and executed cells of the built page [PROFILE=]
	@$(BUILD) --check

test: $(READY) ## run the tests [ARGS="-k on_policy"]
	@$(PY) -m pytest $(ARGS)

bench: $(READY) ## time against named baselines, as ratios [ARGS="--quick store"]
	@$(PY) -m benchmarks $(ARGS)

verify: $(READY) ## recompute a random sample of the published runs and compare [ARGS="--chapter on_policy"]
	@$(PY) -m lib.verify $(ARGS)

publish: $(READY) ## recompute a chapter's runs and store them under data/results: CHAPTER=on_policy PROFILE=cpu [ARGS="--jobs 1"]
	@[ -n "$(CHAPTER)" ] && [ -n "$(PROFILE)" ] || { echo "usage: make publish CHAPTER=on_policy PROFILE=cpu" >&2; exit 2; }
	@$(PY) -m lib.publish $(CHAPTER) --profile $(PROFILE) $(ARGS)

lock: ## renew requirements.lock from pyproject.toml, in a scratch environment
	@scratch=$$(mktemp -d) && trap 'rm -rf "$$scratch"' EXIT && $(PYTHON) -m venv $$scratch \
	  && grep '^torch==' requirements.lock > $$scratch/keep.txt \
	  && $$scratch/bin/pip install --quiet $(PIP_ARGS) -r $$scratch/keep.txt && $$scratch/bin/pip install --quiet $(PIP_ARGS) -e '.[all]' \
	  && { sed -n '/^#/p' requirements.lock; $$scratch/bin/pip freeze --exclude-editable | sed 's/+cpu$$//'; } > $$scratch/lock \
	  && cp $$scratch/lock requirements.lock

clean: ## remove the built book (not .venv, not the published results)
	rm -rf _build
