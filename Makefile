# make demo        set up, train on the cubes, caption image_test/ (demo-blip2: the same with BLIP-2)
# make demo-vqa, make demo-retrieval    the same for questions about the pictures, and for finding their texts
# make test        the tests, in two processes (JOBS=4: four)        make slow    the tests that take over 10 s each
# make lessons     run the twelve lessons about LoRA and their solutions, at most ten minutes
# make docs        the site with executed lessons, and notebooks for Colab (REPOSITORY=https://… is where they find the code)
# make lessons-spread    lessons 5, 6 and 11 with seeds 0, 1 and 2; writes lessons/spread.md
# make lint        ruff and mypy
# make bench       ratios to peft, measured side by side       make bases   pre-train the embedded bases again, 3 hours
# make test-gpu    the tests that need a GPU (make test and make slow run the same tests on the CPU)
# make bench-gpu   the rows that matter on a GPU, at most nine minutes; QUICK=1: the smallest models, also on a CPU, to check that it runs
# make chaos       kill a training fifty times, in fp32 and in bf16, and compare its bytes with an uninterrupted one
# make versions    compare the fast and the plain path on each supported version of transformers; run the core tests on two
# make wheel       dist/lora_blip-….whl with the embedded bases, for another machine: pip install dist/*.whl
# make mutants     put small faults into the source and list those that no test detects, at most 90 minutes

SHELL := /bin/bash
PYTHON := .venv/bin/python
JOBS ?= 2
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONDONTWRITEBYTECODE  # some systems set it: then every process compiles the 2,600 modules of the libraries again

.PHONY: demo demo-blip2 demo-vqa demo-retrieval test slow test-gpu lessons lessons-spread docs lint bench bench-gpu chaos versions mutants bases wheel clean

demo: .venv/.plots
	@$(PYTHON) -m toyworld.demo caption

demo-blip2: .venv/.plots
	@$(PYTHON) -m toyworld.demo caption --model assets/tiny-blip2 --targets vit,qformer --alpha 128 --lr 1e-3 --batch-size 16 --epochs 60

demo-vqa: .venv/.plots
	@$(PYTHON) -m toyworld.demo vqa

demo-retrieval: .venv/.plots
	@$(PYTHON) -m toyworld.demo retrieval

test: .venv/.dev
	$(PYTHON) -m pytest -m "not gpu and not slow" -n $(JOBS) --dist worksteal

slow: .venv/.dev
	$(PYTHON) -m pytest -m "slow and not gpu" -n $(JOBS) --dist worksteal

test-gpu: .venv/.dev
	$(PYTHON) -m pytest -m gpu

lessons: .venv/.plots
	$(PYTHON) -m lessons

lessons-spread: .venv/.plots
	$(PYTHON) -m lessons.spread

docs: .venv/.docs
	@REPOSITORY=$(REPOSITORY) $(PYTHON) docs/site/build.py

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.dev
	$(PYTHON) -m benchmarks.studies.paths
	$(PYTHON) -m benchmarks

bench-gpu: .venv/.dev
	$(PYTHON) -m benchmarks --only card,generate,epoch,merge,card_compiled --rounds 3 --minutes 9 $(if $(QUICK),--quick)

chaos: .venv/.plots
	$(PYTHON) -m benchmarks.robustness.chaos --precision fp32
	$(PYTHON) -m benchmarks.robustness.chaos --precision bf16

versions: .venv/.dev
	$(PYTHON) -m benchmarks.robustness.versions --tests

mutants: .venv/.dev
	$(PYTHON) -m benchmarks.robustness.mutants

bases: .venv/.plots
	$(PYTHON) -m toyworld.pretrain blip --out assets/tiny-blip
	$(PYTHON) -m toyworld.pretrain blip2 --out assets/tiny-blip2
	$(PYTHON) -m toyworld.task_bases vqa --out assets/tiny-blip-vqa
	$(PYTHON) -m toyworld.task_bases itm --out assets/tiny-blip-itm

wheel: .venv/.plots
	@echo "Building the wheel: a few seconds, longer the first time."
	@rm -rf build lora_blip.egg-info
	@$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@rm -rf build lora_blip.egg-info
	@ls dist/lora_blip-*.whl

EXTRAS_plots := plots
EXTRAS_dev := plots,dev
EXTRAS_docs := plots,docs

.venv/.plots .venv/.dev .venv/.docs: .venv/.%: pyproject.toml constraints.txt
	@test -d .venv/lib/python3*/site-packages/torch && echo "Installing further libraries into .venv, once: less than a minute." || \
		echo "Installing torch, transformers and their libraries into .venv, once: about two minutes, longer with CUDA's libraries."
	@test -x $(PYTHON) || python3 -m venv .venv
	@$(PYTHON) -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt \
		-e '.[$(EXTRAS_$*)]' & pip=$$!; seconds=0; \
	while kill -0 $$pip 2>/dev/null; do sleep 1; seconds=$$((seconds + 1)); \
		test $$((seconds % 9)) -ne 0 || echo "… installing: $$seconds s, $$(du -sm .venv 2>/dev/null | cut -f1) MB in .venv"; done; \
	wait $$pip
	@touch $@

clean:
	rm -rf docs/_build .venv .pytest_cache .mypy_cache .ruff_cache
