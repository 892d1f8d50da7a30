# make demo    a real street image segmented by the shipped small Segmenter, AiluRus off and on
# make test    the whole test suite
# make tables  every table and figure of the paper that the data and weights here allow (TABLES_FLAGS=--list: only says which)
# make check   format, lint, types
# Each makes .venv first, from nothing but python3 and a package index, and keeps it until its ingredients change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a worker: two workers of two threads each on two cores are slower than one.
TEST_FLAGS ?= -n auto --maxprocesses 4

.PHONY: demo test tables check format clean
.DEFAULT_GOAL := test

# Written last, so an install that was cut off is done again.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[all,test]"
	# torchvision is built for CUDA on the package index: beside a CPU torch its operators do not load, and transformers
	# imports it where it sees it. So only the tests of detection and of timm look into this folder; without it they skip.
	-$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps --target $(VENV)/torchvision torchvision pycocotools timm
	@touch $@

demo: $(VENV)/.complete
	$(BIN)/python examples/segment_image.py

test: $(VENV)/.complete
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

tables: $(VENV)/.complete
	$(BIN)/python -m benchmarks.tables $(TABLES_FLAGS)

check: $(VENV)/.complete
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.complete
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo
