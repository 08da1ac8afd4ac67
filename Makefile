# Every target first makes .venv and installs all packages into it. Only Python, pip, git and make must be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench keys faults clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/finetune demo

# One process for each core (at most 4), each with one thread, because the tests compute little and spend most of their time in Python.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

# Inject faults into everything that writes files, and write docs/reliability.md anew. It takes hours: TRIES=20 takes twenty places of each kind.
TRIES ?= 0
faults: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py --tries $(TRIES) --report docs/reliability.md

# Write docs/keys.md anew after a change of a key, its text or its values. A test compares the page with the code.
keys: $(READY)
	$(BIN)/finetune recipes --keys > docs/keys.md

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
