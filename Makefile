# Everything from nothing but Python 3.11 or newer and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Wheels are collected in pip's own cache, and installed from there: so that a fresh clone installs without a
# network, too, once they are.
WHEELS := $$($(BIN)/python -m pip cache dir)/histovar
QUIET := --quiet --disable-pip-version-check --constraint constraints.txt
BACKEND := editables hatch-fancy-pypi-readme hatchling setuptools wheel
EXTRAS := embed,hub,report,wsi
# $(call install,what to collect,what to install)
# pip compiles on one core, compileall on all; files that only newer versions of Python can read fail, and are left.
define install
$(PIP) wheel $(QUIET) --wheel-dir "$(WHEELS)" $(1) || echo "no network: installing from $(WHEELS)"
$(PIP) install $(QUIET) --no-compile --no-index --find-links "$(WHEELS)" $(2)
$(BIN)/python -W ignore -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null 2>&1 || true
endef

.PHONY: demo test docs package clean

demo: $(VENV)/installed
	$(BIN)/histovar demo --out demo_output $(if $(N_SPOTS),--n-spots $(N_SPOTS))

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

docs: $(VENV)/installed-doc
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# The wheel and the sdist, checked, and a small demo run by the wheel in an empty environment.
package: $(VENV)/installed-dev
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install $(QUIET) --no-compile --no-index --find-links "$(WHEELS)" dist/*.whl
	touch build/venv/installed
	$(MAKE) demo VENV=build/venv N_SPOTS=60

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(call install,pip,pip)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(BACKEND) .,--editable .)
	touch $@

# A group of dependencies of pyproject.toml: dev or doc.
$(VENV)/installed-dev: WITH := [$(EXTRAS)]
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,$(BACKEND) ".$(WITH)" --group $*,--editable ".$(WITH)" --group $*)
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist demo_output docs/_build docs/api
