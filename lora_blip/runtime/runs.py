"""The names of runs and of the files in a run folder, and the search for an adapter."""

import difflib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain
from pathlib import Path

from lora_blip.errors import AdapterError, CheckpointError
from lora_blip.runtime.adapter_names import ADAPTER_NAME, BEST_NAME, PEFT_CONFIG, PEFT_WEIGHTS
from lora_blip.runtime.command_line import is_our_script, this_command
from lora_blip.runtime.hub_adapters import fetch, is_name
from lora_blip.runtime.system_errors import file_error
from lora_blip.runtime.untrusted import is_too_long, open_regular, quoted
from lora_blip.runtime.user_paths import nearest_path

RUNS = Path("lora_blip_output")  # the default OUTPUT_DIR
METRICS_NAME, GALLERY_NAME, EXPLAIN_NAME, CHECKPOINTS_NAME = "metrics.jsonl", "gallery.html", "explain.html", "checkpoints"
CHECKPOINT = re.compile(r"(\d{6,})_step\d+")  # the name of a checkpoint's folder
LONGEST_PART = 40  # characters of the base and of the targets in the name of a run; a file system allows 255 bytes in all

NAMED = 5  # largest number of runs that an error names
LARGEST_CONFIG = 2**21  # bytes of a config.json that is read


def run_name(task: str, base: str, targets: str, now: datetime) -> str:
    """Return `2026-11-28_123105_caption_tiny-blip_vit`. Names of runs are in the order of time.

    base: a path or a name on the hub, of which the last part is used.
    """
    parts = [part for part in re.split(r"[\\/]+", base) if part.strip(". ")]
    return "_".join([f"{now:%Y-%m-%d_%H%M%S}", task, name_part(parts[-1] if parts else ""), name_part(targets)])


def name_part(text: str) -> str:
    """Return a text as a part of a file name that each system allows: letters, digits, "." and "-", "x" if none is left."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:LONGEST_PART].strip("-.") or "x"


def locate(adapter: str | Path, runs: str | Path = RUNS) -> Path:
    """Return the path of an adapter: a file, or that of the newest run in a folder. "latest" is the newest run in `runs`.

    Return the best.safetensors of a run, which has the weights with the best validation, or else its adapter.safetensors. A
    folder of peft is its adapter_model.safetensors. A name on the hub, `user/name` or `user/name@revision`, is the file in the
    hub's cache; it is downloaded if it is not there. A local path wins over such a name. Raise AdapterError without an adapter.
    """
    if not isinstance(adapter, str | Path):
        raise AdapterError(f'the adapter is of type {type(adapter).__name__}; give a run folder, a file, or "latest"')
    if adapter == "":
        raise AdapterError('the path of the adapter is empty; give a run folder, a file, or "latest"')
    if is_too_long(str(adapter)):
        raise AdapterError(f"no adapter at {quoted(str(adapter))}: the name is too long for a path")
    path = Path(runs if adapter == "latest" else adapter)
    try:
        if path.is_file():
            return path
        if not is_run(path) and (path / PEFT_CONFIG).is_file():
            return peft_weights(path)
        adapters = [p for p in path.rglob(ADAPTER_NAME) if p.is_file()] if path.is_dir() else []
        if not adapters and (path / BEST_NAME).is_file():
            return path / BEST_NAME  # of a run that was killed before its end
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise file_error(error, path, "read") from None
        adapters = []
    if not adapters:
        if is_name(str(adapter)) and path.parts[0] != RUNS.name and not nearest_run(path, runs):
            return fetch(str(adapter))
        raise no_adapter(path, runs)
    last = max(adapters, key=lambda p: p.stat().st_mtime)
    best = last.with_name(BEST_NAME)
    return best if best.is_file() else last


def no_adapter(path: Path, runs: str | Path) -> AdapterError:
    """Return the error for a path without an adapter. It names the nearest path, and at most NAMED runs of the folder `runs`.

    The runs whose names contain the name that was given come first, then the newest ones.
    """
    folder = "" if path.is_absolute() else f" in {str(Path.cwd())!r}"
    near, newest = nearest_run(path, runs), newest_runs(runs)
    near = near or "latest" * bool(newest and difflib.get_close_matches(str(path), ["latest"]))
    meant = f"did you mean {near!r}? Otherwise " if near else ""
    others = [str(run) for run in newest if str(run) != near]
    similar = [run for run in others if path.name.casefold() in Path(run).name.casefold()]
    others = similar + [run for run in others if run not in similar]
    first = "those with a similar name" if similar else f"the newest of {len(others)}"
    order = f", {first} first" * (len(others) > 1)
    fix = f"give another run{order}: {', '.join(map(repr, others[:NAMED]))}"
    if not others:
        train = "python train.py" if is_our_script("train.py") else "lora-blip train"
        fix = f"train one: {train}; or give the full path of one"
    return AdapterError(f"no adapter at {str(path)!r}{folder}; {meant}{fix}")


def newest_runs(runs: str | Path, names: Sequence[str] = (BEST_NAME, ADAPTER_NAME)) -> list[Path]:
    """Return the run folders of `files_of_runs` that have a file with one of the names, the newest first.

    A run has ADAPTER_NAME when it has ended, or was stopped with its progress saved, and BEST_NAME also before.
    """
    times: dict[Path, float] = {}
    for name in names:
        for file in files_of_runs(runs, name):
            with suppress(OSError):
                if stat.S_ISREG((status := file.stat()).st_mode):
                    times[file.parent] = status.st_mtime
    return sorted(times, key=lambda run: times[run], reverse=True)


def files_of_runs(runs: str | Path, name: str) -> Iterator[Path]:
    """Yield the files of this name in the run folders in `runs`, and in those of its subfolders such as the demo's."""
    return chain(Path(runs).glob(f"*/{name}"), Path(runs).glob(f"*/*/{name}"))


