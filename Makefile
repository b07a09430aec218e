# Everything from nothing but Python 3.11 or newer and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Wheels are collected in pip's own cache, and installed from there: so that a fresh clone installs without a
# network, too, once they are.
WHEELS = $(shell $(BIN)/python -m pip cache dir)/histovar
QUIET := --quiet --disable-pip-version-check --constraint constraints.txt
# $(call install,extras)
define install
$(PIP) wheel $(QUIET) --wheel-dir "$(WHEELS)" hatchling editables setuptools wheel ".$(1)" \
	|| echo "no network: installing from $(WHEELS)"
$(PIP) install $(QUIET) --no-index --find-links "$(WHEELS)" --editable ".$(1)"
endef

.PHONY: demo test docs clean

demo: $(VENV)/installed
	$(BIN)/histovar demo --out demo_output

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: $(VENV)/installed-docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,)
	touch $@

$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,[$*])
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) demo_output docs/_build docs/api
