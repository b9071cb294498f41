# make quickstart   from nothing to samples: environment, data, a trained baby GPT, its text
# make test         the linter and the tests (three to four minutes on two cores)
# make test-slow    the slow ones (nine to eleven minutes)

PYTHON ?= python3
PY := .venv/bin/python
INSTALL = $(PY) -m pip install -c constraints.txt

# on Linux PyTorch's default build brings CUDA, several GB. Without an NVIDIA driver take the CPU's, if its index can be reached
CPU_BUILD = $$(test "$$(uname)" != Linux || command -v nvidia-smi > /dev/null || echo --retries=0 --extra-index-url=https://download.pytorch.org/whl/cpu)

# a GPU takes the larger model by itself
CONFIG = $$($(PY) -c "import torch; print('config/train_shakespeare_char' + ('' if torch.cuda.is_available() else '_fast') + '.py')")

.PHONY: quickstart test test-slow

quickstart: .venv/installed
	@set -e; \
	echo "quickstart: prepares tiny Shakespeare, trains $(CONFIG) on it and prints samples:"; \
	echo "quickstart: half a minute on two CPU cores; every step is a command you can type"; \
	if $(PY) data/shakespeare_char/prepare.py --timeout=10; then name=shakespeare; \
	else echo "quickstart: no tiny Shakespeare, so it goes on with Python's language reference"; \
	     $(PY) data/pydocs_char/prepare.py; name=pydocs; fi; \
	out=out-$$name-char; \
	$(PY) train.py $(CONFIG) --dataset=$${name}_char --out_dir=$$out; \
	$(PY) sample.py --out_dir=$$out --num_samples=3 --max_new_tokens=400; \
	echo "checkpoint: $$out/ckpt.pt   loss curve: $$out/loss.png   more text: $(PY) sample.py --out_dir=$$out"

test: .venv/installed-tests
	$(PY) -m ruff check
	$(PY) -m pytest -m "not slow"

test-slow: .venv/installed-tests
	$(PY) -m pytest -m slow

# the venv is complete when the file at its end is there, and is brought up to date when the lists change
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or newer is needed: make PYTHON=python3.11')"
	@echo "installing PyTorch and the rest into .venv, once: minutes, as the network allows"
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(INSTALL) --no-deps $(CPU_BUILD) torch
	$(INSTALL) -e .
	touch $@

.venv/installed-tests: .venv/installed
	$(INSTALL) -e '.[test]'
	touch $@
