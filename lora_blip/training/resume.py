"""Find the interrupted run to resume. Check that it has the same settings, data and base."""

import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import asdict, fields
from operator import attrgetter
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
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.training import checkpoint
from lora_blip.training.best import scores_differ
from lora_blip.training.checkpoint import Saved
from lora_blip.training.learner import LAST_SKIPPED, Learner

# Settings that may change before a run is resumed, because they change no update. Paths such as model,
# annotations and init_adapter are in the list because the identity contains digests of their content.
FREE = (
    "model", "annotations", "val_annotations", "image_root", "on_bad_data", "output_dir", "num_workers", "log_every",
    "tensorboard", "resume", "allow_changed", "checkpoint_seconds", "keep_checkpoints", "cache_gb", "init_adapter",
)  # fmt: skip
NAMED = 3  # largest number of older interrupted runs that a note names
SAMPLE = 4096  # bytes that are read at the start, the middle and the end of an image file
CHUNK = 1024  # lines that are encoded in one call: a third faster than one call for each line
encode_json = json.JSONEncoder().encode
COMMON_FIELDS, RARE_FIELDS = attrgetter("name", "text", "question", "answers"), attrgetter("prompt", "question_id")


def identity(
    config: TrainConfig, precision: str, backbone: Backbone, training: list[Example], validation: list[Example], ranks: int
) -> dict[str, Any]:
    """Return the identity of a run: everything that determines its updates, namely settings, data, base, device and versions.

    Data and base are represented by digests.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return settings | {
        "image_size": backbone.chosen_size, "device": backbone.device.type, "precision": precision, "processes": ranks,
        "torch": torch.__version__,
        "training lines": lines_digest(training, config.check_images == "all"),
        "validation lines": lines_digest(validation, config.check_images == "all"),
        "base weights": weights_digest(backbone.model), "base processors": processors_digest(backbone),
    }  # fmt: skip


def differences(earlier: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return a sentence for each difference between two identities, such as "lr was 0.1 and is 0.2".

    earlier, current: the identities of the interrupted run and of this start. A setting that is missing in `earlier` counts as
    its default: an older version without this setting started the run.
    """
    if "training lines" in earlier:
        earlier = {entry.name: entry.default for entry in fields(TrainConfig)} | earlier
    return changes(earlier, current)


def with_automatic_length(config: TrainConfig, earlier: dict[str, Any], current: dict[str, Any]) -> dict[str, Any]:
    """Return the identity `current`. If MAX_NEW_TOKENS is automatic, take its value from `earlier`, the interrupted run.

    Another version of lora_blip may have started the run and chosen another value.
    """
    automatic = not config.max_new_tokens and "max_new_tokens" in earlier
    return current | {"max_new_tokens": earlier["max_new_tokens"]} if automatic else current


def find(config: TrainConfig, current: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """Return the checkpoint to resume from, or None to start a new run. Also return notes for the user.

    If resume is "auto", take the newest interrupted run in output_dir with the identity `current`. Raise CheckpointError if
    resume is a path without a checkpoint, or if its run has another identity and allow_changed is False.
    """
    if config.resume == "off":
        return None, []
    if config.resume == "auto":
        return _find_newest(config, current)
    saved = checkpoint.locate(Path(config.resume))
    changed = _changes_since(saved, config, current)
    if changed and not config.allow_changed:
        accept = ", or set ALLOW_CHANGED = True (--allow-changed) to resume with it" * _can_be_accepted(saved, changed, config)
        raise CheckpointError(
            f"resume = {config.resume!r}: the run has changed since its start: {'; '.join(changed)}. Undo the change"
            f'{accept}, or start a new run: RESUME = "off" (--resume off)'
        )
    return saved, _notes_on_changes(changed)


def acquire(config: TrainConfig, current: dict[str, Any], closing: ExitStack) -> tuple[Saved | None, list[str]]:
    """Return the results of `find`. Lock the folder of the run until `closing` is closed.

    Raise LockedError if another process writes into the folder, or CheckpointError if another process has just finished it.
    """
    saved, notes = find(config, current)
    if saved is None:
        return saved, notes
    closing.enter_context(lock.held(saved.run))
    # read again: the checkpoint may have changed before the folder was locked
    is_named = Path(config.resume) == saved.folder
    latest = checkpoint.read(saved.folder) if is_named else checkpoint.newest(saved.run)[0]
    if latest is None:
        raise CheckpointError(f"another process has just finished {saved.run}; start again to begin a new run")
    return latest, notes


def _find_newest(config: TrainConfig, current: dict[str, Any]) -> tuple[Saved | None, list[str]]:
    """Return the newest interrupted run with the identity `current`, or None if there is none, and notes for the user.

    If there is none and allow_changed is set, return the newest interrupted run.
    """
    notes: list[str] = []
    others, diverged = list[tuple[Saved, list[str]]](), list[tuple[Saved, list[str]]]()
    folders = Path(config.output_dir).glob(f"[!.]*/{checkpoint.FOLDER}")  # names with a dot are temporary
    for folder in sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True):
        saved, problems = checkpoint.newest(folder.parent)
        notes += problems
        if saved is None:
            continue
        changed, name = _changes_since(saved, config, current), str(saved.state["run"]["name"])
        if name != saved.run.name:
            is_copy = os.path.lexists(saved.run.parent / name)  # such as a backup
            if not (changed or is_copy or lock.is_held(saved.run)):
                run = quoted_for_shell(str(saved.run))
                notes.append(f"{saved.run} was interrupted and renamed (from {name}). To resume it, add --resume {run}")
        elif not changed:
            return saved, notes
        elif not lock.is_held(saved.run):  # another process is training it
            (diverged if _has_diverged(saved, config) else others).append((saved, changed))
    if others and config.allow_changed:
        saved, changed = others[0]
        return saved, notes + _notes_on_changes(changed)
    if diverged:
        notes.append(f"{diverged[0][0].run} is not resumed: a loss or gradient of its last steps was not finite")
    return None, notes + ([_note_on_others(others, config)] if others else [])


