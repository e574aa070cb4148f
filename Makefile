# make demo        set up, train the shipped default, caption image_test/ (demo-blip2: the same with BLIP-2)
# make test        every test but those that need a GPU        make lint    ruff and mypy
# make bench       ratios to peft, measured side by side       make bases   pre-train the embedded bases again, about an hour

SHELL := /bin/bash
PYTHON := .venv/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-blip2 test lint bench bases clean

demo: .venv/.plots
	@$(PYTHON) -m toyworld.demo

demo-blip2: .venv/.plots
	@$(PYTHON) -m toyworld.demo --model assets/tiny-blip2 --targets vit,qformer --alpha 128 --lr 1e-3 --batch-size 16

test: .venv/.dev
	$(PYTHON) -m pytest -m "not gpu"

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.dev
	$(PYTHON) -m benchmarks.step

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
