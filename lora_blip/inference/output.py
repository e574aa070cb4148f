"""The output folder of inference. A run writes a line per image to predictions.jsonl or errors.jsonl, and can be resumed.

run.json contains the settings of the run, and whether it has finished. Only a run with the same settings can resume it.
"""

import errno
import json
import os
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from lora_blip.config import InferConfig
from lora_blip.data.example import Example
from lora_blip.data.formats import keys_of
from lora_blip.errors import ImageError, OutputError
from lora_blip.inference.finished import FinishedExamples, key_of, resume_from
from lora_blip.inference.prediction import Prediction, line_of, request_of
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.sites import quantization
from lora_blip.models.precision import dtype_of, pick_base_dtype
from lora_blip.runtime import lock
from lora_blip.runtime.agreement import changes
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import (
    make_folder,
    open_to_append,
    refuse_unwritable,
    room_for,
    sha256_of,
    unused_path,
    write_whole,
)
from lora_blip.runtime.runs import PEFT_CONFIG, is_peft
from lora_blip.runtime.system_errors import quoted_for_shell, reading, sync, writing
from lora_blip.runtime.untrusted import parsed
from lora_blip.runtime.user_paths import is_file
from lora_blip.tasks.base import PredictionTask

FILE_NAME, ERRORS_NAME, SETTINGS_NAME = "predictions.jsonl", "errors.jsonl", "run.json"
SYNC = 5.0  # seconds between fsync calls. A power failure loses at most the lines of this time; a killed process loses none


class Output:
    """predictions.jsonl and errors.jsonl, open for appending. Use `opened` to create one."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        keys = array("Q")
        # the numbers of lines of the two files
        self.predicted, self.failed = (resume_from(folder / name, keys) for name in (FILE_NAME, ERRORS_NAME))
        self.done, self.lines_before, self.predicted_before = FinishedExamples(keys), self.lines, self.predicted
        self.failed_before = self.failed
        self.files: dict[str, IO[bytes]] = {}
        self.synced = time.monotonic()

    @property
    def path(self) -> Path:
        return self.folder / FILE_NAME

    @property
    def lines(self) -> int:
        """Return the number of images and questions that are done."""
        return self.predicted + self.failed

    def describe_start(self) -> str:
        """Return the line to print at the start: how many images are done, or how to resume the run."""
        if self.lines_before:
            return f"resuming after {counted(self.lines_before, 'image')}"
        return f"if this run is stopped, {self._flag} with the same settings resumes it"

    def describe_stop(self) -> str:
        """Return the line to print if a signal stops the run: how many images are done, and how to resume the run."""
        return f"stopped after {counted(self.lines, 'image')}; {self._flag} with the same settings resumes it"

    @property
    def _flag(self) -> str:
        return f"--output-dir {quoted_for_shell(str(self.folder))}"

    def describe_end(self) -> str:
        """Return the line to print at the end: the number of lines and the files."""
        added = self.lines - self.lines_before
        summary = f"wrote {self.predicted - self.predicted_before:,} of {counted(self.predicted, 'line')} of"
        if not added:
            summary = f"nothing new to write: an earlier run has written {counted(self.predicted, 'line')} of"
        left_out = f"; {self.failed:,} could not be read, see {self.folder / ERRORS_NAME}" if self.failed else ""
        again = "; to try an image of an earlier run again, remove its line from that file" if self.failed_before else ""
        return f"{summary} {self.path}{left_out}{again}"

    def require_predictions(self) -> None:
        """Raise ImageError if every image of the run could not be read."""
        if self.failed and not self.predicted:
            reasons = quoted_for_shell(str(self.folder / ERRORS_NAME))
            raise ImageError(
                f"no image could be read, of {counted(self.failed, 'image')}; the reasons are in {reasons}; repair the images "
                "or correct their paths, and start again; if OUTPUT_DIR (--output-dir) is set, give a new folder"
            )

    def write(self, results: list[tuple[Example, Prediction | ImageError]], base: dict[int, str]) -> None:
        """Write a line for each example, in order. A killed process loses no written line, and leaves no incomplete one.

        base: the texts of the base by `key_of`.
        """
        predictions = [line_of(p, base.get(key_of(e))) for e, p in results if not isinstance(p, ImageError)]
        errors = [_error_line(e, p) for e, p in results if isinstance(p, ImageError)]
        self._add(FILE_NAME, predictions)
        self._add(ERRORS_NAME, errors)
        self.predicted, self.failed = self.predicted + len(predictions), self.failed + len(errors)
        if time.monotonic() - self.synced >= SYNC:
            self.sync()

    def _add(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Append lines to a file in one system call. Write characters that are not valid Unicode as JSON escapes."""
        if name not in self.files:
            if not lines and name == ERRORS_NAME:
                return
            self.files[name] = open_to_append(self.folder / name)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        content = text.encode("utf-8", "backslashreplace")
        with writing(self.folder / name):
            if content and self.files[name].write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Write the lines to the disk, so that a power failure does not lose them."""
        with writing(self.folder):
            for file in self.files.values():
                sync(file.fileno())
        self.synced = time.monotonic()

    def finish(self) -> None:
        """Mark the run as finished in run.json. The same settings can still resume it, to predict images that are new."""
        self._add(FILE_NAME, [])  # the file exists even if no image could be read
        self.sync()
        _write_settings(self.folder, self.settings, finished=True)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def _error_line(example: Example, error: ImageError) -> dict[str, Any]:
    return request_of(example) | {"error": str(error)}


# ---------------------------------------------------------------- the folder, and the check that it belongs to this run


def folder_of(config: InferConfig, processes: int = 1) -> Path:
    """Return the output folder. It need not exist. Raise OutputError if it has files of another run."""
    if not config.output_dir:
        if processes > 1:
            raise OutputError(
                "several processes write into one folder; set OUTPUT_DIR (or --output-dir) to a new folder, and do not change "
                "it in a restart"
            )
        refuse_unwritable(config.runs)
        return unused_path(Path(config.runs) / f"predictions_{datetime.now():%Y%m%d_%H%M%S}")
    refuse_unwritable(config.output_dir)
    folder = Path(config.output_dir)
    _existing_run(folder, config.resume)
    return folder


def _existing_run(folder: Path, resume: bool) -> dict[str, Any] | None:
    """Return the content of the folder's run.json. The run may be stopped or finished. Return None if there is no run.

    Raise OutputError if the folder has files without a run.json of `infer`, or files of any run if `resume` is False.
    """
    run_file = _read_settings(folder)
    existing = [name for name in (FILE_NAME, SETTINGS_NAME, ERRORS_NAME) if (folder / name).exists()]
    if existing and (run_file is None or not run_file["run"] or not resume):
        stopped = (
            ", from a run that was stopped; set resume = True to continue it"
            if run_file and not run_file.get("finished")
            else ""
        )
        raise OutputError(
            f"{folder / existing[0]} exists already{stopped}; for a new run, set OUTPUT_DIR (or --output-dir) to ''"
        )
    return run_file


def identity(
    config: InferConfig, task: PredictionTask, adapter: Adapter | None, precision: str, by_references: bool = False
) -> dict[str, Any]:
    """Return the settings that determine the predictions, as JSON. Files are represented by digests of their content.

    by_references: True if the prompts come from the references.
    """
    settings = {
        "model": task.backbone.name, "adapter": _adapter_digest(adapter) if adapter else "none", "task": task.name,
        "images": config.images, "question": _content(config.question, "question"), "texts": _content(config.texts, "texts"),
        "prompt": task.prompt, **task.generation.stored(), "compare": config.compare, "precision": precision,
        "image_size": task.backbone.chosen_size,
    }  # fmt: skip
    if by_references or (task.takes_question and not config.question):  # the questions are in the references
        settings |= {"references": _content(config.references, "references"), "image_root": config.image_root}
    if named := keys_of(config).named:
        settings |= {"keys": named}
    settings |= {"scale": adapter.scale if adapter else 1.0, "base_dtype": chosen_dtype(task.backbone.model, precision)}
    return settings | ({"seed": config.seed} if task.generation.do_sample else {})


def chosen_dtype(model: Any, precision: str) -> str:
    """Return the dtype of the base's weights, or "" if it is the one that BASE_DTYPE = "auto" gives."""
    own = quantization(model) or dtype_of(model)
    return "" if own == pick_base_dtype("auto", model.config, precision) else own


