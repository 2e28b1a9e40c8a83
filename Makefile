# Six targets. Each sets everything up on a bare machine; `make simulate` and `make federation` are the ones to try.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export RAY_USAGE_STATS_ENABLED ?= 0
export FLWR_TELEMETRY_ENABLED ?= 0
export FLWR_DISABLE_UPDATE_CHECK ?= 1
OUT ?= outputs/laptop

.PHONY: setup simulate federation test lint bench

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparsecontrast needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m simulation.flower_home
	@touch $@

simulate: setup
	$(BIN)/python -m simulation experiment=laptop output_dir=$(OUT) --fresh

# a real one: TLS, registered nodes, processes of their own, all on loopback, all stopped at the end
federation: setup
	$(BIN)/python -m simulation.deploy --out outputs/federation --fresh

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m benchmarks.data --quick
