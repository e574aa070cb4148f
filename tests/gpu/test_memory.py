"""Training and inference with too little memory, and the estimate of the memory of a step."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from lora_blip.data.example import Example
from lora_blip.errors import TrainingError
from lora_blip.inference.batch_runner import Runner
from lora_blip.lora import adapter_file
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import preflight
from lora_blip.training.learner import Learner
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.gpu import peak_of, starve
from tests.support.models import batch_of, inject
from tests.support.runs import before_each_step, config_of

FEW_TOKENS = Generation(max_new_tokens=3)


def test_the_memory_estimate_is_close_to_the_measured_memory(checkpoints, device):
    """The estimate counts what autograd keeps. The peak of forward and backward is at most half larger or smaller."""
    backbone = load_backbone(str(checkpoints["opt"]), device)
    inject(backbone, trained=False)
    task = CaptionTask(backbone)
    batch = batch_of(task, ["a red cube"] * 64)
    task.loss(batch).backward()  # workspaces of the libraries are there now
    estimates: list[int] = []
    taken = peak_of(device, lambda: estimates.append(preflight.check_gradients(task, batch)))
    assert 0.5 * taken <= estimates[0] <= 1.5 * taken


def test_a_training_out_of_memory_prints_advice_and_resumes(checkpoints, tmp_path, device):
    """A run that has too little memory raises TrainingError with the batch size, and resumes when memory is free again."""
    config = config_of(checkpoints, tmp_path, device=device, epochs=2, batch_size=12, val_fraction=0.0, num_workers=0)
    with ExitStack() as blocks, pytest.raises(TrainingError, match="ran out of memory at batch_size = 12") as error:
        patch = blocks.enter_context(pytest.MonkeyPatch.context())

        def starve_once(count: int, _: Learner) -> None:
            if count == 2:
                starve(device, 2**18, blocks)

        before_each_step(patch, starve_once)
        train(config)
    assert "saved after step 1" in str(error.value)
    assert adapter_file.read(train(config)).metadata["training"]["finished"]


def test_out_of_memory_halves_the_batch_and_loses_nothing(checkpoints, device):
    """With little free memory, inference halves the batch and returns all texts, equal to those on the CPU."""
    count = 512 if device == "cuda" else 64
    examples = [Example(Path(f"{n}.png"), "", f"{n}.png", 1) for n in range(count)]
    pictures = torch.randn(count, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))
    task = CaptionTask(load_backbone(str(checkpoints["blip"]), device), "", FEW_TOKENS)
    warnings: list[str] = []
    runner = Runner(task, count, report=warnings.append)
    needed = peak_of(device, lambda: task.predict(pictures.to(device), examples))
    with ExitStack() as blocks:
        starve(device, needed * 3 // 4, blocks)
        texts = list(runner._compute_with_fallback(pictures, examples, lambda task, some, asked: task.predict(some, asked)))
    on_cpu = CaptionTask(load_backbone(str(checkpoints["blip"]), "cpu"), "", FEW_TOKENS)
    assert len(warnings) == 1 and "continuing with batches of at most" in warnings[0]
    assert len(texts) == count and texts[:8] == on_cpu.predict(pictures[:8], examples[:8])
