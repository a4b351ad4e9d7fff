# `make demo` and `make test` set everything up themselves; the rest is for people who work on the code.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Your own chats instead of the digits: make demo DATA=chats.jsonl [HELDOUT=heldout.jsonl]
DATA ?=
HELDOUT ?=
DEMO_ARGS ?=
PIPELINE_ARGS ?=
# Tests start ranks of their own: two of these fill two cores and more.
TEST_WORKERS ?= 2

# One thread a rank: ranks times threads beyond the cores stall in OpenMP's spinning.
export OMP_NUM_THREADS ?= 1
# DeepSpeed's compiled ops live here and not in a folder shared with other environments, where a
# killed build's lock would hang every later run without a word.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.torch_extensions
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo pipeline faults test lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt requirements-dev.txt constraints.txt VERSION $(wildcard packages/*/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: PYTHON: must be Python 3.11 or newer, got $$($(PYTHON) --version); run make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	@touch $@

demo: setup
	$(BIN)/python tools/demo.py $(if $(DATA),--data $(DATA)) $(if $(HELDOUT),--heldout $(HELDOUT)) $(DEMO_ARGS)

# Align, pretrain, fine-tune, average, search, experts; goes on where it was cut. make pipeline PIPELINE_ARGS=--dry-run
pipeline: setup
	$(BIN)/triptych run recipes/mindvl_tiny.yaml $(PIPELINE_ARGS)

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Kills, damage, full disks, hangs: writes RELIABILITY.md.
faults: setup
	$(BIN)/python tools/faults.py --mutations --output RELIABILITY.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs demo .torch_extensions .pytest_cache .mypy_cache .ruff_cache
