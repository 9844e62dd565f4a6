# Every target sets up .venv by itself; the second time that is a no-op.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "instseg needs Python >= 3.11, got " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	VIRTUAL_ENV=.venv $(BIN)/uv pip sync --quiet requirements.lock
	VIRTUAL_ENV=.venv $(BIN)/uv pip install --quiet --no-deps --build-constraints requirements.lock --editable .
	touch $@

demo: .venv/.installed
	$(BIN)/python workflows/demo.py

test: .venv/.installed
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/.installed
	$(BIN)/python benchmarks/bench_crf.py
	$(BIN)/python benchmarks/bench_storage.py

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
