# Every target creates .venv first; nothing else has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo test test-examples test-load test-cluster test-fuzz test-soak test-kills check format clean

help:
	@echo "make demo           start the service, discretize photographs, draw a picture, stop the service"
	@echo "make test           run the tests"
	@echo "make check          check lint, format, types, spelling, wording and versions"
	@echo "make format         fix lint and format"
	@echo "make setup          create .venv;  make clean removes it"
	@echo "Longer tests:"
	@echo "make test-examples  train all examples"
	@echo "make test-load      the service on Ray under faults, chaos, restarts and overload: 30 min"
	@echo "                      (DAT_CHAOS_S, DAT_RESTARTS, DAT_OVERLOAD_S)"
	@echo "make test-cluster   three hosts in network namespaces, as root: 4 min (DAT_CLUSTER_S)"
	@echo "make test-fuzz      10,000 mutated requests, and schemathesis: 15 min (DAT_FUZZ_N)"
	@echo "make test-soak      everything at the same time: 30 min (DAT_SOAK_S)"
	@echo "make test-kills     dat precompute killed at random moments, here and on Ray: 25 min (DAT_KILLS)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml client/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt -e ./client -e '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# Two processes: each starts services of its own. PASSIVE: threads that wait for work leave the cores to the others.
test: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

test-examples: $(INSTALLED)
	$(BIN)/python -m pytest tests/examples -m 'slow or not slow'

test-load: $(INSTALLED)
	$(BIN)/python -m pytest -s -m slow tests/service tests/e2e tests/load --ignore tests/load/test_soak.py

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -s -m slow tests/cluster

test-fuzz: $(INSTALLED)
	$(BIN)/python -m pytest -s -m slow tests/fuzz

test-soak: $(INSTALLED)
	$(BIN)/python -m pytest -s -m slow tests/load/test_soak.py

test-kills: $(INSTALLED)
	$(BIN)/python -m pytest -s -m slow tests/workers/precompute

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy client/dat_client workers/dat_workers dat_service examples benchmarks
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell
	$(BIN)/python tests/plain_english.py
	$(BIN)/python tests/version.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv
