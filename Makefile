# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types bench gpu gpu-trt tables format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,demo]'
	touch $(STAMP)

demo: $(STAMP)  ## train, export, predict and eval on photographs of coins
	$(BIN)/python -m fewshot_rt.benchmarks.demo

# One process a core, each with one thread: two pools of threads on the same cores wait for each other.
test: $(STAMP)  ## everything that runs without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope

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

# Checks, then measures on a GPU; REHEARSE=1 runs the same on the CPU at tiny sizes. The package is
# linked together in build/site, so that it also runs where nothing can be installed: there, BARE=1
# takes the Python at hand. ARGS: further options, such as ARGS='--only attention --results FOLDER',
# or, where minutes count, ARGS=--at-once: parts compile side by side, and are measured in turns.
SITE := build/site/fewshot_rt
gpu: $(if $(BARE),,$(STAMP))
	rm -rf build/site && mkdir -p $(SITE)
	ln -s $(CURDIR)/fewshot_rt/* $(addprefix $(CURDIR)/,kernels export cli benchmarks) $(SITE)
	cd build/site && $(if $(BARE),$(PYTHON),../../$(BIN)/python) -m fewshot_rt.benchmarks.gpu \
		$(if $(REHEARSE),--rehearse,--results $(CURDIR)/benchmarks/results) $(ARGS)

gpu-trt: $(STAMP)  ## builds, verifies and times TensorRT engines; REHEARSE=1 does what needs none
	$(BIN)/python -m fewshot_rt.benchmarks.gpu_trt $(if $(REHEARSE),--rehearse) $(ARGS)

tables: $(STAMP)  ## the README's tables, from the records
	$(BIN)/python -m fewshot_rt.benchmarks.report README.md

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
