"""The output folder of inference: each image adds a line to predictions.jsonl or errors.jsonl, and a run can be resumed.

run.json contains the settings of the run, so that a run with other settings does not resume it, and whether it has finished.
"""

import errno
import json
import os
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from lora_blip.config import InferConfig
from lora_blip.data.example import Example
from lora_blip.errors import ImageError, OutputError
from lora_blip.inference.finished import Done, key_of, take_up
from lora_blip.inference.prediction import Prediction, line_of, request_of
from lora_blip.inference.questions import is_file
from lora_blip.lora.adapter_file import Adapter
from lora_blip.runtime import lock
from lora_blip.runtime.agreement import changes
from lora_blip.runtime.files import refuse_unwritable, room_for, sha256_of, unused_path, write_whole
from lora_blip.runtime.untrusted import parsed
from lora_blip.tasks.base import PredictionTask

FILE_NAME, ERRORS_NAME, ABOUT_NAME = "predictions.jsonl", "errors.jsonl", "run.json"
SYNC = 5.0  # seconds of work that a machine without power may lose; a process that is killed loses none


class Output:
    """The two files, open for appending. `opened` creates it."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        keys = array("Q")
        self.said, self.failed = (take_up(folder / name, keys) for name in (FILE_NAME, ERRORS_NAME))  # lines of each
        self.done, self.before = Done(keys), self.lines
        self.files: dict[str, IO[bytes]] = {}
        self.synced = time.monotonic()

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    @property
    def lines(self) -> int:
        """Return the number of images and questions that are done."""
        return self.said + self.failed

    def greeting(self) -> str:
        if self.before:
            return f"resuming after {self.before:,} images"
        return f"if this run is stopped, --output-dir {self.folder} with the same settings resumes it"

    def paused(self) -> str:
        return f"stopped after {self.lines:,} images; --output-dir {self.folder} with the same settings resumes it"

    def farewell(self) -> str:
        now = self.lines - self.before
        made = f"wrote {now:,} of {self.lines:,} lines of" if now else f"nothing left to do: all {self.lines:,} images are in"
        left_out = f"; {self.failed:,} could not be read, see {self.folder / ERRORS_NAME}" if self.failed else ""
        return f"{made} {self.path}{left_out}"

    def write(self, found: list[tuple[Example, Prediction | ImageError]], base: dict[int, str]) -> None:
        """Write a line for each example, in order. Only a failure of the machine can lose or tear a line."""
        predictions = [line_of(p, base.get(key_of(e))) for e, p in found if not isinstance(p, ImageError)]
        errors = [_error_line(e, p) for e, p in found if isinstance(p, ImageError)]
        self._add(FILE_NAME, predictions)
        self._add(ERRORS_NAME, errors)
        self.said, self.failed = self.said + len(predictions), self.failed + len(errors)
        if time.monotonic() - self.synced >= SYNC:
            self.sync()

    def _add(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Append lines to a file in one system call. Characters that are not valid Unicode become JSON escapes."""
        if name not in self.files:
            if not lines and name == ERRORS_NAME:
                return
            self.files[name] = (self.folder / name).open("ab", buffering=0)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        content = text.encode("utf-8", "backslashreplace")
        if content and self.files[name].write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        for file in self.files.values():
            os.fsync(file.fileno())
        self.synced = time.monotonic()

    def finish(self) -> None:
        """Mark the run as finished, so that it is not resumed."""
        self._add(FILE_NAME, [])  # the file exists even if no image could be read
        self.sync()
        _write_about(self.folder, self.about, finished=True)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _error_line(example: Example, error: ImageError) -> dict[str, Any]:
    return request_of(example) | {"error": str(error)}


# ---------------------------------------------------------------- which folder, and whether it is this run's


def folder_of(config: InferConfig, processes: int = 1) -> Path:
    """Return the output folder, which may not exist yet. Raise OutputError if it has files of another run."""
    if not config.output_dir:
        if processes > 1:
            raise OutputError("give an output_dir (--output-dir): a process that is started again must find the same folder")
        refuse_unwritable(config.runs)
        return unused_path(Path(config.runs) / f"predictions_{datetime.now():%Y%m%d_%H%M%S}")
    refuse_unwritable(config.output_dir)
    folder = Path(config.output_dir)
    _refuse_taken(folder, config.resume)
    return folder


def _refuse_taken(folder: Path, resume: bool) -> dict[str, Any] | None:
    """Return run.json of an unfinished run in the folder, or None. Raise OutputError if another run's predictions are there."""
    about = _read_about(folder)
    there = [name for name in (FILE_NAME, ABOUT_NAME, ERRORS_NAME) if (folder / name).exists()]
    if there and (about is None or not about["run"] or not resume):
        left = ", of a run that was stopped; set resume = True to continue it" if about and not about.get("finished") else ""
        raise OutputError(
            f"{folder / there[0]} exists already{left}; give another output_dir, or leave it empty for a new folder"
        )
    return about


def identity(
    config: InferConfig, task: PredictionTask, wanted: Adapter | None, precision: str, by_references: bool = False
) -> dict[str, Any]:
    """Return the settings that decide the predictions, as JSON. A file is represented by a digest of its content.

    by_references: True if lines of the references have prompts.
    """
    settings = {
        "model": task.backbone.name, "adapter": _digest(wanted.path) if wanted else "none", "task": task.name,
        "images": config.images, "question": _content(config.question, "question"), "texts": _content(config.texts, "texts"),
        "prompt": task.prompt, **asdict(task.generation), "compare": config.compare, "precision": precision,
        "image_size": task.backbone.chosen_size,
    }  # fmt: skip
    if by_references or (task.takes_question and not config.question):  # the questions are in the references
        settings |= {"references": _content(config.references, "references"), "image_root": config.image_root}
    return settings | ({"seed": config.seed} if task.generation.do_sample else {})


def _content(text: str, setting: str) -> str:
    return f"{text} ({_digest(Path(text))})" if is_file(text, setting) else text


def _digest(path: Path) -> str:
    return sha256_of(path)[:16]


@contextmanager
def opened(folder: Path, what: dict[str, Any], resume: bool) -> Iterator[Output]:
    """Open the folder of the run `what` and lock it inside the block.

    Raise OutputError if it belongs to another run, or if the disk is full.
    """
    advice = (
        "; the lines in it are safe. Free some space, then start again with the same settings and "
        f"--output-dir {folder} to resume"
    )
    with room_for(folder, OutputError, advice):
        folder.mkdir(parents=True, exist_ok=True)
        with lock.held(folder):
            then = _refuse_taken(folder, resume)
            if then is not None and (changed := changes(then["run"], what)):
                raise OutputError(
                    f"{folder} was started with other settings, so this run cannot continue it: {'; '.join(changed)}. "
                    "Set them back, or give another output_dir"
                )
            if then is None:
                _write_about(folder, what, finished=False)
            output = Output(folder, what)
            try:
                yield output
            finally:
                output.close()


def _write_about(folder: Path, what: dict[str, Any], finished: bool) -> None:
    about = {"finished": finished, "run": what}
    write_whole(folder / ABOUT_NAME, (json.dumps(about, indent=1) + "\n").encode())


def _read_about(folder: Path) -> dict[str, Any] | None:
    """Return the content of run.json, or None if there is no such file. A file that we did not write counts as finished."""
    try:
        about = parsed((folder / ABOUT_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        about = None
    ours = isinstance(about, dict) and isinstance(about.get("run"), dict)
    return about if ours else {"finished": True, "run": {}}
