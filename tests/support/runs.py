"""Settings of short trainings, and functions that read and compare their files."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip.config import TrainConfig
from lora_blip.data.loader import DeviceBatch, Slot
from lora_blip.lora import adapter_file, injection, targets
from lora_blip.models.loading import load_backbone
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME
from lora_blip.tasks.base import Generation, Task
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.training.learner import Learner, Update
from lora_blip.training.loop import accumulate_gradients, update_parameters
from lora_blip.training.loss_scale import LossScaler
from tests.support import tiny
from tests.support.models import WHOLE


def settings(checkpoint: Path, annotations: Path, **changes: object) -> TrainConfig:
    defaults = TrainConfig(
        model=str(checkpoint), annotations=str(annotations), output_dir=str(annotations.parent / "runs"),
        epochs=2, batch_size=4, warmup_steps=1, num_workers=0, augment=False, device="cpu", r=2, alpha=4, lr=1e-2,
        log_every=1, val_fraction=0.25, max_new_tokens=5,
    )  # fmt: skip
    return replace(defaults, **changes)


def metrics_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def one_step(
    task: Task, micro_batches: list[DeviceBatch], max_grad_norm: float = 0.0, scale: float = 0.0
) -> tuple[Update, list]:
    """Take a step of plain SGD at learning rate 1. Return its Update, and the decrease of each parameter."""
    parameters = [p for p in task.backbone.model.parameters() if p.requires_grad]
    learner = Learner(task, max_grad_norm=max_grad_norm, optimizer=torch.optim.SGD(parameters, lr=1.0))
    if scale:
        learner.scaler = LossScaler(scale=scale)
    before = [p.detach().clone() for p in parameters]
    slots = [Slot(number) for number in range(len(micro_batches))]
    learner.begin_step(micro_batches, slots)
    for batch, slot in zip(micro_batches, slots, strict=True):
        accumulate_gradients(learner, batch, slot, is_last=slot is slots[-1])
    update = update_parameters(learner, 1.0)
    return update, [b - p.detach() for b, p in zip(before, parameters, strict=True)]


def before_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Learner], object]) -> None:
    """Call `act(step number, learner)` before every step of every training."""
    real, count = Learner.begin_step, 0

    def begin_step(learner: Learner, *rest: Any) -> None:
        nonlocal count
        count += 1
        act(count, learner)
        real(learner, *rest)

    monkeypatch.setattr(Learner, "begin_step", begin_step)


def score(loss: float, exact_match: float = 0.0) -> dict[str, float]:
    return {"loss": loss, "exact_match": exact_match}


TIMES = ("seconds", "images_per_s")


def config_of(checkpoints: dict[str, Path], folder: Path, kind: str = "blip", **changes: object) -> TrainConfig:
    """Return settings for 13 lines: 7 micro-batches of 2 per epoch, in 3 steps. The last step has one micro-batch."""
    source = questions(folder) if kind == "vqa" else tiny.write_photos(folder, 16)
    defaults = {
        "batch_size": 2,
        "accumulation": 3,
        "dropout": 0.1,
        "augment": True,
        "checkpoint_seconds": 0,
        "validate_every": 2,
    }
    return settings(checkpoints[kind], source, **(defaults | {"val_fraction": 0.2, "targets": "vit"} | changes))


def questions(folder: Path) -> Path:
    source = tiny.write_photos(folder, 16)
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    asked = [{"image": line["image"], "question": "what is it?", "answers": [line["text"], "a picture"]} for line in lines]
    source.write_text("\n".join(map(json.dumps, asked)))
    return source


def lines(path: Path) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in metrics_of(path)]


def assert_same(one: Path, other: Path) -> None:
    """Assert that the last and the best adapters have equal bytes, and the metrics equal lines, except times."""
    for name in (ADAPTER_NAME, BEST_NAME):
        assert (one.parent / name).exists() == (other.parent / name).exists()
        if (one.parent / name).exists():
            a, b = adapter_file.read(one.parent / name).tensors, adapter_file.read(other.parent / name).tensors
            assert list(a) == list(b) and all(a[key].numpy().tobytes() == b[key].numpy().tobytes() for key in a)
    assert lines(one) == lines(other)


def elsewhere(config: TrainConfig, name: str = "other") -> TrainConfig:
    return replace(config, output_dir=f"{config.output_dir}_{name}")


def only_run(config: TrainConfig) -> Path:
    (run,) = Path(config.output_dir).glob("20*")
    return run


def adapter_of(checkpoint: Path, folder: Path, task: str = "", **training: Any) -> Path:
    """Save an adapter with random values on every part, as a run does, and return its path."""
    backbone = load_backbone(str(checkpoint), "cpu")
    loras = injection.inject(backbone.model, targets.find(backbone.model, WHOLE[checkpoint.name], 2, 8.0))
    generator = torch.Generator().manual_seed(9)
    for lora in loras.values():
        lora.B.data.copy_(0.2 * torch.randn(lora.B.shape, generator=generator))
    built = TASKS[task or default_task(backbone.architecture)](backbone, "", Generation(max_new_tokens=6))
    path = folder / "run" / ADAPTER_NAME
    return adapter_file.save(path, backbone, task=built.metadata(), training={"steps": 3, **training})


def train_flags(model: Path, source: Path, **more: object) -> list[str]:
    flags = {
        "model": model,
        "annotations": source,
        "epochs": 2,
        "batch-size": 4,
        "num-workers": 0,
        "max-new-tokens": 5,
        "r": 2,
    } | more
    return [part for key, value in flags.items() for part in (f"--{key}", str(value))]
