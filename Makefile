# make repro   set up and run the whole pipeline on the model in params.yaml
# make test    set up and run all tests
# make lint    set up, check format and style
# make preset NAME=…   put presets/NAME.yaml into params.yaml
# make table   the results of the last run
# make help    this list

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test lint format preset table setup help

repro: setup
	dvc repro
	@python -m benchmarks.summary

test: setup
	python -m pytest

lint: setup
	ruff check .
	ruff format --check .

format: setup
	ruff check --fix .
	ruff format .

preset:
	@test -f "presets/$(NAME).yaml" || { echo "NAME is one of:"; ls presets | sed 's/\.yaml$$//'; exit 1; }
	cp "presets/$(NAME).yaml" params.yaml

table: setup
	@python -m benchmarks.summary

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt requirements-packaged.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements-packaged.txt
	@touch $@

help:
	@sed -n 's/^# make /make /p' Makefile
