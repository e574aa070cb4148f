"""Find the interrupted run to resume, and check that it has the same settings and data."""

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

# Settings that may differ when a run is resumed, because they change no update. The model and the annotations are compared
# by their content, not by their paths.
FREE = (
    "model", "annotations", "val_annotations", "image_root", "on_bad_data", "output_dir", "num_workers", "log_every",
    "tensorboard", "resume", "allow_changed", "checkpoint_seconds", "keep_checkpoints", "cache_gb",
)  # fmt: skip
SAMPLE = 4096  # bytes that are read at the start, the middle and the end of an image file
CHUNK = 1024  # lines that are encoded in one call: a third faster than one call for each line
encode_json = json.JSONEncoder().encode


def identity(
    config: TrainConfig, precision: str, backbone: Backbone, training: list[Example], validation: list[Example], ranks: int
) -> dict[str, Any]:
    """Return everything that determines the updates of a run: settings, digests of data and base, device and versions."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return settings | {
        "image_size": backbone.chosen_size, "device": backbone.device.type, "precision": precision, "processes": ranks,
        "torch": torch.__version__,
        "training lines": lines_digest(training, config.check_images == "all"),
        "validation lines": lines_digest(validation, config.check_images == "all"),
        "base weights": weights_digest(backbone.model), "base processors": processors_digest(backbone),
    }  # fmt: skip


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence for each difference between two identities, such as "lr was 0.1 and is 0.2".

    A setting that is missing in `then` had its default: the run was started by a version without that setting.
    """
    if "training lines" in then:
        then = {entry.name: entry.default for entry in fields(TrainConfig)} | then
    return changes(then, now)


def with_automatic_length(config: TrainConfig, then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the identity `now`. If MAX_NEW_TOKENS is automatic, replace its value by that of the interrupted run `then`.

    The version of lora_blip that started the run may have chosen another value than this one.
    """
    automatic = not config.max_new_tokens and "max_new_tokens" in then
    return now | {"max_new_tokens": then["max_new_tokens"]} if automatic else now


def find(config: TrainConfig, now: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """Return the checkpoint to resume from, or None to start a new run. Also return notes for the user.

    With resume = "auto", this is the newest interrupted run in output_dir with the identity `now`. Raise CheckpointError if
    resume is a path without a checkpoint, or the path of a run with another identity and allow_changed is False.
    """
    if config.resume == "off":
        return None, []
    if config.resume == "auto":
        return _find_newest(config, now)
    saved = checkpoint.locate(Path(config.resume))
    changed = _changes_since(saved, config, now)
    if changed and not config.allow_changed:
        raise CheckpointError(
            f"resume = {config.resume!r}: the run has changed since its start: {'; '.join(changed)}. Undo the change, or set "
            "ALLOW_CHANGED = True (--allow-changed) to resume with it"
        )
    return saved, _continuing_although(changed)


def acquire(config: TrainConfig, now: dict[str, Any], closing: ExitStack) -> tuple[Saved | None, list[str]]:
    """Return what `find` returns, and lock the folder of the run until `closing` is closed.

    Raise LockedError if another process writes into the folder, and CheckpointError if one has just finished the run.
    """
    saved, notes = find(config, now)
    if saved is None:
        return saved, notes
    closing.enter_context(lock.held(saved.run))
    # read again: the checkpoint may have changed before the folder was locked
    is_named = Path(config.resume) == saved.folder
    latest = checkpoint.read(saved.folder) if is_named else checkpoint.newest(saved.run)[0]
    if latest is None:
        raise CheckpointError(f"another process has just finished {saved.run}; start again for a new run")
    return latest, notes


def _find_newest(config: TrainConfig, now: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """Return the newest interrupted run with the identity `now`, or None if there is none, and notes for the user.

    If there is none and allow_changed is set, return the newest interrupted run.
    """
    notes: list[str] = []
    others: list[tuple[Saved, list[str]]] = []
    folders = Path(config.output_dir).glob(f"[!.]*/{checkpoint.FOLDER}")  # names with a dot are temporary
    for folder in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True):
        saved, problems = checkpoint.newest(folder.parent)
        notes += problems
        if saved is None or saved.state["run"]["name"] != folder.parent.name:  # a copy, such as a backup
            continue
        changed = _changes_since(saved, config, now)
        if not changed:
            return saved, notes
        others.append((saved, changed))
    if others and config.allow_changed:
        saved, changed = others[0]
        return saved, notes + _continuing_although(changed)
    return None, notes + [
        f"{saved.run} was interrupted, and this start does not resume it, because {'; '.join(changed)}. To resume it, set "
        f"these values back, or add --resume {saved.run} --allow-changed"
        for saved, changed in others
    ]


def _changes_since(saved: Saved, config: TrainConfig, now: dict[str, Any]) -> list[str]:
    """Return the differences between the run of a checkpoint and this start."""
    then = saved.state.get("identity", {})
    return differences(then, with_automatic_length(config, then, now))


def _continuing_although(changed: list[str]) -> list[str]:
    """Return a note for each change that ALLOW_CHANGED accepts."""
    return [f"continuing although {change}" for change in changed]


def lines_digest(examples: list[Example], with_images: bool) -> str:
    """Return the SHA-256 of the lines in order. `with_images` includes the size and three samples of each image file."""
    digest = hashlib.sha256()
    samples: dict[str, list[str]] = {}
    for start in range(0, len(examples), CHUNK):
        part = examples[start : start + CHUNK]
        for e in part if with_images else ():
            if e.file not in samples:
                samples[e.file] = _samples_of(e.image)
        lines = [[e.name, e.text, e.question, e.answers, *samples.get(e.file, ()), *_rare_fields(e)] for e in part]
        digest.update("".join(map(encode_json, lines)).encode() if with_images else encode_json(lines).encode())
    return digest.hexdigest()


def _rare_fields(example: Example) -> list[dict[str, Any]]:
    """Return the fields that few lines have. Lines without them keep the digest of earlier versions."""
    rare = {"prompt": example.prompt, "question_id": example.question_id}
    return [rare] if example.prompt or example.question_id != "" else []


def _samples_of(image: Path) -> list[str]:
    """Return the size of a file, and digests of its first, middle and last bytes."""
    size = image.stat().st_size
    with image.open("rb") as file:
        parts = [file.read(SAMPLE) for place in (0, size // 2, max(0, size - SAMPLE)) if file.seek(place) == place]
    return [str(size), *(hashlib.sha256(part).hexdigest()[:16] for part in parts)]


def resume_from(learner: Learner, saved: Saved, now: dict[str, Any]) -> None:
    """Load the state of a checkpoint into the learner.

    If the settings have changed, discard the unfinished step, and continue after the same number of images. The total number
    of steps is then that of the new settings. Raise CheckpointError if the adapters have other names or shapes.
    """
    total, ranks = learner.progress.total, learner.ranks
    tensors = ranks.broadcast(ranks.on_main(saved.tensors))
    ranks.together(lambda: learner.load_state_dict(tensors, saved.state))
    then = saved.state["identity"]
    if differences(then, now):
        images = [run["batch_size"] * run["accumulation"] * run["processes"] for run in (then, now)]  # of a step
        learner.rewind()
        learner.progress.group, learner.progress.total = learner.progress.group * images[0] // images[1], total
