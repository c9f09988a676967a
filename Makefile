# `make train` and `make test` need Python 3.11 (or newer) and nothing else; they set up .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBTPU := $(VENV)/libtpu
JOBS ?= 2

.PHONY: train compare test interop aot lint format report methods clean

train: $(READY)  ## a language model learns the Python standard library, then RAC-LoRA adapts it to English prose
	$(BIN)/odjax train configs/lm_stdlib.py
	$(BIN)/odjax train configs/lm_rac_lora.py

compare: train  ## the same adaptation by LoRA and by full fine-tuning, in one report
	$(BIN)/odjax train configs/lm_rac_lora.py --method lora --run runs/lm_lora
	$(BIN)/odjax train configs/lm_rac_lora.py --method full --run runs/lm_full
	$(BIN)/odjax report runs/lm_rac_lora runs/lm_lora runs/lm_full --out runs/compare.html

test: $(READY) $(LIBTPU)/.ready  ## everything: lint, doctests, properties, sharding, resume, ahead-of-time compiles
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	TPU_LIBRARY_PATH=$(CURDIR)/$(LIBTPU)/libtpu/libtpu.so $(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder --max-worker-restart 0

interop: $(READY)  ## exchange with PyTorch, PEFT and transformers, and real weights (installs them)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,interop]'
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope tests/io tests/models/test_bert.py

aot: $(READY) $(LIBTPU)/.ready  ## kernels compiled ahead of time for every kind of TPU, a plan by the GPU compiler
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
	  --target $(VENV)/cuda --upgrade jax-cuda13-plugin jax-cuda13-pjrt
	PYTHONPATH=$(VENV)/cuda $(BIN)/python -m pytest tests/train/test_plan_gpu.py
	TPU_LIBRARY_PATH=$(CURDIR)/$(LIBTPU)/libtpu/libtpu.so $(BIN)/python -m pytest -m '' tests/kernels/test_aot.py tests/train/test_plan_tpu.py

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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(READY)

# The TPU compiler lies beside the environment's packages and not among them: JAX would look for a TPU at every start.
$(LIBTPU)/.ready: constraints.txt $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
	  --target $(LIBTPU) --upgrade libtpu || echo "no TPU compiler for this machine: its tests are skipped"
	@mkdir -p $(LIBTPU) && touch $@

clean:  ## removes the environment; runs/ stays
	rm -rf $(VENV)
