# Two commands on a fresh machine (Python >= 3.10, make, a package registry): `make demo` and `make test`.
# While you work: `make test-fast`. CONTRIBUTING.md says what each tier runs.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin
# Test processes, each with one thread. They take tests from each other near the end, so neighbors of a module stay
# together and its fixtures are made once or twice.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: demo demo-real test test-fast check format docs dist
.DEFAULT_GOAL := test

# Redone when the dependencies change. constraints.txt must be part of this very pip call: it pins the build of
# torch that is tested. The test is for pip, not python, because a venv that failed half-way has no pip.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/lensteer demo

# make demo-real MODEL=folder-of-a-thinking-model CHAINS=annotated-chains.jsonl
demo-real: $(INSTALLED)
	@test -n "$(MODEL)" -a -n "$(CHAINS)" || { echo "usage: make demo-real MODEL=FOLDER CHAINS=FILE" >&2; exit 2; }
	$(BIN)/lensteer demo --out lensteer-demo-real --model "$(MODEL)" $(foreach file,$(CHAINS),--chains "$(file)")

test: check
	$(PYTEST)

# No slow or medium tests, and no shape checks at run time (the empty option overrides the one in pyproject.toml).
test-fast: $(INSTALLED)
	$(PYTEST) -m 'not slow and not medium' --jaxtyping-packages= --durations=10

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The documentation site, in site/. Any warning fails.
DOCS := $(VENV)/.docs
$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/mkdocs build --quiet
	@echo "site/index.html"

# A release: source distribution and wheel in dist/, checked, then the demo from the wheel in an environment that has
# nothing else. Nothing is uploaded.
dist:
	rm -rf dist build
	$(PYTHON) -m venv build/tools
	build/tools/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/tools/bin/python -m build --outdir dist
	build/tools/bin/twine check --strict dist/*
	$(PYTHON) -m venv build/bare
	build/bare/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && bare/bin/lensteer --version && bare/bin/lensteer demo