def locate_initial(adapter: str, runs: str | Path = RUNS) -> Path:
    """Return the file that INIT_ADAPTER names, as `locate` does, but "latest" is the newest finished run in the folder `runs`.

    A run with checkpoints was interrupted. It is left out, because it may be the run that this training resumes.
    Raise AdapterError if there is no adapter.
    """
    if adapter != "latest":
        try:
            return locate(adapter, runs)
        except AdapterError as error:
            raise AdapterError(f"init_adapter = {adapter!r} (--init-adapter): {error}") from None
    finished = [path for path in files_of_runs(runs, ADAPTER_NAME) if not path.with_name(CHECKPOINTS_NAME).exists()]
    if not finished:
        raise AdapterError(f"init_adapter = 'latest': {str(runs)!r} has no finished run; give the path of an adapter")
    return locate(max(finished, key=lambda path: path.stat().st_mtime).parent)


def is_run(folder: Path) -> bool:
    """Return True if a folder contains an adapter file of lora_blip."""
    return any((folder / name).is_file() for name in (ADAPTER_NAME, BEST_NAME))


def is_adapter(name: str | Path) -> bool:
    """Return True for an adapter file of lora_blip, a run, a folder of runs, or "latest", and False for a base.

    The config.json of a run has the settings of the training, and that of a base a `model_type`.
    """
    path = Path(name)
    if path.name in (ADAPTER_NAME, BEST_NAME) or (str(name) == "latest" and not path.is_dir()):
        return True
    if not is_run(path) and not any(path.glob(f"*/{ADAPTER_NAME}")):
        return False
    try:
        with open_regular(path / "config.json", LARGEST_CONFIG) as file:
            return "model_type" not in json.loads(file.read())
    except (OSError, ValueError, TypeError, RecursionError):
        return True


def peft_weights(folder: Path) -> Path:
    """Return the weights of an adapter of peft in a folder. Raise AdapterError if it has none in safetensors."""
    weights = folder / PEFT_WEIGHTS
    if not weights.is_file():
        has_bin = weights.with_suffix(".bin").is_file()
        reason = "only adapter_model.bin, which can run code when it is read" if has_bin else f"no {PEFT_WEIGHTS}"
        raise AdapterError(
            f"{folder} is an adapter of peft with {reason}; load it in peft and save it again: "
            "PeftModel.from_pretrained(base, folder).save_pretrained(other_folder)"
        )
    return weights


def is_peft(path: Path) -> bool:
    """Return True if a file has the weights of an adapter of peft, with its settings beside it."""
    return path.name == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file()


def nearest_run(path: Path, runs: str | Path) -> str:
    """Return the existing run folder or file that is most similar to a missing path, or "" if none is similar.

    A name alone may be that of a run in the folder `runs`.
    """
    beside = Path(runs) / path
    if os.path.lexists(path):
        return ""
    folders = path.suffix != ".safetensors"
    if os.path.exists(beside):  # noqa: PTH110 — False for a name that is too long, for which Path.exists raises OSError
        return str(beside)
    found = (nearest_path(each, folders=folders) for each in (path, beside))
    return next((near for near in found if near and (not folders or _has_runs(Path(near)))), "")


def _has_runs(folder: Path) -> bool:
    """Return True if a folder is a run, finished or not, or an adapter of peft, or if a folder in it is one."""
    names = (ADAPTER_NAME, BEST_NAME, CHECKPOINTS_NAME, PEFT_CONFIG)
    return any(True for start in ("", "*/", "*/*/") for name in names for _ in folder.glob(start + name))


def run_to_resume(path: Path) -> Path:
    """Return the folder of the run that RESUME names: the path of a run, or of one of its checkpoints.

    Raise CheckpointError if there is no such folder, or if the run is finished: a finished run has no checkpoints.
    """
    is_checkpoint = path.parent.name == CHECKPOINTS_NAME and CHECKPOINT.fullmatch(path.name)
    run = path.parent.parent if is_checkpoint else path
    if not run.is_dir():
        near = nearest_run(run, RUNS)
        meant = f"did you mean {near!r}? Otherwise " if near else ""
        raise CheckpointError(
            f"resume = {str(path)!r}: the folder does not exist; {meant}give the folder of a run, or --resume auto for the "
            "newest one"
        )
    if (run / ADAPTER_NAME).is_file() and not (run / CHECKPOINTS_NAME).exists():
        command = this_command(without=("--resume", "--init-adapter"), added=("--resume", "off", "--init-adapter", str(run)))
        settings = f'RESUME = "off" and INIT_ADAPTER = {str(run)!r}'
        raise CheckpointError(
            f"resume = {str(path)!r}: the run is finished; to train its adapter further, in a new run: {command or settings}"
        )
    return run
