# Every target first makes .venv and installs all packages into it. Only Python, pip, git and make must be installed before.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo engines runtimes-env runtimes test check bench gpu keys faults clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/finetune demo

# Environments in which other programs open what the kit exports; they lie in the user's cache.
runtimes-env: $(READY)
	$(BIN)/python tests/runtimes/environments.py

# The same with vLLM, whose environment takes 3.4 GB, and all tests in them.
runtimes: $(READY)
	$(BIN)/python tests/runtimes/environments.py all
	FINETUNE_RUNTIMES_REQUIRED=all $(BIN)/python -m pytest --numprocesses 0 tests/runtimes

# Two processes on the CPU under each engine, DeepSpeed included. It takes about five minutes.
engines: $(READY)
	$(BIN)/python tests/runtimes/environments.py deepspeed
	FINETUNE_ENGINES=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 0 -s tests/engines

# One process for each core (at most 4), each with one thread, because the tests compute little and spend most of their time in Python.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	for file in $(filter-out benchmarks/gpu_wheels.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

# Without an NVIDIA GPU it says so and measures nothing.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

# Inject faults into everything that writes files, and write docs/reliability.md anew. It takes hours: TRIES=20 takes twenty places of
# each kind. faults.py --help: one kind, or one fault, at a time, added to the results of earlier calls.
TRIES ?= 0
faults: $(READY)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/faults/faults.py --kills $(TRIES) --tries $(TRIES) \
		--results tests/faults/results.json --report docs/reliability.md

# Write the generated pages anew after a change of a key, its text or its values, of a verb, or of the list of guides. Tests compare them.
keys: $(READY)
	$(BIN)/finetune recipes --keys > docs/keys.md
	$(BIN)/finetune recipes --agents > AGENTS.md
	$(BIN)/python docs/write_llms.py

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
