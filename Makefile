# On a machine with Python 3.11 or later, `make demo` and `make test` do all the set-up that they need, in .venv.
PYTHON ?= python3
VENV := .venv
RUN := PYTHONSAFEPATH=1 $(VENV)/bin/
INSTALLED := $(VENV)/.installed
DEMO := build/demo
LOWEST := build/venv-lowest
NEWEST := build/venv-newest
CHROMIUM ?= chromium
# A process for each CPU; tests of one file share its fixtures.
EVERY_CPU := -n logical --dist loadfile
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "batchmix needs Python 3.11 or later: make PYTHON=python3.11 ...")'

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-lowest test-newest test-cluster test-browser test-tracking docs lint format bench clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-13s %s\n' "$$name" "$$text"; done

demo: $(INSTALLED)  ## annotate examples/support_tickets.jsonl with the built-in model and print the accuracy
	$(RUN)batchmix generate data.path=examples/support_tickets.jsonl output.dir=$(DEMO) output.overwrite=true sampling.temperature=0 sampling.max_tokens=64
	$(RUN)python examples/demo.py $(DEMO)

test: $(INSTALLED)  ## the test suite without the slow tests
	$(RUN)python -m pytest $(EVERY_CPU)

test-slow: $(INSTALLED)  ## the slow tests: packaging, kills, large inputs
	$(RUN)python -m pytest -m slow $(EVERY_CPU)

test-lowest: $(LOWEST)/.installed  ## `make test` with the lowest releases that pyproject.toml allows (6 GB)
	PYTHONSAFEPATH=1 $(LOWEST)/bin/python -m pytest $(EVERY_CPU)

test-newest:  ## `make test` with the newest releases of everything, whatever constraints.txt says (6 GB)
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e '.[dev]'
	PYTHONSAFEPATH=1 $(NEWEST)/bin/python -m pytest $(EVERY_CPU)

test-cluster: $(INSTALLED)  ## tests on a real Slurm (installed with apt) and a real Ray
	@tests/cluster/install_slurm.sh
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,cluster,cluster-dev]'
	$(RUN)python -m pytest -m cluster

test-browser: $(INSTALLED)  ## the report in headless Chromium, which has to be there (or name one: make CHROMIUM=...)
	@command -v "$(CHROMIUM)" >/dev/null || { echo "make test-browser: no $(CHROMIUM) on this machine: apt-get install chromium, or CHROMIUM=/path/of/it" >&2; exit 1; }
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,browser]'
	CHROMIUM="$$(command -v "$(CHROMIUM)")" $(RUN)python -m pytest -m browser

test-tracking: $(INSTALLED)  ## what reports to W&B, MLflow and Prometheus, without a network (210 MB)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,wandb,mlflow,prometheus]'
	$(RUN)python -m pytest -m tracking

docs: $(INSTALLED)  ## write docs/configuration.md from the code
	$(RUN)python tests/helpers/config_reference.py

lint: $(INSTALLED)  ## ruff (rules and format) and mypy --strict
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy

format: $(INSTALLED)  ## let ruff mend what it can
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

bench: $(INSTALLED)  ## run every benchmark on this machine
	@for file in benchmarks/bench_*.py; do echo "== $$file"; PYTHONPATH=benchmarks $(RUN)python "$$file" || exit 1; done

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(LOWEST)/.installed: pyproject.toml
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --resolution lowest-direct -e '.[dev]'
	$(LOWEST)/bin/python tests/helpers/lowest.py
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(RUN)python -m batchmix.models.numba_cache  # else the first run waits for its CPU kernels to be compiled
	@touch $@
