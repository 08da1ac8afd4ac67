# Every target makes .venv and installs what it needs; nothing but Python, pip, git and make must be there before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench keys clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/finetune demo

# One process for each core, each with one thread: what the tests compute is small, and most of their time is Python's.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

# After a change of a key, of its text or of what it takes; a test compares.
keys: $(READY)
	$(BIN)/finetune recipes --keys > docs/keys.md

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