def _content(text: str, setting: str) -> str:
    """Return the value of a setting. If it names a file, add the digest of the file."""
    return f"{text} ({_digest(Path(text))})" if is_file(text, setting) else text


def _adapter_digest(adapter: Adapter) -> str:
    """Return the digest of an adapter's file. That of peft has its ranks and scales in a second file."""
    own = _digest(adapter.path)
    return own + _digest(adapter.path.with_name(PEFT_CONFIG)) if is_peft(adapter.path) else own


def _digest(path: Path) -> str:
    return sha256_of(path)[:16]


@contextmanager
def opened(folder: Path, settings: dict[str, Any], resume: bool) -> Iterator[Output]:
    """Open the output folder of a run with these settings. Keep the folder locked while the block runs.

    Raise OutputError if the folder belongs to another run, or if the disk is full.
    """
    flag = f"--output-dir {quoted_for_shell(str(folder))}".replace("{", "{{").replace("}", "}}")
    advice = f"; the written lines are safe: {{first}}start again with the same settings and {flag} to resume"
    with room_for(folder, OutputError, advice):
        make_folder(folder)
        with lock.held(folder):
            earlier = _existing_run(folder, resume)
            if earlier is not None and (changed := changes(earlier["run"], settings)):
                raise OutputError(
                    f"{folder} was started with other settings, so this run cannot resume it: {'; '.join(changed)}. "
                    "Set them back, or start a new run: set OUTPUT_DIR (or --output-dir) to ''"
                )
            if earlier is None:
                _write_settings(folder, settings, finished=False)
            output = Output(folder, settings)
            try:
                yield output
            finally:
                output.close()


def _write_settings(folder: Path, settings: dict[str, Any], finished: bool) -> None:
    content = {"finished": finished, "run": settings}
    write_whole(folder / SETTINGS_NAME, (json.dumps(content, indent=1) + "\n").encode())


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the content of run.json, or None if there is no such file.

    If `infer` did not write the file, return an empty "run", which `_existing_run` refuses.
    """
    try:
        with reading(folder / SETTINGS_NAME):
            content = parsed((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.EISDIR, errno.ELOOP):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            return None
        content = None
    is_run_file = isinstance(content, dict) and isinstance(content.get("run"), dict)
    return content if is_run_file else {"finished": True, "run": {}}
