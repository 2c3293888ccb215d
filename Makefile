# Everything from a bare machine with Python 3.11 or newer and pip.
PYTHON ?= python3
STUDY ?= embedded
VENV := .venv
READY := $(VENV)/ready
PEERS := .venv-bench
JOBS := .venv-jobs
RESULTS := $(or $(SAE_STABILITY_RESULTS),results)

# What a user has set for other environments does not hold for this one.
export PIP_USER := 0
export PIP_REQUIRE_VIRTUALENV := 0
unexport PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

.PHONY: install book pdf lab test static suite bench intervals worlds jobs costs publish lint lock clean

install: $(READY)  ## the package and all that it needs into .venv, and nothing else

book: $(READY)  ## compute a study and build its book: make book, make book STUDY=quick
	$(VENV)/bin/sae-stability run $(STUDY)

pdf: book  ## print the book into _build/book.pdf; it needs Debian's chromium
	$(VENV)/bin/python -m sae_stability.book.printed

lab: $(VENV)/lab  ## open the chapters in JupyterLab
	$(VENV)/bin/jupyter lab book

# An editor is for those who change chapters: readers do without. Constrained by the lock, it changes nothing that computes.
$(VENV)/lab: $(READY)
	$(VENV)/bin/python -m pip install --quiet --constraint requirements.lock jupyterlab
	touch $@

test: $(READY)  ## lint, types, the order of imports and spelling, and beside them the whole test suite
	$(MAKE) --jobs 2 static suite

static: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/codespell book coursework src studies workflow README.md CONTRIBUTING.md published/README.md models/*/README.md
	$(VENV)/bin/mypy

suite: $(READY)
	$(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

# Tables with a row a feature are large, and no page of another study reads them.
PER_FEATURE := features impact families activity triggers explanations examples translations single_removals

publish: $(READY)  ## compute a study and keep its tables and verdicts in published/: make publish STUDY=many-seeds
	$(VENV)/bin/sae-stability run $(STUDY)
	rm -rf published/$(STUDY) && mkdir -p published/$(STUDY)
	cp $(RESULTS)/$(STUDY)/claims*.json $(RESULTS)/$(STUDY)/tables/*.parquet $(RESULTS)/$(STUDY)/tables/provenance.json published/$(STUDY)/
	rm -f $(foreach table,$(PER_FEATURE),published/$(STUDY)/$(table).parquet)

bench: $(READY) $(PEERS)/ready  ## measure training and matching against SAELens, dictionary_learning and sparsify
	$(VENV)/bin/python benchmarks/data.py
	$(PEERS)/bin/python -m pytest -q -p no:cacheprovider benchmarks
	$(PEERS)/bin/python benchmarks/bench.py

# torchvision comes with a peer that does not use it here, and its operators may be built for another torch.
$(PEERS)/ready: benchmarks/requirements.txt
	rm -rf $(PEERS)
	$(PYTHON) -m venv $(PEERS) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet $(PEERS); }
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/requirements.txt
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	$(PEERS)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The interpreter's own check first: an old one fails in one line and not in the middle of an install.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("sae-stability needs Python 3.11 or newer; call make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	rm -rf $(VENV)  # an install that was killed, or of another lock, leaves pieces
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet $(VENV); }
	$(VENV)/bin/python -m pip install --quiet --no-compile --requirement requirements.lock  # most modules are never imported
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

intervals: $(READY)  ## simulate studies: how often do the intervals of the book hold what they should?
	$(VENV)/bin/python benchmarks/intervals.py

worlds: $(READY)  ## train SAEs on the worlds of the phase diagram, and publish what they found
	$(VENV)/bin/python benchmarks/worlds.py

STUDIES := embedded quick

costs: $(READY)  ## publish what the stages of studies took, on which estimates rest: make costs STUDIES="embedded quick"
	$(VENV)/bin/python benchmarks/costs.py $(STUDIES)

jobs: $(READY) $(JOBS)/ready  ## does a study end in the same bytes in one process, as jobs, and on Slurm?
	workflow/same-bytes.sh

$(JOBS)/ready:
	rm -rf $(JOBS)
	$(PYTHON) -m venv $(JOBS) || { $(PYTHON) -m pip install --quiet virtualenv && $(PYTHON) -m virtualenv --quiet $(JOBS); }
	$(JOBS)/bin/python -m pip install --quiet 'snakemake>=9,<10' snakemake-executor-plugin-slurm
	touch $@

lint: $(READY)  ## mend what ruff can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lock: $(READY)  ## resolve pyproject.toml into requirements.lock again
	$(VENV)/bin/python -m pip install --quiet pip-tools
	echo 'torch==2.13.0' > $(VENV)/constraints.txt
	$(VENV)/bin/pip-compile --quiet --upgrade --extra dev --allow-unsafe --strip-extras --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host --constraint $(VENV)/constraints.txt --output-file requirements.lock pyproject.toml
	sed -i 's/+cpu$$//' requirements.lock

clean:  ## drop results and pages, keep the environment
	rm -rf results _build
