# Two commands to begin with: make demo, make test. Both set up .venv themselves and may be repeated.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1 # steps this small lose by more threads, and tests run side by side

.PHONY: demo test test-all lint bench matrix clean

demo: $(READY)
	$(BIN)/qwen-fastdecode compare examples/checkpoints/qwen3_next-tiny \
		--prompts examples/checkpoints/prompts.txt --plot build/compare.png

# Within four minutes on two cores: all but what is marked slow.
test: SELECTED = -m 'not slow'
test test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(SELECTED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every Transformers that is supported, each in an environment of its own under build/; writes docs/compatibility.md.
matrix: $(READY)
	$(BIN)/python tests/matrix/run.py $(MATRIX)

bench: $(READY)
	$(BIN)/python -m benchmarks.op.bench_op

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
