# Everything a developer or CI does. `make demo` and `make test` set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE_VENV := .engine-venv
LOADER_VENV := .loader-venv
# Processes that share out the tests, one thread each.
JOBS ?= 2
STAMP := $(VENV)/.stamp

.PHONY: setup demo test check fmt lint types layers size engine-env loader-env old-engine-env bench clean

setup: $(STAMP)

# torch goes first, by its exact pin: where a CPU build is at hand it is taken, and no later
# package can pull in another one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,plots,eval,dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/nybble demo --out demo-out

# Real counterparts included: each format's own loader in Transformers, and vLLM on the CPU with MTP.
# GPTQModel's environment needs a compiler and PCRE2: without them its tests are skipped, visibly.
test: setup engine-env
	-$(MAKE) loader-env
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile

check: setup
	$(MAKE) lint types layers size test

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

size: setup
	$(BIN)/python tools/check_size.py

engine-env:
	bash tools/engine_env/build.sh $(ENGINE_VENV)

loader-env:
	bash tools/loader_env/build.sh $(LOADER_VENV)

# Older releases of vLLM, where the doctor's rules differ; gigabytes, so only if asked for.
old-engine-env: engine-env
	bash tools/old_engine_env/build.sh 0.24.0
	bash tools/old_engine_env/build.sh 0.28.0

bench: setup
	bash benchmarks/peers/build_env.sh auto_round
	bash benchmarks/peers/build_env.sh llm_compressor
	$(BIN)/python benchmarks/signround_ab.py
	$(BIN)/python benchmarks/gptq_ab.py

clean:
	rm -rf $(VENV) $(ENGINE_VENV) $(LOADER_VENV) .old-engine-venv .bench-venv demo-out tiny-build
