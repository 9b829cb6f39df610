# Each target does all its set-up: a virtual environment in .venv, installed again only when pyproject.toml changes.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test lint bench damage chaos

demo: $(INSTALLED)
	$(BIN)/keye-worker demo

# The chaos tests mostly wait: four at a time take no longer than the longest few.
test: $(INSTALLED)
	$(BIN)/pytest -q --ignore tests/chaos
	$(BIN)/pytest -q -n 4 --dist worksteal tests/chaos

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

damage: $(INSTALLED)
	DAMAGED_FILES=500 $(BIN)/pytest -q -s tests/integration/test_damage.py

# Mostly waiting, so all gates run side by side; every one has a server of its own.
chaos: $(INSTALLED)
	CHAOS=long $(BIN)/pytest -q -n 16 --dist worksteal --timeout 7200 tests/chaos

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
