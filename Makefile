# setup   a virtual environment with pinned versions
# repro   the whole pipeline; runs only what changed
# test    all tests;  `make test-fast` leaves out the slow ones
# lint    ruff, pyright, import-linter, generated files
# docs    write the generated files again
# bench   benchmarks, printed as ratios;  `make bench-trl` compares with TRL, for most of an hour
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
THREADS := OMP_NUM_THREADS=1
# Two processes of one thread each; a file's tests stay together, since they share what is dear to make.
PYTEST := $(THREADS) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: setup repro test test-fast lint docs bench bench-trl clean

setup: $(VENV)/.installed

repro: setup
	$(BIN)/dpo-cli repro

test: $(VENV)/.installed-dev
	$(PYTEST)

test-fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/generate.py --check

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/generate.py

bench: $(VENV)/.installed-dev
	$(THREADS) $(BIN)/python benchmarks/scoring.py
	$(THREADS) $(BIN)/python benchmarks/numerics.py
	$(BIN)/python benchmarks/conversion.py

bench-trl: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/against_trl.py

clean:
	rm -rf $(VENV) .scratch

# The environment is made anew when the pins change, and never half made: the stamp comes last.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(v < (3, 11) and f'Python 3.11 or newer is needed, {v[0]}.{v[1]} was found; try: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lint,parity,lm-eval,real]'
	@touch $@
