# Each target sets up what it needs in .venv, from nothing but make and Python 3.10 or later.
#
#   make quick                      while you work: every rule on every layer in one dtype, in less than a minute
#   make test ARGS="-k lora -x"     pytest's own options
#   make test ARGS=--hypothesis-profile=explore   with examples that no run has seen
#   make test JOBS=0                in one process, for a debugger
#   make bench ARGS=--page-only     the pages of the benchmarks again, from the numbers in docs/benchmarks*.json
#   make test PYTHON=python3.12     the interpreter that .venv is made with

TORCH  ?= 2.13.0
JOBS   ?= 2
PYTHON ?=
ARGS   ?=
VENV   ?= .venv
DEVICE ?= cuda

# What `make quick` runs: the laws that all rules obey, and the code that every call goes through.
QUICK := tests/laws tests/rules tests/bind tests/lazy tests/many
# Rounding differs between processors: what `make numeric` runs with torch's plain kernels, which every processor has.
NUMERIC := $(QUICK) tests/quant tests/parity

BENCHMARKS := benchmark benchmark_many benchmark_train benchmark_preference benchmark_embeddings benchmark_serving \
	benchmark_growth

# The first torch that pyproject.toml admits.
OLDEST := $(shell sed -n 's/^ *"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)

# What `python3` means on this machine is the first choice, the newest other one the second.
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10)
BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check "torch==$(TORCH)"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test quick numeric oldest bench gpu lint docs clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do \
		printf 'make %-10s %s\n' "$$name" "$$text"; done

demo: $(VENV)/.has-demo ## run the demo
	@$(BIN)/funclora demo $(ARGS)

test: $(VENV)/.has-test ## run the tests and the examples in the docstrings
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --no-header -n $(JOBS) $(ARGS)

quick: $(VENV)/.has-test ## run the laws for every rule in one dtype, while you work
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --no-header -n $(JOBS) --quick $(QUICK) $(ARGS)

numeric: $(VENV)/.has-test ## run what depends on rounding, with the kernels that every processor has
	@ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest --no-header -n $(JOBS) -m "not slow" $(NUMERIC) $(ARGS)

oldest: ## make quick with the oldest torch that is supported, in .venv-oldest
	@$(MAKE) --no-print-directory quick VENV=.venv-oldest TORCH=$(OLDEST)

bench: $(VENV)/.has-test ## measure against PEFT and others, into docs/benchmarks*.md: about 40 minutes on two quiet cores
	@for name in $(BENCHMARKS); do $(BIN)/python examples/$$name.py $(ARGS) || exit 1; done

gpu: $(VENV)/.has-test ## test and measure on a GPU, into docs/benchmarks-gpu.md; without one, only say so
	@if [ $(DEVICE) = cuda ] && ! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		echo "There is no GPU that torch can use: nothing was run. The same on a CPU, tiny: make gpu DEVICE=cpu"; \
	else \
		$(BIN)/python -m pytest --no-header -m cuda --device $(DEVICE) tests/cuda && \
		$(BIN)/python examples/benchmark_gpu.py --device $(DEVICE) $(ARGS); \
	fi

lint: $(VENV)/.has-lint $(VENV)/.has-test ## check style, formatting and types
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --diff
	@$(BIN)/mypy --no-error-summary
	@echo "No complaints."

docs: $(VENV)/.has-docs ## build the pages into site/
	@$(BIN)/python docs/check_api.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet: that keeps warnings from strict mode too

clean: ## remove what builds, tests and the demo leave
	@rm -rf build dist site funclora-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name '.venv*' -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove the environments too
	@rm -rf .venv .venv-oldest

# An extra is installed anew when pyproject.toml changes; torch is named each time, so that nothing replaces it.
$(VENV)/.has-%: pyproject.toml $(VENV)/.torch-$(TORCH)
	@echo "Installing funclora[$*]"
	@$(INSTALL) --editable ".[$*]"
	@touch $@

$(VENV)/.torch-$(TORCH): $(VENV)/.made
	@echo "Installing torch $(TORCH): once, and it can take minutes"
	@$(INSTALL)
	@touch $@

# A .venv that is there and works is kept. Debian's Python may come without ensurepip: apt has it.
$(VENV)/.made:
	@set -e; \
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }; \
	complete() { "$$1" -c 'import ensurepip, venv' 2>/dev/null; }; \
	if ! { fits $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1; }; then \
		found=; \
		for python in $(PYTHONS); do \
			if fits "$$python"; then \
				found=$${found:-$$python}; \
				if complete "$$python"; then found=$$python; break; fi; \
			fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "funclora needs Python 3.10 to 3.14, and found none as: $(PYTHONS). Type: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		if ! complete "$$found"; then \
			package=$$("$$found" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
			root=sudo; \
			if [ "$$(id -u)" = 0 ]; then root=env; elif sudo -n true 2>/dev/null; then root="sudo -n env"; fi; \
			if [ "$$root" != sudo ] && command -v apt-get >/dev/null; then \
				echo "Installing $$package"; \
				$$root apt-get update -qq >/dev/null 2>&1 || true; \
				$$root DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$package" >/dev/null 2>&1 || true; \
			fi; \
			if ! complete "$$found"; then \
				echo "$$found has no venv module. Type: sudo apt-get install $$package" >&2; \
				exit 1; \
			fi; \
		fi; \
		"$$found" -m venv --clear $(VENV); \
	fi; \
	touch $@
