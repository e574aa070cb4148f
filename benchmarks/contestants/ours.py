"""The contestant lora_blip, through its public functions. If these change, only this file must change, and no row.

A model is opened from a checkpoint, as users do it, so that all that lora_blip does when it opens a model is measured.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.suite.plan import ALPHA, RATE, R
from benchmarks.suite.sizes import save
from benchmarks.suite.work import Work
from lora_blip.config import TrainConfig
from lora_blip.data.dataset import Caches, ImageDataset
from lora_blip.data.disk_cache import Store, _digest
from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch, Slot
from lora_blip.lora import adapter_file, injection, merging, targets
from lora_blip.models import weights
from lora_blip.models.loading import Backbone, open_backbone
from lora_blip.models.precision import autocasting
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.learner import Learner
from lora_blip.training.loop import accumulate_gradients, train, update_parameters


class Training:
    """A model with adapters, and the learner of the training loop: forward, backward, clipping, AdamW."""

    def __init__(
        self, base: Backbone, work: Work, precision: str, where: str = "vit", r: int = R, compiled: bool = False,
        variant: str = "lora", packs: bool = True,
    ) -> None:  # fmt: skip
        backbone = opened(base, precision)
        self.task = CaptionTask(backbone)
        self.task.packs = packs
        self.model = backbone.model
        injection.inject(self.model, targets.find(self.model, where, r, ALPHA, variant))
        weights.cast_once(backbone, precision)
        self.model.train()
        self.autocast = autocasting(backbone.device, precision)
        self.learner = Learner(self.task, RATE, 0.01, 1.0, precision, self.autocast)
        self.batch = batch_of(self.task, work)
        if compiled:
            self.compile()

    def compile(self, **options: Any) -> None:
        self.task.compile_loss(**options)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.task.loss(self.batch) / self.batch.count

    def step(self) -> None:
        slot = Slot(0)
        self.learner.begin_step([self.batch], [slot])
        accumulate_gradients(self.learner, self.batch, slot, is_last=True)
        update_parameters(self.learner, RATE)


def batch_of(task: CaptionTask, work: Work) -> DeviceBatch:
    """Return a batch as the loader makes it: a line for each caption, and each image once."""
    lines = [(number, text) for number, texts in enumerate(work.texts) for text in texts]
    examples = [Example(Path(f"{number}.jpg"), text, f"{number}.jpg", line) for line, (number, text) in enumerate(lines, 1)]
    image_index = [number for number, _ in lines]
    is_identity = image_index == list(range(len(image_index)))
    return task.batch(HostBatch(examples, work.pixel_values, None if is_identity else image_index))


def opened(base: Backbone, precision: str) -> Backbone:
    """Return a separate model with the same weights."""
    with TemporaryDirectory() as folder, silent():
        return open_backbone(str(save(base, Path(folder) / "model")), str(base.device), precision)[0]


# ---------------------------------------------------------------- whole runs


def epochs(model: Path, annotations: Path, output: Path, count: int, **settings: Any) -> list[float]:
    """Return the mean seconds of a step in each epoch of `train`, from the log of the run.

    The first step is left out, because the checks of the run decode its images before the clock starts.
    """
    plain: dict[str, Any] = {"val_fraction": 0.0, "augment": False, "alpha": ALPHA, "lr": 1e-4, "num_workers": 0}
    log = run(model, annotations, output, epochs=count, **plain | settings)
    ends = [line["seconds"] for line in log]
    each = [(line["epoch"], end - start) for line, start, end in zip(log[1:], ends, ends[1:], strict=False)]
    return [mean(seconds for epoch, seconds in each if epoch == number) for number in range(count)]


def run(model: Path, annotations: Path, output: Path, **settings: Any) -> list[dict[str, Any]]:
    """Train as train.py does; returns the lines of metrics.jsonl."""
    given = settings | {"log_every": 1, "resume": "off", "checkpoint_seconds": 1e9}  # log the time of every step, in a new run
    with silent():
        path = train(TrainConfig(model=str(model), annotations=str(annotations), output_dir=str(output), **given))
    return [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@contextmanager
def silent() -> Iterator[None]:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


# ---------------------------------------------------------------- input and inference


def reader(backbone: Backbone, paths: list[Path], cache: Path) -> Callable[[int], Tensor | None]:
    """Return a function from an index to pixel values (3, H, W), as the loader reads an image. A second call uses the cache."""
    examples = [Example(path, "a picture", path.name, line) for line, path in enumerate(paths, 1)]
    caches = Caches(Store(cache, {"of": "pictures"}, 10**9))
    pictures = ImageDataset(examples, backbone.image_processor, augmented=False, seed=0, caches=caches)
    return lambda index: pictures.item((0, index)).pixel_values


def forget_digests() -> None:
    """Forget the digests of files, so that the next reader computes them again as in a new process."""
    _digest.cache_clear()


@torch.no_grad()
def generate(backbone: Backbone, pixel_values: Tensor, beams: int, tokens: int, precision: str = "fp32") -> list[str]:
    """Generate captions of a fixed length."""
    settings: dict[str, Any] = {"num_beams": beams, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    with autocasting(backbone.device, precision)():
        return CaptionTask(backbone).language.generate(pixel_values, [""] * len(pixel_values), **settings)


def adapt(base: Backbone, merged: bool, precision: str = "fp32") -> Backbone:
    """Return a model with an adapter whose B is not zero, with hooks or merged permanently."""
    backbone = opened(base, precision)
    adapters = injection.inject(backbone.model, targets.find(backbone.model, "vit", R, ALPHA))
    for x in adapters.values():
        torch.nn.init.normal_(x.B, std=1e-3)
    if merged:
        merging.bake(backbone.model)
    weights.cast_once(backbone, precision)  # as infer.py does
    return backbone


def save_adapter(backbone: Backbone, path: Path) -> Path:
    return adapter_file.save(path, adapt(backbone, merged=False))


def load_and_merge(backbone: Backbone, path: Path) -> None:
    adapter_file.load(backbone, path)
    merging.bake(backbone.model)
