# `make help` lists the commands. The environment is made in .venv, once, and again when its requirements change.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo base test test-all test-media mutate lint bench clean

BIN := .venv/bin
REQUIREMENTS := setup.cfg pyproject.toml $(wildcard constraints/*.txt)
# The first Python of these that is 3.11 or 3.12 and can make a virtual environment. Or: make PYTHON=/path/to/python
USABLE := -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' >/dev/null 2>&1
PYTHON ?= $(shell for python in python3 python3.11 python3.12 /usr/bin/python3.11 /usr/bin/python3.12; do \
	$$python $(USABLE) && command -v $$python && break; done)
# pip under the pins of the environment's own Python.
PIP = $(BIN)/python -m pip install -q \
	-c constraints/$$($(BIN)/python -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt

# The other Python, 3.12 beside a .venv of 3.11 or the reverse, on the PATH or pyenv's; empty where there is none.
OTHER = $(shell .venv/bin/python -c 'import sys; print("3.11" if sys.version_info[1] == 12 else "3.12")')
OTHER_PYTHON = $(shell for python in python$(OTHER) /usr/bin/python$(OTHER) $${HOME}/.pyenv/versions/$(OTHER).*/bin/python; do \
	$$python -c 'import ensurepip, sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(OTHER)")' >/dev/null 2>&1 && \
	command -v $$python && break; done)
# What depends most on the versions of libraries: pictures, videos, and the records that hold them. All without PyTorch.
MEDIA_TESTS = tests/vision tests/data/test_sources.py tests/data/test_archives.py tests/data/test_forms.py \
	$(wildcard tests/cases/test_[beg]_*.py tests/cases/test_q_clip_times.py tests/cases/test_q_animations.py \
	tests/cases/test_r_images.py tests/cases/test_r_videos.py)

# Large arrays in huge pages: on a CPU, a large training step takes about a fifth longer without.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.demo ## train a small model on this machine, ask it questions, write a report
	$(BIN)/k25 demo

base: .venv/.demo ## all stages of pre-training at tiny scale, with scores by category: runs/base
	$(BIN)/k25 sweep --config=experiments/base/base.py --workdir=runs/base

# Two processes of up to 5 GB each, on any machine; one that has no test left takes some of the other's.
IN_PARALLEL := --numprocesses=2 --dist=worksteal

test: .venv/.test ## the tests that take minutes, not hours, on a CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m "not slow" $(IN_PARALLEL)

test-all: .venv/.test ## every test
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q $(IN_PARALLEL)

test-media: | .venv/.made ## images and videos with the other Python, 3.12 beside 3.11, in an environment of its own
	@if [ -z "$(OTHER_PYTHON)" ]; then \
	  echo "test-media: Python $(OTHER) is not on this machine, so images and videos are not tried with it"; \
	else \
	  $(MAKE) --no-print-directory .venv-$(OTHER)/.media && \
	  JAX_PLATFORMS=cpu .venv-$(OTHER)/bin/python -m pytest -q -m "not slow" $(MEDIA_TESTS); fi

mutate: .venv/.test ## break the package in a hundred small ways and see that tests notice: ARGS="--only moe", or --list
	JAX_PLATFORMS=cpu $(BIN)/python tests/mutations.py $(ARGS)

lint: .venv/.test ## style, format, and which layer imports which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# Benchmarks keep freed memory: what a system takes back between two calls comes back slowly, and not for both sides alike.
bench: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000
bench: ## a benchmark: make bench NAME=<file of benchmarks/, without .py> [ARGS=--json]
	@if [ ! -f "benchmarks/$(NAME).py" ]; then \
	  echo "make bench NAME=<name>, where <name> is one of:" >&2; ls benchmarks | sed -n 's/\.py$$//p' >&2; exit 2; fi
	@$(MAKE) --no-print-directory .venv/.$$(grep -q 'k25_jax\.preflight' benchmarks/$(NAME).py && echo preflight || echo test)
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(BIN)/python -m benchmarks.$(NAME) $(ARGS)

clean: ## remove .venv, caches and build outputs
	rm -rf .venv .venv-3.11 .venv-3.12 build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.made:
	@if ! "$(PYTHON)" $(USABLE); then \
	  echo "$(or $(PYTHON),no python) will not do: k25_jax needs Python 3.11 or 3.12 that can make a virtual environment" >&2; \
	  echo "(Debian, Ubuntu: apt install python3.11-venv). If it is not on the PATH: make PYTHON=/path/to/python3.11" >&2; \
	  exit 1; fi
	$(PYTHON) -m venv .venv
	touch $@

.venv/.demo: $(REQUIREMENTS) | .venv/.made
	$(PIP) -e ".[demo]"
	touch $@

# What a model writes runs in bubblewrap. Without it the package works, but for code in sandbox/, whose tests are skipped.
.venv/.sandbox: | .venv/.made
	@if ! command -v bwrap >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq bubblewrap; } >/dev/null 2>&1 || true; fi
	@command -v bwrap >/dev/null || \
	  echo "bubblewrap is not installed: tools that run a model's code will refuse to (Debian, Ubuntu: apt install bubblewrap)" >&2
	@touch $@

.venv/.test: $(REQUIREMENTS) .venv/.sandbox | .venv/.made
	$(PIP) -e ".[demo,test]"
	touch $@ .venv/.demo

# With the TPU compiler, for benchmarks that import k25_jax.preflight; the rest works as before.
.venv/.preflight: $(REQUIREMENTS) | .venv/.made
	$(PIP) -e ".[demo,test,preflight]"
	touch $@ .venv/.demo .venv/.test

# The package and pytest alone, under the pins of that Python.
.venv-3.11/.media .venv-3.12/.media: .venv-%/.media: $(REQUIREMENTS)
	$(OTHER_PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install -q -c constraints/py$(subst .,,$*).txt -e . pytest
	touch $@
