"""Compare twenty losses of each fast path with those of the plain path, from equal weights: `python -m benchmarks.rows.losses`.

The model is the embedded tiny base with its images, and with adapters on the ViT and the text decoder.

The bound of fp32 is that of the tests. In bf16, the rounding errors of twenty updates add up. The plain path in bf16 differs
from fp32 by some e, and so does each other path. Two paths in bf16 may therefore differ by 2 e, which is the bound.
"""

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_blip.cli import report_errors

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.contestants import ours
from benchmarks.suite.plan import ALPHA, RATE, R
from lora_blip.data import annotations
from lora_blip.data.images import open_image
from lora_blip.data.loader import HostBatch, Slot, pixel_values
from lora_blip.kernels import paths
from lora_blip.kernels import switch as attention
from lora_blip.lora import attached, injection, targets
from lora_blip.models import weights
from lora_blip.models.loading import open_backbone
from lora_blip.models.precision import autocasting
from lora_blip.tasks.base import Task
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.learner import Learner
from lora_blip.training.loop import accumulate_gradients, update_parameters

MODEL, DATA, STEPS, TEXTS = "assets/tiny-blip", "annotations.jsonl", 20, 5
BOUND, BOUND_OF_CACHED = 1e-5, 1e-3  # in fp32


@dataclass(frozen=True)
class Way:
    """One fast path. Everything else uses the plain computation."""

    name: str
    update: bool = False
    short: bool = False
    attention: bool = False
    packed: bool = False
    cast: bool = False
    compiled: bool = False
    precisions: tuple[str, ...] = ("fp32", "bf16")


WAYS = (
    Way("the update in one function", update=True),
    Way("the short update of small linears", update=True, short=True),
    Way("attention, MLPs and products", attention=True),
    Way("texts of a picture packed", packed=True),
    Way("frozen weights cast once", cast=True, precisions=("bf16",)),
    Way("the loss compiled", compiled=True),
    Way("the loss with fast attention compiled", attention=True, packed=True, compiled=True),
    Way("all of them", update=True, attention=True, packed=True, cast=True),
)


def losses(how: Way, precision: str) -> list[float]:
    """Return the mean loss per label token at each of twenty steps of AdamW, for two images with five texts each."""
    torch.manual_seed(0)
    backbone = open_backbone(MODEL, "cpu", precision, fast=how.packed)[0]
    attention.fast(backbone.model, how.attention)
    injection.inject(backbone.model, targets.find(backbone.model, "vit,text", R, ALPHA))
    attached.fast(backbone.model, how.update)
    paths.use(replace(paths.row(), fused=paths.NEVER if how.short else 0))
    if how.cast:
        weights.cast_once(backbone, precision)
    backbone.model.train()
    task = CaptionTask(backbone)
    if how.compiled:
        task.compile_loss()
    learner = Learner(task, RATE, precision=precision, autocast=autocasting(backbone.device, precision))
    batch = task.batch(stack(task))
    return [_loss_of_a_step(learner, batch) for _ in range(STEPS)]


def stack(task: Task) -> HostBatch:
    """Return a batch of two images with five texts each. Only the first text of an image describes it."""
    lines = annotations.read(DATA, decode=False, report=lambda _: None)[0][: 2 * TEXTS]
    looked = [lines[0].image, lines[TEXTS].image]
    pixels = [pixel_values(open_image(image), task.backbone.image_processor) for image in looked]
    return HostBatch(lines, torch.stack(pixels), [number // TEXTS for number in range(2 * TEXTS)])


def _loss_of_a_step(learner: Learner, batch: Any) -> float:
    slot = Slot(0)
    learner.begin_step([batch], [slot])
    accumulate_gradients(learner, batch, slot, is_last=True)
    return update_parameters(learner, RATE).loss


def cached(where: str) -> tuple[list[float], list[float]]:
    """Return the losses without a cache, and those of a run that reads all states of the frozen part from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"targets": where, "augment": False, "val_fraction": 0.0, "max_steps": STEPS, "epochs": STEPS}
        runs = [
            [line["loss"] for line in ours.run(Path(MODEL), Path(DATA), Path(folder), **given, cache_gb=size)]
            for size in (0.0, 1.0, 1.0)
        ]
    return runs[0], runs[2]


def rows() -> Iterator[tuple[str, str, float, list[float], list[float]]]:
    """Yield name, precision, bound, the losses of the plain path, and those of the fast path.

    In the row of the plain path in bf16, they are those of fp32 and of bf16, and the bound is infinite.
    """
    exact, rounded = losses(Way("plain"), "fp32"), losses(Way("plain"), "bf16")
    for how in WAYS:
        if "fp32" in how.precisions:
            yield how.name, "fp32", BOUND, exact, losses(how, "fp32")
    yield "the plain path (above: in fp32)", "bf16", math.inf, exact, rounded
    bound = 2 * largest_difference(exact, rounded)
    for how in WAYS:
        yield how.name, "bf16", bound, rounded, losses(how, "bf16")
    for where in ("text", "vit[2:4]"):
        yield f"the frozen part kept, adapters on {where}", "fp32", BOUND_OF_CACHED, *cached(where)


def largest_difference(expected: list[float], actual: list[float]) -> float:
    """Return the largest relative difference of two lists of losses."""
    return max(abs(a - b) / a for a, b in zip(expected, actual, strict=True))


def main() -> int:
    # without limits, the tiny base takes every path
    paths.use(replace(paths.row(), onednn=0, onednn_narrow=0, gelu_bytes=0, by_heads=0))
    print(f"{'':50}{'bound':>8}{'largest':>10}   losses of steps 1, 5, 10, 15, 20: plain above, fast below")
    whole = True
    for name, precision, bound, plain, fast in rows():
        largest = largest_difference(plain, fast)
        whole = whole and largest <= bound
        print(f"{name + ', ' + precision:50}{bound:8.1e}{largest:10.2e}   {shown(plain)}\n{'':71}{shown(fast)}", flush=True)
    print("all are within the bounds" if whole else "some are not within the bounds")
    return 0 if whole else 1


def shown(some: list[float]) -> str:
    return "  ".join(f"{some[number]:.6f}" for number in (0, 4, 9, 14, 19))


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
