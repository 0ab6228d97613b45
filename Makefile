# From a fresh clone: `make demo` sets up and shows the tool at work, `make test` sets up and checks it.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test lint format docs readme parity clean

help:
	@echo "make setup    Python environment in $(VENV) with the package, its tests and its docs tools"
	@echo "make demo     train on embedded images for a few minutes, evaluate, write a report"
	@echo "make test     all tests"
	@echo "make lint     style, formatting and types"
	@echo "make docs     build the site into site/"
	@echo "make readme   bring the table of methods in README.md up to date"
	@echo "make parity GOLDEN=FOLDER   check the golden cases below FOLDER"
	@echo "make clean    remove what was built (not $(VENV), not runs/)"

setup: $(READY)

# Runs again only when pyproject.toml changes; an interrupted installation leaves no stamp and starts over.
$(READY): pyproject.toml
	@rm -f $@
	@python=""; \
	for candidate in python3.12 python3.11 python3.13 python3 python; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "Counterpoint needs Python 3.11 or newer, and none was found on the PATH." >&2; exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  rm -rf $(VENV); \
	  "$$python" -m venv $(VENV) || { \
	    echo "$$python cannot make a virtual environment: install its venv module (python3-venv) and try again." >&2; \
	    rm -rf $(VENV); exit 1; }; \
	fi
	@echo "installing Counterpoint into $(VENV): several GB of packages the first time, 2 to 5 minutes"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs]'
	@touch $@

demo: setup
	@$(BIN)/counterpoint demo

# One thread per operation: the tests are many small ones, and several processes share the cores.
test: setup
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest $(ARGS)

lint: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy

format: setup
	@$(BIN)/python -m ruff check --fix .
	@$(BIN)/python -m ruff format .

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html is ready"

# The table of methods in README.md, from the registry and the records.
readme: setup
	@$(BIN)/python tools/readme.py

parity: setup
	@if [ -z "$(GOLDEN)" ]; then echo "say where the golden cases are: make parity GOLDEN=FOLDER" >&2; exit 2; fi
	@$(BIN)/counterpoint parity "$(GOLDEN)"

clean:
	rm -rf site dist build .pytest_cache .mypy_cache .ruff_cache
