# Every target creates .venv first; nothing else has to be installed by hand.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo test test-examples test-load test-cluster test-fuzz test-soak test-kills test-lowest check format clean

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
	@echo "Before a release:"
	@echo "make test-lowest    the tests with the lowest versions that pyproject.toml allows, in .venv-lowest-*: 30 min"

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

# Declared lower bounds are promises: new environments get the lowest version of each direct requirement (constraints.txt,
# which pins what .venv and the images have, is not used), and a bound that was not installed is an error. The client has
# lower bounds than the service, so its tests run a second time with the lowest that it allows by itself.
CLIENT_BOUNDS := torch>=2.5 torchvision>=0.20 fsspec>=2024.2
LOWEST = $(BIN)/uv pip install --quiet --resolution lowest-direct -e './client[torch,webdataset]' -e '.[dev]'

test-lowest: $(INSTALLED)
	rm -rf .venv-lowest-service .venv-lowest-client
	$(PYTHON) -m venv .venv-lowest-service
	$(LOWEST) --python .venv-lowest-service/bin/python
	.venv-lowest-service/bin/python tests/lowest.py 'dat-service[dev]'
	$(PYTHON) -m venv .venv-lowest-client
	printf '%s\n' $(foreach bound,$(CLIENT_BOUNDS),'$(bound)') > .venv-lowest-client/overrides.txt
	$(LOWEST) --python .venv-lowest-client/bin/python --override .venv-lowest-client/overrides.txt
	.venv-lowest-client/bin/python tests/lowest.py 'dat-client[torch,webdataset]'
	OMP_WAIT_POLICY=PASSIVE .venv-lowest-client/bin/python -m pytest -n 2 --dist loadfile tests/client
	OMP_WAIT_POLICY=PASSIVE .venv-lowest-service/bin/python -m pytest -n 2 --dist loadfile \
		tests/client tests/workers tests/service tests/cli/test_help.py

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
	rm -rf .venv .venv-lowest-service .venv-lowest-client
