# make demo    set up, train the shipped default, caption image_test/          make test    everything but the gpu tests
# make bases   make the embedded bases again (about an hour on one core each)  make lint    ruff and mypy

SHELL := /bin/bash
PYTHON := .venv/bin/python
RUNS := lora_blip_output
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-blip2 test lint bases clean

demo: .venv/.plots
	@$(PYTHON) -m toyworld.demo

demo-blip2: .venv/.plots
	@$(PYTHON) -m toyworld.demo --model assets/tiny-blip2 --targets vit,qformer

test: .venv/.dev
	$(PYTHON) -m pytest -m "not gpu"

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bases: .venv/.plots
	$(PYTHON) -m toyworld.pretrain blip --out assets/tiny-blip
	$(PYTHON) -m toyworld.pretrain blip2 --out assets/tiny-blip2

.venv/.plots .venv/.dev: .venv/.%: pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(if $(filter dev,$*),plots$(comma)dev,plots)]'
	@touch $@

comma := ,

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
