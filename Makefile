# make quickstart   patch, finetune, measure and run a small model, end to end
# make test         the whole test suite; ARGS="tests/hf_sparse -k measure" for a part
# make test-fast    without what takes seconds: for daily work, in under two minutes
# make lint         ruff and mypy
# make docs         the documentation site, in build/site (Python 3.11); a broken link or an unknown API name fails it
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
# Two processes; tests of one file stay together, for what they share.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
INTERPRETED := $(addprefix tests/triton_ops/test_gpu_,kernels.py certificate.py models.py trained_mlp.py)

.PHONY: quickstart test test-fast test-interpreter lint format docs setup clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/hf-sparse quickstart $(ARGS)

test: setup
	$(if $(ARGS),,$(MAKE) --no-print-directory test-interpreter)
	$(PYTEST) $(ARGS)

test-fast: setup
	$(PYTEST) -m "not slow" $(ARGS)

# The Triton kernels without a GPU.
test-interpreter: setup
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy training

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs-installed
	PYTHONPATH=docs $(BIN)/python -m website

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
