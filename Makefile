# `make train` and `make test` need Python 3.11 (or newer) and nothing else; they set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= 2

.PHONY: train test lint format report methods clean

train: $(READY)  ## a language model learns the Python standard library's source text
	$(BIN)/odjax train configs/lm_stdlib.py

test: $(READY)  ## everything: lint, doctests, properties, sharding, resume
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

report: $(READY)  ## the plots of the main job
	$(BIN)/odjax report runs/lm_stdlib

methods: $(READY)  ## the table of methods in README.md, from the registry
	$(BIN)/python -m odjax_train.readme README.md

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 on the PATH; set PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"odjax needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; set PYTHON=/path/to/python")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,interop]'
	@touch $(READY)

clean:  ## removes the environment; runs/ stays
	rm -rf $(VENV)
