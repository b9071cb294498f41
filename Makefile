# make quickstart   from nothing to samples: environment, data, a trained baby GPT, its text
# make test         the linter and the tests (five minutes on two cores)
# make test-slow    the slow ones (eight minutes)

PYTHON ?= python3
PY := .venv/bin/python
INSTALL = $(PY) -m pip install -c constraints.txt

# on Linux PyTorch's default build brings CUDA, several GB: without an NVIDIA driver take the CPU's,
# if its index can be reached
CPU_BUILD = $$(test "$$(uname)" != Linux || command -v nvidia-smi > /dev/null || \
	echo --retries=0 --extra-index-url=https://download.pytorch.org/whl/cpu)

# a GPU takes the larger model by itself
HAS_GPU = import sys, torch; sys.exit(not torch.cuda.is_available())
CONFIG = $$($(PY) -c "$(HAS_GPU)" && echo config/train_shakespeare_char.py \
	|| echo config/train_shakespeare_char_fast.py)

.PHONY: quickstart test test-slow

quickstart: .venv/installed
	@set -e; \
	config=$(CONFIG); \
	echo "quickstart: prepares tiny Shakespeare, trains $$config on it and prints samples:"; \
	echo "quickstart: half a minute on two CPU cores; every step is a command you can type"; \
	if $(PY) data/shakespeare_char/prepare.py --timeout=10; then name=shakespeare; \
	else echo "quickstart: no tiny Shakespeare, so it goes on with Python's language reference"; \
	     $(PY) data/pydocs_char/prepare.py; name=pydocs; fi; \
	out=out-$$name-char; \
	$(PY) train.py $$config --dataset=$${name}_char --out_dir=$$out; \
	$(PY) sample.py --out_dir=$$out --num_samples=3 --max_new_tokens=400; \
	echo "checkpoint: $$out/ckpt.pt   loss curve: $$out/loss.png"; \
	echo "more text: $(PY) sample.py --out_dir=$$out"

test: .venv/installed-tests
	$(PY) -m ruff check
	$(PY) -m pytest -n 2 -m "not slow"

test-slow: .venv/installed-tests
	$(PY) -m pytest -n 2 -m slow

OLD = error: Python 3.11 or newer is needed: make PYTHON=python3.11

# the venv is complete when this file is there, and brought up to date when the lists change
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and '$(OLD)')"
	@echo "installing PyTorch and the rest into .venv, once: minutes, as the network allows"
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(INSTALL) --no-deps $(CPU_BUILD) torch
	$(INSTALL) -e .
	touch $@

.venv/installed-tests: .venv/installed
	$(INSTALL) -e '.[test]'
	touch $@
