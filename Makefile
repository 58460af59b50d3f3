# Everything runs in an environment of its own (.venv), made on the first call: nothing else is touched.
PYTHON ?= python3
VENV ?= .venv
DATA ?=
OUT ?= spartan-demo
ARGS ?=
TORCH ?=

BIN := $(VENV)/bin
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
TRAINERS := $(VENV)/.trainers
SITE := $(VENV)/.docs
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints-torch-$(TORCH).txt,constraints-dev.txt)
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt constraints-dev.txt \
	$(shell find csrc -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize lint docs bench figures gpu gpu-compile clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) DATA=folder OUT=$(OUT) TORCH=version ARGS='more arguments'"

demo: $(INSTALLED) ## train on Fashion-MNIST, dense and sparse, and compare (ARGS=--quick: under a minute)
	$(BIN)/spartan demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)") $(ARGS)

test: $(INSTALLED) $(TRAINERS) ## run the tests, a process for each core (waiting threads sleep, so that these do not crowd each other)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

sanitize: $(INSTALLED) ## run the CPU kernels' tests under address and undefined-behaviour sanitizers (ARGS=thread: races)
	$(BIN)/python -m tests.sanitizers $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs: $(INSTALLED) $(SITE) ## build the documentation site in docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs docs/_build/html $(ARGS)
	@echo "docs/_build/html/index.html"

bench: $(INSTALLED) ## measure against PyTorch and sort + Sinkhorn (QUICK=1: a few minutes)
	$(BIN)/python -m bench $(if $(QUICK),--quick) $(ARGS)

figures: $(INSTALLED) ## draw the figures from the committed results
	$(BIN)/python -m bench.plot $(ARGS)

gpu-compile: $(INSTALLED) ## without a GPU: compile every kernel as launched, for every architecture (ARGS=--tritons: this Triton only)
	$(BIN)/python -m bench.gpu_compile $(ARGS)

gpu: ## with a GPU: check, measure, test, sanitize, profile in 9 minutes; PYTHON as it is, results in OUT (REHEARSE=1: on the CPU)
	$(if $(REHEARSE),SPARTAN_REHEARSE=1) $(PYTHON) -m bench.gpu

clean: ## remove the environment, builds and caches (results of the demo stay)
	rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f spartan_kernels/_native*.so spartan_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +

$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or newer is needed; $(PYTHON) is not. Try: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "Python cannot make environments here. On Debian and Ubuntu: sudo apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The same versions with another PyTorch (TORCH=2.9.1).
$(VENV)/constraints-torch-%.txt: constraints-dev.txt $(CREATED)
	sed 's/^torch==.*/torch==$*/' $< > $@

# An editable install: Python files are used as they are, so only what is built or declared needs a new one.
$(INSTALLED): $(CREATED) $(CONSTRAINTS) $(BUILD_INPUTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo,dev,bench]"
	@touch $@

# What builds the documentation; not part of the environment that `make demo` needs.
$(SITE): $(INSTALLED) pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $$($(BIN)/python -m tests.extras docs)
	@touch $@

# The trainers of other packages that tests train with (about 200 MB, so `make demo` does without). Without a network, their
# tests are skipped; in CI that is an error.
$(TRAINERS): $(INSTALLED) pyproject.toml constraints-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		$$($(BIN)/python -m tests.extras integrations) && touch $@ \
		|| { test -z "$$CI" && echo "Tests of spartan.integrations are skipped: its packages could not be installed."; }
