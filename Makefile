# Two commands to begin with: make demo, make test. Both set up .venv themselves and may be repeated; the demo's set-up
# is a part of the tests'.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SLIM   := $(VENV)/.ready-to-run
READY  := $(VENV)/.ready-to-test
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-warn-script-location
HEADS  := build/real-heads
export OMP_NUM_THREADS ?= 1 # steps this small lose by more threads, and tests run side by side

.PHONY: demo test test-all lint figures bench matrix clean

# A trained model that is too small to gain much, for its text; then real head counts with random weights, for the speed.
demo: $(SLIM)
	@echo "Two models, each with and without the patch, on one CPU thread: about a minute."
	@$(BIN)/qwen-fastdecode compare examples/checkpoints/qwen3_next-tiny \
		--prompts examples/checkpoints/prompts.txt --repeat 3
	@echo
	@$(BIN)/python examples/real_heads.py $(HEADS)
	@$(BIN)/qwen-fastdecode compare $(HEADS) --prompts examples/checkpoints/prompts.txt \
		--batch 8 --new-tokens 16 --repeat 3 --plot build/compare.png

# Three to four minutes on two cores: all but what is marked slow.
test: SELECTED = -m 'not slow'
test test-all: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(SELECTED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/figures.py --check

# Writes what README.md and docs/performance.md say of measurements from the committed results.
figures: $(READY)
	$(BIN)/python benchmarks/figures.py

# Every Transformers that is supported, each in an environment of its own under build/; writes docs/compatibility.md.
matrix: $(READY)
	$(BIN)/python tests/matrix/run.py $(MATRIX)

bench: $(READY)
	$(BIN)/python -m benchmarks.op.bench_op

$(SLIM): pyproject.toml constraints.txt
	@echo "Setting up $(VENV): minutes, most of them for downloading torch."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --constraint constraints.txt --editable '.[compare]'
	@touch $@

$(READY): $(SLIM)
	@echo "Adding what the tests need to $(VENV): a minute or two."
	@$(PIP) --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
