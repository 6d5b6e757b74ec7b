# Everything runs in .venv, which is built on first use and again when its inputs change.
# Needs Python >= 3.11 (with venv and headers) and a C++ compiler; nothing else.

PYTHON ?= $(firstword $(foreach p,python3.11 python3,\
  $(if $(shell $(p) -c 'import sys; print(1) if sys.version_info >= (3, 11) else None' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-all models lint docs pictures clean

# The graphs of a transformers GPT-2 before and after, then a short training of three small GPTs.
# One thread: models this small gain little from two, and lose a lot where cores are shared.
demo: export OMP_NUM_THREADS := 1
demo: $(STAMP)
	$(BIN)/mhc-compile dump hf:gpt2 --out mhc_dump/gpt2
	$(BIN)/python examples/train_gpt.py --steps 60

# Two processes, each file in one of them (files share models, and what is interpreted) unless its
# tests name groups.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not bench"

test-all: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[iree]'
	$(PYTEST) -m "not gpu and not bench"

# Every architecture of the zoo, for docs/models.md: an hour and more.
models: $(STAMP)
	$(BIN)/python -m tests.models.matrix --all

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Strict: a dead link or an unknown name in the API pages fails the build.
docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict --site-dir .cache/site

# The pictures of README and docs, as the code draws them now.
pictures: $(STAMP)
	$(BIN)/python -m docs.pictures

# timm and diffusers serve as test models only. Without their dependencies, because torchvision has to
# match torch exactly and nothing of it is used (tests put a stand-in in place while timm imports).
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,test,mlir,plots]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps timm diffusers
	touch $@

clean:
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist mhc_dump *.egg-info
