"""Write and read checkpoints: folders with everything that a run needs to resume bit for bit.

    <run>/checkpoints/000007_step120/state.safetensors    adapters, AdamW's moments, gradients of an unfinished step
                                     state.json           progress, loss scaler, best validation, identity of the run
                                     best.safetensors     the best adapter so far

A checkpoint is written to a temporary folder, synced and renamed. After that, all but the newest KEEP_CHECKPOINTS are removed.
A checkpoint has no RNG state, because each random draw is seeded by its position in the data (see `Learner.forward_context`).
The files are JSON and safetensors, so reading a checkpoint runs no code.
"""

import errno
import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load
from safetensors.torch import save as serialize
from torch import Tensor

from lora_blip.errors import CheckpointError
from lora_blip.runtime.files import link_or_copy, make_whole, remove, sha256_of, sweep, write_new
from lora_blip.runtime.runs import CHECKPOINT, CHECKPOINTS_NAME, run_to_resume
from lora_blip.runtime.system_errors import file_error, is_system_error, quoted_for_shell, reading

FOLDER, TENSORS, STATE, BEST = CHECKPOINTS_NAME, "state.safetensors", "state.json", "best.safetensors"
FORMAT_VERSION = 1
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # a file of the checkpoint is not there
REMEDY = 'set MODEL, TARGETS, R and VARIANT to the values of that run, or start a new run with RESUME = "off" (--resume off)'


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    folder: Path
    state: dict[str, Any]  # the content of state.json

    @property
    def run(self) -> Path:
        """Return the folder of the run."""
        return self.folder.parent.parent

    def tensors(self) -> dict[str, Tensor]:
        """Read state.safetensors."""
        with reading(self.folder / TENSORS):
            return load((self.folder / TENSORS).read_bytes())  # some network shares cannot map a file into memory


def write(run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], best: Path, keep: int) -> Path:
    """Write a new checkpoint of a run, remove all but the newest `keep`, and return its folder.

    `best` is the file of the best adapter. It is added to the checkpoint if it exists. Raise OSError if the checkpoint cannot
    be written. The older checkpoints are then unchanged.
    """
    older = _folders(run)
    sweep(run / FOLDER)
    number = int(older[-1].name.split("_")[0]) + 1 if older else 1
    folder = run / FOLDER / f"{number:06d}_step{step}"

    def fill(new: Path) -> None:
        write_new(new / TENSORS, serialize(tensors))
        if best.exists():
            link_or_copy(best, new / BEST)
        digests = {path.name: sha256_of(path) for path in sorted(new.iterdir())}
        content = {"format_version": FORMAT_VERSION, "sha256": digests} | state
        write_new(new / STATE, (json.dumps(content | {"sha256 of the rest": _digest(content)}, indent=1) + "\n").encode())

    make_whole(folder, fill)
    for old in [*older, folder][:-keep]:
        with suppress(OSError):  # the new checkpoint is complete; the next one tries again
            remove(old)
    return folder


def newest(run: Path) -> tuple[Saved | None, list[str]]:
    """Return the newest complete checkpoint of a run (or None), and a message for each newer one that is damaged."""
    problems: list[str] = []
    for folder in reversed(_folders(run)):
        try:
            return read(folder), problems
        except CheckpointError as error:
            problems.append(str(error))
    return None, problems


def read(folder: Path) -> Saved:
    """Read a checkpoint and check its digests. Raise CheckpointError if a byte has changed since it was written.

    Raise FileError if the system refuses to read it: the checkpoint may be intact.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        changed = [STATE] if state.pop("sha256 of the rest") != _digest(state) else []
        version, digests = state["format_version"], dict(state["sha256"])
        changed += [name for name, digest in digests.items() if sha256_of(folder / Path(name).name) != digest]
        has_tensors = TENSORS in digests
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if is_system_error(error) and error.errno not in MISSING:
            raise file_error(error, folder, "read") from None
        raise CheckpointError(f"{folder} is damaged ({type(error).__name__}: {error})") from None
    if changed or not has_tensors:
        raise CheckpointError(f"{folder} is damaged: {', '.join(changed) or TENSORS} has changed since it was written")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {version}, but this version of lora_blip reads format {FORMAT_VERSION}; resume with the "
            "version of lora_blip that wrote it, or start a new run with --resume off"
        )
    return Saved(folder, state)


def locate(path: Path) -> Saved:
    """Return the checkpoint at a path. For the folder of a run, return its newest checkpoint.

    If the checkpoint at the path was removed, return the newest one of its run. Raise CheckpointError if there is none.
    """
    run = run_to_resume(path)
    if path != run and path.is_dir():
        try:
            return read(path)
        except CheckpointError as error:
            flag = f"--resume {quoted_for_shell(str(run))}"
            raise CheckpointError(f"{error}. {flag} resumes from its newest undamaged checkpoint") from None
    saved, problems = newest(run)
    if saved is None:
        reason = "\n".join(problems) or "it has no checkpoint: the run is finished, or this is not the folder of a run"
        raise CheckpointError(f"resume = {str(path)!r}: {reason}. To start a new run: --resume off")
    return saved


def delete_all(run: Path) -> None:
    """Remove all checkpoints of a run."""
    remove(run / FOLDER)


def checked_tensor(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Return one tensor of a checkpoint. Raise CheckpointError if it is missing or has another shape than `like`."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{name!r} is missing in the checkpoint; {REMEDY}")
    if tensor.shape != like.shape:
        shapes = f"{tuple(tensor.shape)} in the checkpoint and {tuple(like.shape)} in this run"
        raise CheckpointError(f"{name!r} has the shape {shapes}; {REMEDY}")
    return tensor


def _folders(run: Path) -> list[Path]:
    """Return the complete checkpoints, the oldest first. Unfinished ones have temporary names."""
    folders = (run / FOLDER).iterdir() if (run / FOLDER).is_dir() else ()
    return sorted((p for p in folders if CHECKPOINT.fullmatch(p.name)), key=lambda p: int(p.name.split("_")[0]))


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
