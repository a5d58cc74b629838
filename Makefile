# Each target sets up what it needs in .venv, from nothing but make and Python 3.10 or later.
#
#   make test ARGS="-k lora -x"     pytest's own options
#   make test ARGS=--hypothesis-profile=explore   with examples that no run has seen
#   make test JOBS=0                in one process, for a debugger
#   make test PYTHON=python3.12     the interpreter that .venv is made with

TORCH  ?= 2.13.0
JOBS   ?= 2
PYTHON ?=
ARGS   ?=

# What `python3` means on this machine is the first choice, the newest other one the second.
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python3.10)
BIN     := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check "torch==$(TORCH)"

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test bench lint docs clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name text; do \
		printf 'make %-10s %s\n' "$$name" "$$text"; done

demo: .venv/.has-demo ## run the demo
	@$(BIN)/funclora demo $(ARGS)

test: .venv/.has-test ## run the tests and the examples in the docstrings
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --no-header -n $(JOBS) $(ARGS)

bench: .venv/.has-test ## measure against PEFT and the base model, into docs/benchmarks.md and docs/benchmarks-many.md
	@$(BIN)/python examples/benchmark.py $(ARGS)
	@$(BIN)/python examples/benchmark_many.py $(ARGS)

lint: .venv/.has-lint .venv/.has-test ## check style, formatting and types
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format -q --diff
	@$(BIN)/mypy --no-error-summary
	@echo "No complaints."

docs: .venv/.has-docs ## build the pages into site/
	@$(BIN)/python docs/check_api.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # not --quiet: that keeps warnings from strict mode too

clean: ## remove what builds, tests and the demo leave
	@rm -rf build dist site funclora-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf .venv

# An extra is installed anew when pyproject.toml changes; torch is named each time, so that nothing replaces it.
.venv/.has-%: pyproject.toml .venv/.torch-$(TORCH)
	@echo "Installing funclora[$*]"
	@$(INSTALL) --editable ".[$*]"
	@touch $@

.venv/.torch-$(TORCH): .venv/.made
	@echo "Installing torch $(TORCH): once, and it can take minutes"
	@$(INSTALL)
	@touch $@

# A .venv that is there and works is kept. Debian's Python may come without ensurepip: apt has it.
.venv/.made:
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
		"$$found" -m venv --clear .venv; \
	fi; \
	touch $@
