"""Checkpoints: folders with everything that a run needs to resume to the bit.

    <run>/checkpoints/000007_step120/state.safetensors    adapters, AdamW's moments, gradients of an unfinished step
                                     state.json           progress, loss scaler, best validation, identity of the run
                                     best.safetensors     the best adapter so far

Each is written beside the others, synced, and renamed when it is whole; only then is the oldest taken away. No RNG state
is kept: every draw of a run is made from the seed and its place in the data (see `Learner.scaled_loss`). Nothing that is
read or written here can run code.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from lora_blip.errors import CheckpointError
from lora_blip.runtime.files import make_whole, put_beside, remove, sweep

FOLDER, TENSORS, ABOUT, BEST = "checkpoints", "state.safetensors", "state.json", "best.safetensors"
FORMAT_VERSION = 1
REMEDY = "set TARGETS and R back, or RESUME to off"
NAME = re.compile(r"(\d{6,})_step\d+")


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint: `about` is its state.json."""

    folder: Path
    about: dict[str, Any]

    @property
    def run(self) -> Path:
        return self.folder.parent.parent

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / TENSORS)


def write(run: Path, step: int, tensors: dict[str, Tensor], about: dict[str, Any], best: Path, keep: int) -> Path:
    """A new checkpoint of a run, then at most `keep` of them. Raises OSError, with all older ones as they were.

    best: the adapter file to keep with it, if there is one.
    """
    there = _folders(run)
    sweep(run / FOLDER)
    serial = int(there[-1].name.split("_")[0]) + 1 if there else 1
    folder = run / FOLDER / f"{serial:06d}_step{step}"

    def fill(new: Path) -> None:
        (new / TENSORS).write_bytes(serialise(tensors))
        if best.exists():
            put_beside(best, new / BEST)
        sums = {path.name: _sum(path) for path in sorted(new.iterdir())}
        whole = {"format_version": FORMAT_VERSION, "sha256": sums} | about
        (new / ABOUT).write_text(json.dumps(whole | {"sha256 of the rest": _digest(whole)}, indent=1) + "\n")

    make_whole(folder, fill)
    for old in [*there, folder][:-keep]:
        remove(old)
    return folder


def newest(run: Path) -> tuple[Saved | None, list[str]]:
    """The newest whole checkpoint of a run, and what is wrong with those after it."""
    wrong: list[str] = []
    for folder in reversed(_folders(run)):
        try:
            return read(folder), wrong
        except CheckpointError as error:
            wrong.append(str(error))
    return None, wrong


def read(folder: Path) -> Saved:
    """Check one against itself. Raises CheckpointError if a byte of it is not what was written."""
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        changed = [ABOUT] if about.pop("sha256 of the rest") != _digest(about) else []
        version, sums = about["format_version"], dict(about["sha256"])
        changed += [name for name, known in sums.items() if _sum(folder / Path(name).name) != known]
        there = TENSORS in sums
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is damaged ({type(error).__name__}: {error})") from None
    if changed or not there:
        raise CheckpointError(f"{folder} is damaged: {', '.join(changed) or TENSORS} is not what was written")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {version}, and this lora_blip knows {FORMAT_VERSION}; use the other one")
    return Saved(folder, about)


def locate(path: Path) -> Saved:
    """Return the checkpoint that RESUME names: the newest of a run's folder, or one of its checkpoints.

    Raise CheckpointError if there is none.
    """
    one = path.parent.name == FOLDER and NAME.fullmatch(path.name)
    if one and path.is_dir():
        return read(path)
    run = path.parent.parent if one else path
    if not run.is_dir():
        raise CheckpointError(f"resume = {str(path)!r}: there is no such folder; give a run's")
    found, wrong = newest(run)
    if found is None:
        why = "\n".join(wrong) or "it has no checkpoint: it is finished, or is no run's folder"
        raise CheckpointError(f"resume = {str(path)!r}: {why}")
    return found


def forget(run: Path) -> None:
    """Take a finished run's checkpoints away."""
    remove(run / FOLDER)


def take(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """One tensor of a checkpoint. Raises CheckpointError if it is not there or of another shape."""
    found = tensors.get(name)
    if found is None or found.shape != like.shape:
        shape = "not there" if found is None else f"of shape {tuple(found.shape)}"
        raise CheckpointError(f"{name!r} is {shape} in the checkpoint, and {tuple(like.shape)} here; {REMEDY}")
    return found


def _folders(run: Path) -> list[Path]:
    """Finished ones, the oldest first; half-written ones have names of their own."""
    there = (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else ()
    return sorted((p for p in there if NAME.fullmatch(p.name)), key=lambda p: int(p.name.split("_")[0]))


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
