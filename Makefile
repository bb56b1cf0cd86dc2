# make train   set up, then train the example with Muon and with Adam and compare
# make train-hybrid   the same with a GatedDeltaNet hybrid
# make test    set up, then run lint, type check and the whole test suite
# make results   do the experiments of docs/results again, small trainings on the CPU (an hour or more)
# make gpu-check   all that only a GPU can tell: checks and measurements on one, nine minutes a call at most
# make te      build TransformerEngine too (with a CUDA compiler, no GPU), for make test-te
# make test-clients   the frameworks (Megatron-Bridge, ms-swift, verl), in an environment of their own, with make te
# make test-browser   the page of `plot --html` in a browser that is installed, which make test does too if it finds one
# make docs    the documents as a site, in build/docs/site, in an environment of its own; warnings are errors
# make help    all targets
#
# Variables: PYTHON=/path/to/python3.12    the interpreter of the virtual environment
#            TORCH="torch==2.8.0 --index-url URL"   another torch build (a CPU one saves gigabytes)
#            ARGS="..."                    further arguments of train, test, bench and results
#            JOBS=2                        processes of make test and test-slow, side by side

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready
JOBS ?= 2
export PYTHON TORCH

.PHONY: help setup train train-hybrid test test-slow test-te te clients test-clients test-browser docs lint bench gpu-check results clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -15
	@echo "Targets: setup train train-hybrid test test-slow test-te te clients test-clients test-browser docs lint bench gpu-check results clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh
	@bash tools/make_venv.sh
	@touch $@

train: $(STAMP)
	@$(RUN) examples/demo.py $(ARGS)

train-hybrid: $(STAMP)
	@$(RUN) examples/demo.py --model hybrid $(ARGS)

# Files, not tests, are shared out: their cases share models and checkpoints, and ranks live as long as their process.
# In the order of folders: the quick files of tests/unit come last, so that no process waits long for the other.
test: lint
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)
	@$(RUN) -m pytest -n $(JOBS) --dist loadfile -m slow $(ARGS)

# TransformerEngine, built from source where there is a CUDA compiler; see docs/compatibility.md.
te: $(STAMP)
	@VENV=$(VENV) bash tools/make_te.sh

test-te: te
	@$(RUN) -m pytest tests/te $(ARGS)

# Frameworks over the packages of $(VENV), which does not see them. Their tests are here alone: elsewhere they skip.
clients: te
	@VENV=$(VENV) bash tools/make_clients.sh

test-clients: clients
	@MEGATRON_MUON_CLIENTS=1 $(VENV)-clients/bin/python -m pytest tests/clients $(ARGS)

# Chromium or Chrome, from anywhere (Debian: apt-get install chromium). Without one it fails here and skips in make test.
test-browser: $(STAMP)
	@BROWSER_FOR_TESTS="$(BROWSER)" $(RUN) -m pytest tests/unit/test_plots_page.py $(ARGS)

# Needs nothing of the package: what mkdocs.yml asks for is the extra `docs`.
docs: $(VENV)-docs/.ready
	@$(VENV)-docs/bin/python tools/site.py $(ARGS)

$(VENV)-docs/.ready: pyproject.toml
	@$(if $(wildcard $(RUN)),$(RUN),$(or $(PYTHON),python3)) -m venv $(VENV)-docs
	@$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check $$($(VENV)-docs/bin/python -c \
		'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

bench: $(STAMP)
	@$(RUN) -m tools.bench $(ARGS)

# By the virtual environment if there is one, else by the python3 that finds torch: a machine with a GPU may have no way to
# install anything.
gpu-check:
	@if [ -x $(RUN) ]; then $(RUN) -m tools.gpu_check $(ARGS); else $(or $(PYTHON),python3) -m tools.gpu_check $(ARGS); fi

results: $(STAMP)
	@$(RUN) -m tools.results $(ARGS)

clean:
	rm -rf $(VENV) $(VENV)-clients $(VENV)-docs runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
