# Two commands: `make demo` and `make test`. Each sets up all it needs in .venv on a machine with Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint unit some-slow slow faults docs clean

demo: .venv/.demo
	$(BIN)/eqvae demo --out runs/demo

test: lint unit some-slow

lint: .venv/.dev .venv-lint/.installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	.venv-lint/bin/pydoclint src
	$(BIN)/lint-imports --no-logo

# One process for each core, each with one thread; a file stays with one process, which keeps what its tests share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

unit: .venv/.dev
	$(PYTEST) -m "not slow and not faults"

# Long tests as far as SLOW_SEC goes, other files first each day; `make slow` runs them all.
SLOW_SEC ?= 90
some-slow: .venv/.dev
	EQVAE_SLOW_SEC=$(SLOW_SEC) $(PYTEST) -m "slow and not faults"

slow: .venv/.dev
	$(PYTEST) -m "slow and not faults"

# Kills, full disks, damaged and hostile files by the hundred, which takes hours on two cores; KILLS=5 for fewer.
# A short set of each kind runs in `make test`; this one writes its counts to docs/results/faults/.
KILLS ?= 50
faults: .venv/.dev
	OMP_NUM_THREADS=1 EQVAE_KILLS=$(KILLS) $(BIN)/python -m pytest -m faults tests/faults

# The site, into site/: open site/index.html. A warning is an error, and nothing is fetched.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

.venv/.created:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

.venv/.demo: .venv/.created pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.dev: .venv/.created pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/.demo

.venv/.docs: .venv/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# pydoclint brings a fork of docstring_parser that overwrites the one the command line needs: it lives apart.
.venv-lint/.installed: constraints.txt
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/pip install --quiet --constraint constraints.txt pydoclint
	touch $@

clean:
	rm -rf .venv .venv-lint runs site
