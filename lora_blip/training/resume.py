"""Find the interrupted run to resume, and check that it is the same run."""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from lora_blip.config import TrainConfig
from lora_blip.data.example import Example
from lora_blip.errors import CheckpointError
from lora_blip.models.identity import processors_digest, weights_digest
from lora_blip.models.loading import Backbone
from lora_blip.runtime import lock
from lora_blip.runtime.agreement import changes
from lora_blip.training import checkpoint
from lora_blip.training.checkpoint import Saved
from lora_blip.training.learner import Learner

# settings that change no update; the model and the annotations are compared by their content, not by their path
FREE = (
    "model", "annotations", "val_annotations", "image_root", "on_bad_data", "output_dir", "num_workers", "log_every",
    "tensorboard", "resume", "allow_changed", "checkpoint_seconds", "keep_checkpoints", "cache_gb",
)  # fmt: skip
GLIMPSE = 4096  # bytes of an image, at three places
CHUNK = 1024  # lines written as one JSON, a third faster than one by one
WRITE = json.JSONEncoder().encode


def identity(
    config: TrainConfig, precision: str, backbone: Backbone, training: list[Example], validation: list[Example], ranks: int
) -> dict[str, Any]:
    """Return all that decides the updates of a run, as JSON: settings, digests of data and base, device and versions."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return settings | {
        "image_size": backbone.chosen_size, "device": backbone.device.type, "precision": precision, "processes": ranks,
        "torch": torch.__version__,
        "training lines": lines_digest(training, config.check_images == "all"),
        "validation lines": lines_digest(validation, config.check_images == "all"),
        "base weights": weights_digest(backbone.model), "base processors": processors_digest(backbone),
    }  # fmt: skip


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what has changed since a training run, in words. A setting that its version did not have had its default."""
    if "training lines" in then:
        then = {entry.name: entry.default for entry in fields(TrainConfig)} | then
    return changes(then, now)


def as_begun(config: TrainConfig, then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of this start as a continuation of the run `then`.

    An automatic MAX_NEW_TOKENS is that of the run, which another version may have chosen by another rule.
    """
    automatic = not config.max_new_tokens and "max_new_tokens" in then
    return now | {"max_new_tokens": then["max_new_tokens"]} if automatic else now


def find(config: TrainConfig, now: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """Return the checkpoint to resume from, or None, and notes for the user.

    With resume = "auto", this is the newest interrupted run in output_dir that is the same run. Raise CheckpointError if a
    path has no checkpoint, or if the run has changed since its start and allow_changed is false.
    """
    if config.resume == "off":
        return None, []
    if config.resume == "auto":
        return _newest_of(config, now)
    saved = checkpoint.locate(Path(config.resume))
    then = saved.about.get("identity", {})
    changed = differences(then, as_begun(config, then, now))
    if changed and not config.allow_changed:
        raise CheckpointError(
            f"resume = {config.resume!r}: the run has changed since its start: {'; '.join(changed)}. Set it back, or set "
            "allow_changed = True to continue anyway"
        )
    return saved, [f"continuing although {change}" for change in changed]


def acquire(config: TrainConfig, now: dict[str, Any], held: ExitStack) -> tuple[Saved | None, list[str]]:
    """Return what `find` returns, and lock the run's folder until `held` is closed.

    Raise LockedError if another process writes into the folder, and CheckpointError if one has just finished the run.
    """
    saved, notes = find(config, now)
    if saved is None:
        return saved, notes
    held.enter_context(lock.held(saved.run))
    named = Path(config.resume) == saved.folder
    again = checkpoint.read(saved.folder) if named else checkpoint.newest(saved.run)[0]  # read again, now with the lock
    if again is None:
        raise CheckpointError(f"another process has just finished {saved.run}; start again for a new run")
    return again, notes


def _newest_of(config: TrainConfig, now: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """Return the newest checkpoint of the same run; if there is none and allow_changed is true, the newest of all."""
    output_dir, allow_changed = Path(config.output_dir), config.allow_changed
    notes: list[str] = []
    others: list[tuple[Saved, list[str]]] = []
    there = output_dir.glob(f"[!.]*/{checkpoint.FOLDER}")  # a name with a dot is a folder whose creation was interrupted
    for folder in sorted(there, key=lambda p: p.stat().st_mtime, reverse=True):
        saved, wrong = checkpoint.newest(folder.parent)
        notes += wrong
        if saved is None or saved.about["run"]["name"] != folder.parent.name:  # a copy, such as a backup
            continue
        then = saved.about.get("identity", {})
        changed = differences(then, as_begun(config, then, now))
        if not changed:
            return saved, notes
        others.append((saved, changed))
    if others and allow_changed:
        saved, changed = others[0]
        return saved, [*notes, *(f"continuing although {change}" for change in changed)]
    return None, [*notes, *(f"{s.run} was interrupted, but it is another run: {'; '.join(changed)}" for s, changed in others)]


def lines_digest(examples: list[Example], with_images: bool) -> str:
    """Return the SHA-256 of the lines in order, and, if `with_images`, of each image's size, first, middle and last bytes."""
    digest = hashlib.sha256()
    known: dict[str, list[str]] = {}
    for start in range(0, len(examples), CHUNK):
        part = examples[start : start + CHUNK]
        for e in part if with_images else ():
            if e.file not in known:
                known[e.file] = _glimpse(e.image)
        said = [[e.name, e.text, e.question, e.answers, *known.get(e.file, ()), *_own(e)] for e in part]
        digest.update("".join(map(WRITE, said)).encode() if with_images else WRITE(said).encode())
    return digest.hexdigest()


def _own(example: Example) -> list[dict[str, Any]]:
    """Return the fields that only some lines have. The digest of other lines is that of earlier versions."""
    own = {"prompt": example.prompt, "question_id": example.question_id}
    return [own] if example.prompt or example.question_id != "" else []


def _glimpse(image: Path) -> list[str]:
    size = image.stat().st_size
    with image.open("rb") as file:
        parts = [file.read(GLIMPSE) for place in (0, size // 2, max(0, size - GLIMPSE)) if file.seek(place) == place]
    return [str(size), *(hashlib.sha256(part).hexdigest()[:16] for part in parts)]


def resume_from(learner: Learner, saved: Saved, now: dict[str, Any]) -> None:
    """Restore the state of the checkpoint. A changed run continues at the start of a step, after the same number of images.

    Raise CheckpointError if the adapters have other shapes.
    """
    total = learner.progress.total
    ranks = learner.ranks
    tensors = ranks.broadcast(ranks.on_main(saved.tensors))
    ranks.together(lambda: learner.load_state_dict(tensors, saved.about))
    then = saved.about["identity"]
    if differences(then, now):
        images = [each["batch_size"] * each["accumulation"] * each["processes"] for each in (then, now)]
        learner.rewind()
        learner.progress.group, learner.progress.total = learner.progress.group * images[0] // images[1], total
