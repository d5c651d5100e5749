# Two commands on a fresh machine (Python >= 3.10, make, a package registry): `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: demo demo-real test check format
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
	$(BIN)/python -m pytest

check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
