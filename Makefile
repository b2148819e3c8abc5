# `make demo`, `make test`, `make check` and `make bench` need no other step on a new machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8080
OPSENTRY_DEMO_DIR ?= .opsentry

.PHONY: demo test unit check prose reference faults bench schema lock format clean

$(VENV)/.demo: requirements/demo.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/demo.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@touch $@

demo: $(VENV)/.demo
	@exec env PORT="$(PORT)" OPSENTRY_DEMO_DIR="$(OPSENTRY_DEMO_DIR)" $(BIN)/python -m opsentry demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not faults" $(ARGS)

# Every test that needs no server and no process: a few seconds.
unit: $(VENV)/.dev
	$(BIN)/python -m pytest -m unit $(ARGS)

faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m faults -s $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.reference --check
	@$(MAKE) --no-print-directory prose

# Checks wording and spelling: banned phrases, long sentences in docs, typing errors.
prose: $(VENV)/.dev
	@$(BIN)/python tools/check_prose.py
	@$(BIN)/codespell

# Writes the generated parts of the API reference.
reference: $(VENV)/.dev
	@$(BIN)/python -m tools.reference
	@WRITE_EXAMPLES=1 $(BIN)/python -m pytest -q tests/api/test_examples.py

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

schema: $(VENV)/.dev
	$(BIN)/python -m tools.dump_schema

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Lock files hold names, versions and hashes only: no download address.
lock:
	uv pip compile pyproject.toml --extra build --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/server.txt
	uv pip compile pyproject.toml --extra embedded --extra build --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/demo.txt
	uv pip compile pyproject.toml --extra embedded --extra build --extra dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/dev.txt
	uv pip compile bench/peers.in --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header -o requirements/bench.txt

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .pytest_cache .ruff_cache .hypothesis
