"""What only a CUDA device can show: real fp16 and bf16, merging there, and the memory that was foretold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_blip import adapter, lora, preflight
from lora_blip.data.annotations import Example
from lora_blip.loop import train
from lora_blip.models import load_backbone
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.task import Generation
from tests import tiny
from tests.conftest import WHOLE, batch_of, inject
from tests.test_loop import metrics_of, settings

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def questions(folder: Path) -> Path:
    """Every photo asked what it shows."""
    source = tiny.write_photos(folder)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    asked = [{"image": line["image"], "question": "what is it?", "answers": [line["text"], "a picture"]} for line in lines]
    source.write_text("\n".join(map(json.dumps, asked)))
    return source


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", WHOLE)
def test_training_on_the_gpu_learns_and_loads_on_the_cpu(checkpoints, make, tmp_path, kind, precision):
    if (kind, precision) == ("t5", "fp16"):
        pytest.skip("refused, as it must be: T5 gives NaN in fp16")
    source = questions(tmp_path) if kind == "vqa" else tiny.write_photos(tmp_path)
    config = settings(checkpoints[kind], source, targets=WHOLE[kind], epochs=8, num_workers=2)
    path = train(replace(config, device=DEVICE, precision=precision, max_skipped=40))
    scores = [entry["val_loss"] for entry in metrics_of(path) if "val_loss" in entry]
    assert scores[-1] < 0.95 * scores[0]
    adapter.load(make(kind), path)


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("bf16", 0.15), ("fp16", 0.02)])
def test_merged_is_hooked_on_the_gpu(checkpoints, dtype, bound):
    backbone = load_backbone(str(checkpoints["blip"]), "cuda", dtype)
    inject(backbone)
    task = CaptionTask(backbone)
    batch = batch_of(task)
    with torch.no_grad():
        hooked = task.logits(batch).float()
        lora.merge(backbone.model)
        merged = task.logits(batch).float()
    assert (merged - hooked).abs().max() <= bound * hooked.abs().max()


def test_the_memory_foretold_is_the_memory_taken(checkpoints):
    backbone = load_backbone(str(checkpoints["opt"]), "cuda")
    inject(backbone, trained=False)
    task = CaptionTask(backbone)
    batch = batch_of(task, ["a red cube"] * 64)
    task.loss(batch).backward()  # workspaces of the libraries are there now
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = preflight.check_gradients(task, batch)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.5 * taken <= kept <= 1.5 * taken


def test_out_of_memory_halves_the_batch_and_loses_nothing(checkpoints):
    """A real shortage: the process may have little more than the weights; every answer is as on the CPU."""
    from lora_blip.runner import Runner

    examples = [Example(Path(f"{n}.png"), "", f"{n}.png", 1) for n in range(512)]
    pictures = torch.randn(512, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
    task = CaptionTask(load_backbone(str(checkpoints["blip"]), DEVICE), "", Generation(max_new_tokens=3))
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    try:
        said = Runner(task, 512)._attempt(pictures, examples, lambda task, some, asked: task.predict(some, asked))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    on_cpu = CaptionTask(load_backbone(str(checkpoints["blip"]), "cpu"), "", Generation(max_new_tokens=3))
    assert len(said) == 512 and said[:8] == on_cpu.predict(pictures[:8], examples[:8])
