"""With each setting, a run has the losses of transformers' own computation on the CPU in float32."""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import which

import pytest
import torch

from lora_blip.config import TrainConfig
from lora_blip.lora import adapter_file
from lora_blip.lora.sites import quantization
from lora_blip.models import loading
from lora_blip.training import setup
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.gpu import HALF, assert_as_on_the_cpu, assert_near, pairs, trained
from tests.support.models import WHOLE
from tests.support.runs import elsewhere, metrics_of, questions, settings

BLIPS, FAST = ["blip", "opt", "t5"], ("blip", "bf16")
NEEDS_A_COMPILER = pytest.mark.skipif(not which("g++"), reason="torch.compile needs a compiler")
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    not importlib.util.find_spec("bitsandbytes"), reason='bitsandbytes is not installed: pip install "lora_blip[quantized]"'
)


def config_for(
    checkpoints: dict[str, Path], folder: Path, kind: str, device: str, precision: str, **changes: object
) -> TrainConfig:
    """Return settings of nine steps without random draws on the device, because the CPU would draw other numbers."""
    options = {"epochs": 3, "batch_size": 4, "dropout": 0.0, "targets": WHOLE[kind], "val_fraction": 0.0}
    source = questions(folder) if kind == "vqa" else tiny.write_photos(folder)
    return settings(checkpoints[kind], source, device=device, precision=precision, **options | changes)


@pytest.mark.parametrize(("kind", "precision"), pairs([*WHOLE], ["fp32", *HALF], fast=FAST))
def test_training_learns_and_its_adapter_loads_on_the_cpu(checkpoints, make, tmp_path, device, kind, precision):
    """With worker processes, pinned memory, and the first loss scale of a run, at which fp16 may skip steps."""
    source = questions(tmp_path) if kind == "vqa" else tiny.write_photos(tmp_path)
    config = settings(checkpoints[kind], source, targets=WHOLE[kind], epochs=8, num_workers=2)
    path = train(replace(config, device=device, precision=precision, max_skipped=40))
    scores = [entry["val_loss"] for entry in metrics_of(path) if "val_loss" in entry]
    assert scores[-1] < 0.95 * scores[0]
    adapter_file.load(make(kind), path)


@pytest.mark.parametrize(("kind", "precision"), pairs(["blip", "opt", "t5", "vqa"], ["fp32", *HALF]))
def test_a_run_has_the_losses_of_the_cpu(checkpoints, tmp_path, device, kind, precision):
    """Retrieval is left out, because it draws its negatives on the device, and the CPU draws others."""
    config = config_for(checkpoints, tmp_path, kind, device, precision)
    assert_as_on_the_cpu(config, trained(config))


@pytest.mark.parametrize(("kind", "precision"), pairs(BLIPS, fast=FAST))
def test_checkpointing_computes_the_same(checkpoints, tmp_path, monkeypatch, device, kind, precision):
    """The recomputation, in autograd's thread of the device, uses the adapters of the forward."""
    real, contexts = loading.recompute_contexts, []
    monkeypatch.setattr(loading, "recompute_contexts", lambda model: contexts.append(1) or real(model))
    config = config_for(checkpoints, tmp_path, kind, device, precision, checkpointing=True)
    path = trained(config)
    assert contexts
    assert_as_on_the_cpu(config, path)


@pytest.mark.parametrize("where", ["first block", "text"])
@pytest.mark.parametrize(("kind", "precision"), pairs(BLIPS))
def test_the_cache_of_the_frozen_part_changes_nothing(checkpoints, tmp_path, device, kind, precision, where):
    """The first epoch computes and stores the states of each image, and later epochs read them."""
    targets = {"first block": "vit[1:2]", "text": "text" if kind == "blip" else "lm"}[where]
    rate = {"lr": 3e-2, "epochs": 8} if where == "first block" else {}  # one block alone learns slowly
    config = config_for(checkpoints, tmp_path, kind, device, precision, targets=targets, cache_gb=1.0, **rate)
    path = trained(config)
    kinds = [json.loads(each.read_text())["of"] for each in Path(config.output_dir, ".cache").rglob("kind.json")]
    assert "states" in kinds
    assert_as_on_the_cpu(config, path)


@pytest.mark.parametrize(("kind", "precision"), pairs([*BLIPS, "vqa"], fast=FAST))
def test_several_captions_of_an_image_are_packed_into_one_row(checkpoints, tmp_path, device, kind, precision):
    """Each image has three lines. The oracle has one padded row for each text."""
    config = config_for(checkpoints, tmp_path, kind, device, precision)
    source = Path(config.annotations)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    text = "question" if kind == "vqa" else "text"
    several = [line | {text: f"{line[text]}{end}"} for line in lines for end in ("", " on a table", " or two")]
    source.write_text("\n".join(map(json.dumps, several)))
    assert_as_on_the_cpu(config, trained(config))


@pytest.mark.parametrize(("kind", "precision"), pairs(BLIPS, fast=FAST))
def test_dora_trains_as_on_the_cpu(checkpoints, tmp_path, device, kind, precision):
    """The norms of W + ΔW are computed in float32 on both. The magnitudes also agree."""
    config = config_for(checkpoints, tmp_path, kind, device, precision, variant="dora")
    path = trained(config)
    assert_as_on_the_cpu(config, path)
    truth = next(Path(elsewhere(config, "truth").output_dir).glob("20*/adapter.safetensors"))
    ours, theirs = (adapter_file.read(each).tensors for each in (path, truth))
    names = [name for name in ours if name.endswith(".magnitude")]
    assert_near([ours[name] for name in names], [theirs[name] for name in names], 0.02)


@pytest.mark.slow
@NEEDS_A_COMPILER
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_a_compiled_step_computes_the_same(checkpoints, tmp_path, monkeypatch, device, kind, precision, variant):
    """On CUDA, inductor compiles it. The rehearsal executes the captured graphs with PyTorch's own kernels."""
    if device == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = config_for(checkpoints, tmp_path, kind, device, precision, compile=True, variant=variant)
    path = trained(config)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] and not counted["graph_break"]
    assert_as_on_the_cpu(config, path)


@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"])
@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
@pytest.mark.parametrize(("kind", "precision"), pairs(BLIPS))
def test_a_quantized_base_trains_as_on_the_cpu(
    checkpoints, tmp_path, monkeypatch, device, kind, precision, base_dtype, checkpointing
):
    """The oracle has the same base in 8 or 4 bits on the CPU."""
    kinds = []
    real = setup.refuse_quantized
    monkeypatch.setattr(setup, "refuse_quantized", lambda config, dtype: kinds.append(dtype) or real(config, dtype))
    changes = {"base_dtype": base_dtype, "checkpointing": checkpointing}
    config = config_for(checkpoints, tmp_path, kind, device, precision, **changes)
    path = trained(config)
    assert kinds == [base_dtype]
    assert_as_on_the_cpu(config, path)


@pytest.mark.slow
@NEEDS_BITSANDBYTES
@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_a_quantized_weight_is_that_of_the_cpu(checkpoints, device, base_dtype):
    """The dequantized weights of each linear agree. A value halfway between two codes may be rounded to either."""
    from lora_blip.kernels.quantized import dequantized
    from lora_blip.models.quantized import quantized_linears

    models = [loading.load_backbone(str(checkpoints["opt"]), where, base_dtype).model for where in (device, "cpu")]
    ours, theirs = ([dequantized(linear) for linear in quantized_linears(model).values()] for model in models)
    assert quantization(models[0]) == base_dtype
    assert_near(ours, theirs, 5e-3)
