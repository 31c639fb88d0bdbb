# make demo   train a small Qwen on real text and sample from it
# make align-demo  the stages of alignment in small
# make test   the whole test suite
# make check  lint and types
# make parity compare with PyTorch and transformers
# make bench  side by side with PyTorch

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo align-demo test check parity bench

# One stamp per set of extras: installed once, and again when the dependencies change.
$(VENV)/core: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/core
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/parity: $(VENV)/test
	$(BIN)/pip install --quiet --editable '.[parity]'
	touch $@

demo: $(VENV)/core
	$(BIN)/python -m train configs/quickstart.gin
	$(BIN)/python -m infer generate runs/quickstart --prompt 'def ' --prompt 'import ' --prompt 'class ' --max-new-tokens 160 --temperature 0.6 --seed 0

align-demo: $(VENV)/core
	$(BIN)/python benchmarks/align_demo.py

test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

parity: $(VENV)/parity
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/parity

bench: $(VENV)/parity
	$(BIN)/python benchmarks/train_cpu.py
	$(BIN)/python benchmarks/moe_cpu.py
	$(BIN)/python benchmarks/generate_cpu.py
	$(BIN)/python benchmarks/serve_cpu.py
	$(BIN)/python benchmarks/convert.py