def _has_diverged(saved: Saved, config: TrainConfig) -> bool:
    """Return True if the last steps of a run were skipped. To resume it with other settings is then of no use."""
    skipped = saved.state["progress"].get("skipped", 0)
    return isinstance(skipped, int) and skipped >= min(LAST_SKIPPED, config.max_skipped)


def _note_on_others(others: list[tuple[Saved, list[str]]], config: TrainConfig) -> str:
    """Return why this start does not resume the newest interrupted run, how to resume it, and the names of the older ones."""
    (saved, changed), *older = others
    earlier = f". Older interrupted runs with other settings: {', '.join(str(each.run) for each, _ in older[:NAMED])}"
    earlier = (earlier + ", …" * (len(older) > NAMED)) * bool(older)
    has_base = not any(change.startswith("base weights") for change in changed)  # with another one, shapes may differ
    accept = f", or add --resume {quoted_for_shell(str(saved.run))} --allow-changed"
    accept *= has_base and _can_be_accepted(saved, changed, config)
    return (
        f"{saved.run} was interrupted, and this start does not resume it, because {'; '.join(changed)}. To resume it, undo "
        f"{'this change' if len(changed) == 1 else 'these changes'}{accept}{earlier}"
    )


def _changes_since(saved: Saved, config: TrainConfig, current: dict[str, Any]) -> list[str]:
    """Return the differences between the identity of a checkpoint and that of this start."""
    earlier = saved.state.get("identity", {})
    return differences(earlier, with_automatic_length(config, earlier, current))


def _can_be_accepted(saved: Saved, changed: list[str], config: TrainConfig) -> bool:
    """Return False if no step remains, or if the adapters of the checkpoint have other tensors than those of this start."""
    progress = saved.state["progress"]
    if progress["epoch"] >= config.epochs or 0 < config.max_steps <= progress["step"]:
        return False
    reshaping = [change for change in changed if change.startswith(("r was ", "targets was ", "variant was ", "task was "))]
    return all(change.startswith("variant") and "'dora'" not in change for change in reshaping)


def _notes_on_changes(changed: list[str]) -> list[str]:
    """Return a note for each change that ALLOW_CHANGED accepts."""
    return [f"continuing although {change}" for change in changed]


def lines_digest(examples: list[Example], with_images: bool) -> str:
    """Return the SHA-256 of the lines in order. If `with_images`, include the size and three samples of each image file."""
    digest = hashlib.sha256()
    samples: dict[str, list[str]] = {}
    for start in range(0, len(examples), CHUNK):
        part = examples[start : start + CHUNK]
        lines: list[tuple[Any, ...]] = list(map(COMMON_FIELDS, part))
        for index, e in enumerate(part) if with_images else ():
            if e.file not in samples:
                samples[e.file] = _samples_of(e.image)
            lines[index] += tuple(samples[e.file])
        for index, (prompt, question_id) in enumerate(map(RARE_FIELDS, part)):
            if prompt or question_id != "":  # older versions did not have these fields; other lines keep their digest
                lines[index] += ({"prompt": prompt, "question_id": question_id},)
        digest.update("".join(map(encode_json, lines)).encode() if with_images else encode_json(lines).encode())
    return digest.hexdigest()


def _samples_of(image: Path) -> list[str]:
    """Return the size of a file, and digests of its first, middle and last bytes."""
    size = image.stat().st_size
    with image.open("rb") as file:
        parts = [file.read(SAMPLE) for offset in (0, size // 2, max(0, size - SAMPLE)) if file.seek(offset) == offset]
    return [str(size), *(hashlib.sha256(part).hexdigest()[:16] for part in parts)]


def resume_from(learner: Learner, saved: Saved, current: dict[str, Any], config: TrainConfig, steps_of_epoch: int) -> None:
    """Load the state of a checkpoint into the learner.

    If the identity has changed, discard the unfinished step, and continue after the same number of images of the epoch. The
    total number of steps is then that of the finished and the remaining ones. If the scores cannot be compared with earlier
    ones, the run is validated first. steps_of_epoch: the number of steps with the settings of `config`.

    Raise CheckpointError if the adapters have other names or shapes, or if no step remains.
    """
    ranks, progress = learner.ranks, learner.progress
    tensors = ranks.broadcast(ranks.on_main(saved.tensors))
    ranks.together(lambda: learner.load_state_dict(tensors, saved.state))
    earlier = saved.state["identity"]
    if differences(earlier, current):
        images = [run["batch_size"] * run["accumulation"] * run["processes"] for run in (earlier, current)]  # images per step
        learner.rewind()
        progress = learner.progress
        progress.group = progress.group * images[0] // images[1]
        remaining = (config.epochs - progress.epoch) * steps_of_epoch - min(progress.group, steps_of_epoch)
        remaining = min(remaining, config.max_steps - progress.step) if config.max_steps else remaining
        if remaining <= 0:
            limit = "MAX_STEPS" if config.max_steps and progress.step >= config.max_steps else "EPOCHS"
            done = f"{counted(progress.step, 'step')} in {counted(progress.epoch, 'epoch')}"
            raise CheckpointError(
                f"{saved.run}: no step remains, because the run has done {done}; set {limit} to a larger number "
                f'(--{limit.lower().replace("_", "-")}), or start a new run: RESUME = "off" (--resume off)'
            )
        progress.total = progress.step + remaining
        progress.validated = -1 if scores_differ(earlier, current) else progress.validated
