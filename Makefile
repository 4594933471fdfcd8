# make demo    train, export, calibrate, evaluate and benchmark a sparse digit classifier (under 3 minutes)
# make test    the fast tests (under 12 minutes on 2 cores)
# The first of either builds .venv; PYTHON=python3.12 make demo chooses another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MOON := $(BIN)/moon

.PHONY: demo test test-slow install check format bench clean

demo: $(STAMP)
	$(MOON) demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

install: $(STAMP)

# The stamp is written last, so an interrupted install is taken up again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "moon needs Python 3.10 or newer; $(PYTHON) is older or missing. Set PYTHON=/path/to/python3.11."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) has no venv. On Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(STAMP)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)
	$(BIN)/python benchmarks/bytes.py
	$(BIN)/python -m benchmarks.serve

clean:
	rm -rf $(VENV) demo runs .pytest_cache .mypy_cache .ruff_cache
