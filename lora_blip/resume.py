"""Which interrupted run to go on with, and whether it would still be the same run."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_blip import checkpoint
from lora_blip.checkpoint import CheckpointError, Saved
from lora_blip.config import TrainConfig
from lora_blip.data.annotations import Example
from lora_blip.learner import Learner

# settings that change no update; what model and annotations name is told by its content, wherever it lies
FREE = (
    "model", "annotations", "image_root", "on_bad_data", "output_dir", "num_workers", "log_every", "tensorboard", "resume",
    "allow_changed", "checkpoint_seconds", "keep_checkpoints",
)  # fmt: skip
SAMPLES = 16  # of every weight of the base, evenly spaced


def identity(
    config: TrainConfig, precision: str, model: nn.Module, training: list[Example], validation: list[Example], ranks: int
) -> dict[str, Any]:
    """All that decides a run's updates, in JSON: settings, digests of data and base, where and with what it computes."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    device = next(model.parameters()).device.type
    return settings | {
        "device": device, "precision": precision, "processes": ranks, "torch": torch.__version__,
        "training lines": _lines(training), "validation lines": _lines(validation), "base weights": weights_digest(model),
    }  # fmt: skip


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is no longer as it was, in words."""
    changed = [name for name in now if then.get(name) != now[name]]
    return [
        f"{name} are not the same"
        if name.endswith(("lines", "weights"))
        else f"{name} was {then.get(name)!r} and is {now[name]!r}"
        for name in changed
    ]


def find(config: TrainConfig, now: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """The checkpoint to go on from, if there is one, and what the user should know of it.

    "auto" is the newest interrupted run in output_dir, if it is the same run; a path is taken at its word. Raises
    CheckpointError when that has none, or is of a run that would not go on as it began and allow_changed is false.
    """
    if config.resume == "off":
        return None, []
    if config.resume == "auto":
        return _newest_of(Path(config.output_dir), now, config.allow_changed)
    saved = checkpoint.locate(Path(config.resume))
    changed = differences(saved.about.get("identity", {}), now)
    if changed and not config.allow_changed:
        raise CheckpointError(
            f"resume = {config.resume!r}: it would not go on as it began: {'; '.join(changed)}. Set it back, or set "
            "allow_changed to go on all the same"
        )
    return saved, [f"going on though {change}" for change in changed]


def _newest_of(output_dir: Path, now: dict[str, Any], allow_changed: bool) -> tuple[Saved | None, list[str]]:
    notes: list[str] = []
    there = output_dir.glob(f"[!.]*/{checkpoint.FOLDER}")  # what begins with a dot was never finished being made
    for folder in sorted(there, key=lambda p: p.stat().st_mtime, reverse=True):
        saved, wrong = checkpoint.newest(folder.parent)
        notes += wrong
        changed = differences(saved.about.get("identity", {}), now) if saved else []
        if saved and (not changed or allow_changed):
            return saved, [*notes, *(f"going on though {change}" for change in changed)]
        if saved:
            notes.append(f"{folder.parent} was interrupted, and is another run: {'; '.join(changed)}")
    return None, notes


def _lines(examples: Iterable[Example]) -> str:
    """SHA-256 of what the lines say, in their order, and of the size of each image."""
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps([e.name, e.text, e.question, e.answers, e.image.stat().st_size]).encode())
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of the names, shapes, dtypes and SAMPLES values of all that is frozen."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        flat = parameter.detach().flatten()
        where = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
        values = flat[where.to(flat.device)].double().tolist()
        digest.update(json.dumps([name, list(parameter.shape), str(parameter.dtype), values]).encode())
    return digest.hexdigest()


def take_up(learner: Learner, saved: Saved, now: dict[str, Any]) -> None:
    """Everything as it was at the checkpoint. A run that was changed goes on from the start of a step, after as many images.

    Raises CheckpointError if the adapters have other shapes.
    """
    total = learner.progress.total
    learner.restore(learner.ranks.first(saved.tensors() if learner.ranks.main else None), saved.about)
    then = saved.about["identity"]
    if differences(then, now):
        images = [each["batch_size"] * each["accumulation"] * each["processes"] for each in (then, now)]
        learner.rewind()
        learner.progress.group, learner.progress.total = learner.progress.group * images[0] // images[1], total
