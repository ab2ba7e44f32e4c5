# Two commands do everything on a machine with Python and make:
#   make demo    the main example, figures in examples/figures/
#   make test    the tests, without those marked slow
# Both create the virtual environment and install into it only if needed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Extra words for pytest:            make test ARGS="-k links"
ARGS ?=
# Processes that run the tests:      make test WORKERS=8
WORKERS ?= 2
# Folder with larger data sets:      make bench DATA=PATH
DATA ?=
# Scripts that `make bench` runs:    make bench BENCHMARKS=benchmarks/bench_gram.py
BENCHMARKS ?= $(sort $(wildcard benchmarks/bench_*.py))

ifneq ($(DATA),)
export GPBRIDGE_DATA := $(abspath $(DATA))
endif

.PHONY: help demo test test-all bench lint format clean

help:
	@sed -n 's/^#  *make/make/p' Makefile
	@echo "make test-all, make bench, make lint, make format, make clean"

# Not --clear: after a change of the pins pip only installs the difference.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): setup.cfg pyproject.toml requirements/ci.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c requirements/ci.txt -e ".[test,plots,sklearn]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# One thread, because ratios between methods are what the benchmarks report.
bench: $(STAMP)
	@set -e; for script in $(BENCHMARKS); do \
		echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script; \
	done

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .coverage
	find gpbridge tests examples benchmarks -name __pycache__ -type d -prune \
		-exec rm -rf {} +
