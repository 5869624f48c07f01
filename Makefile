# `make demo` and `make test` need Python 3.11 or newer and make; the rest is made here, in .venv.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
READY := .venv/.installed

.DEFAULT_GOAL := help
# Workers of the tests, one thread each; `make test WORKERS=0` runs them in one process.
WORKERS ?= 2
PYTEST = env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --doctest-modules

.PHONY: help demo test test-all test-slow lint types check build docs bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## fit a VAE to handwritten digits and report where every nat of its ELBO goes
	@$(BIN)/pvae fit vae
	@$(BIN)/pvae report latest

test: $(READY)  ## run the test suite and the doctests, but for the tests marked slow
	$(PYTEST) -m "not slow" tests pvae

test-all: $(READY)  ## run every test, the slow ones too (for the night)
	$(PYTEST) tests pvae

# `PART=2/5` runs the second fifth of them, by name.
test-slow: $(READY)  ## run the tests marked slow
	$(PYTEST) -m slow $(if $(PART),--part $(PART)) tests || test $$? -eq 5  # 5: none in this part

lint: $(READY)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## check types
	$(BIN)/mypy

check: lint types  ## lint and types

build: $(READY)  ## build the sdist and the wheel into dist/
	$(BIN)/python -m build --outdir dist

# Extra packages go into .venv, once. The tutorials are run in Jupyter kernels; a warning is an error.
docs: $(READY)  ## run the tutorials and build the site into site/
	@$(BIN)/python -c 'import ipykernel, latex2mathml, mkdocstrings, nbclient' 2>/dev/null || \
	    $(PIP) --no-build-isolation -e ".[docs]"
	env NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/mkdocs build --quiet --strict
	@echo "wrote site/index.html"

# `cells` needs data and a peer: `python tests/bench/cells.py --help`.
BENCHES = $(filter-out cells%,$(basename $(notdir $(wildcard tests/bench/*.py))))
bench: $(READY)  ## time pvae against hand-written PyTorch, stock Pyro and its peers
	@set -e; for name in $(BENCHES); do echo "== $$name"; $(BIN)/python -m "tests.bench.$$name"; done

clean:  ## remove what was built and cached; keep .venv and runs/
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch comes first and pinned: asked for as a range, pip may fetch another, far larger build.
$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/pip || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Expected Python 3.11 or newer; got $$($(PYTHON) --version 2>/dev/null || echo no '$(PYTHON)')." >&2; \
	    echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; } || \
	    { rm -rf .venv; exit 1; }
	@echo "Installing the pinned environment into .venv (once; a few minutes)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)" setuptools
	@$(PIP) --no-build-isolation -e ".[test,dev]"
	@touch $@
