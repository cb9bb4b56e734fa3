# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types bench tables format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $(STAMP)

demo: $(STAMP)  ## train, export, predict and eval on photographs of coins
	$(BIN)/python -m fewshot_rt.benchmarks.demo

test: $(STAMP)  ## everything that runs without a GPU
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .

types: $(STAMP)  ## on the built wheel: the tree's folders are not where the package has them
	rm -rf build/types && mkdir -p build/types
	$(BIN)/python -m build --wheel --no-isolation --outdir build/types . >build/types/log
	$(BIN)/pip install --quiet --no-deps --target build/types/site build/types/*.whl
	cd build/types/site && ../../../$(BIN)/mypy --config-file ../../../pyproject.toml -p fewshot_rt

bench: $(STAMP)  ## latency of the latest run; adds a record to benchmarks/results/
	$(BIN)/fewshot-rt bench --results benchmarks/results

tables: $(STAMP)  ## the README's tables, from the records
	$(BIN)/python -m fewshot_rt.benchmarks.report README.md

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
