# make demo    a real street image segmented by the shipped small Segmenter, AiluRus off and on
# make test    the whole test suite
# make test-oldest, test-newest    the suite with the oldest versions allowed, and with the newest of the package index
# make tables  every table and figure of the paper that the data and weights here allow (TABLES_FLAGS=--list: only says which)
# make tables-gpu  every row of them that needs a GPU and no weights, in under 30 minutes (GPU_PYTHON: an environment that has
#              torch for it, instead of .venv; TABLES_FLAGS="--device cpu --tiny": a dry run)
# make docs    the documentation as a site, in site/
# make check   format, lint, types, and the documentation with warnings as errors
# Each makes .venv first, from nothing but python3 and a package index, and keeps it until its ingredients change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One thread a worker: two workers of two threads each on two cores are slower than one.
TEST_FLAGS ?= -n auto --maxprocesses 4

.PHONY: demo docs test test-oldest test-newest tables tables-gpu check format clean
.DEFAULT_GOAL := test

# Written last, so an install that was cut off is done again.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[all,app,test]"
	# Does the index's torchvision fit this torch? Beside a torch from elsewhere its operators do not load, and transformers
	# imports it where it sees it. So it is tried in a folder beside the environment, and stays there where it does not fit:
	# only the tests of detection, timm and controlnet-aux look into it. Without it they skip.
	-$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt --no-deps --target $(VENV)/torchvision \
		torchvision pycocotools timm controlnet-aux einops
	if $(BIN)/python tests/helpers/torchvision_ops.py; then \
		$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[all,app,video,detection,test]" timm && \
		rm -rf $(VENV)/torchvision; \
	fi
	@touch $@

demo: $(VENV)/.complete
	$(BIN)/python examples/segment_image.py

test: $(VENV)/.complete
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TEST_FLAGS)

test-oldest test-newest:
	PYTHON=$(PYTHON) tests/versions.sh $(@:test-%=%)

tables: $(VENV)/.complete
	$(BIN)/python -m benchmarks.tables $(TABLES_FLAGS)

GPU_PYTHON ?= $(BIN)/python

tables-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.complete)
	$(GPU_PYTHON) -m benchmarks.tables_gpu $(TABLES_FLAGS)

check: $(VENV)/.complete
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.complete
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

format: $(VENV)/.complete
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache demo site
