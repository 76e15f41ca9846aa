# hookd: `make help` lists the targets. Everything lives in .venv and .hookd; nothing is installed elsewhere.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help run demo test bench torture lint lock clean

help: ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.run ## start hookd with config.toml (embedded PostgreSQL, console on http://127.0.0.1:8440)
	$(BIN)/hookd run --config config.toml

demo: $(VENV)/.run ## receivers good and bad, and what hookd does about each
	$(BIN)/hookd demo

test: $(VENV)/.dev ## the whole test suite
	$(BIN)/python -m pytest -q -n 3 --dist loadgroup $(ARGS)

bench: $(VENV)/.bench ## the load scripts (up to 15 minutes); a report with plots in .bench
	$(BIN)/python bench/all.py $(ARGS)

torture: $(VENV)/.bench ## daemons and PostgreSQL killed under load, hours of it; ARGS="--short", "--resume"; a report in .bench
	$(BIN)/python bench/torture.py $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: ## renew the lock files from pyproject.toml (needs uv)
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra embedded --extra docs pyproject.toml build.in -o requirements.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra embedded --extra docs --extra test --extra lint pyproject.toml build.in -o requirements-dev.lock
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra embedded --extra docs --extra bench -c requirements-dev.lock pyproject.toml build.in -o requirements-bench.lock

clean: ## remove .venv and caches (not .hookd, which holds data)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "hookd needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "python venv is missing; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }

# One set-up for both: pip with hashes is the floor, uv (fifteen times faster) where it is on PATH.
$(VENV)/.run: requirements.lock pyproject.toml | $(VENV)/bin/python
	@sh .ci/install $(VENV) requirements.lock
	@touch $@

$(VENV)/.dev: requirements-dev.lock pyproject.toml | $(VENV)/bin/python
	@sh .ci/install $(VENV) requirements-dev.lock
	@touch $@ $(VENV)/.run

$(VENV)/.bench: requirements-bench.lock pyproject.toml | $(VENV)/bin/python
	@sh .ci/install $(VENV) requirements-bench.lock
	@touch $@ $(VENV)/.run
