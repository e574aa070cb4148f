"""The last lines that training prints: the scores of the adapter and of the base, and the command that uses the adapter."""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from lora_blip.config import TrainConfig
from lora_blip.data.column_check import refuse_unknown_columns
from lora_blip.data.example import Example
from lora_blip.data.formats import NO_KEYS
from lora_blip.errors import DataError
from lora_blip.metrics.names import score_name, score_value
from lora_blip.runtime.adapter_names import ADAPTER_NAME, BEST_NAME
from lora_blip.runtime.command_line import lora_blip_program, python
from lora_blip.runtime.runs import METRICS_NAME
from lora_blip.runtime.system_errors import command_line
from lora_blip.runtime.untrusted import parsed, printable
from lora_blip.runtime.user_paths import relative_if_below
from lora_blip.training.best import Best

DEFAULT_IMAGES = "image_test"  # the default IMAGES of infer.py
LONGEST = 2**20  # characters of the first line of references that are read
TRAINING_IMAGES = "image_train"  # the images of the default ANNOTATIONS of train.py
REFERENCES = {"caption": "annotations.jsonl", "vqa": "questions.jsonl", "retrieval": "sentences.jsonl"}  # in image_test
READING = ("image_root", "on_bad_data", "image_key", "text_key", "question_key", "answer_key")  # settings that evaluate has too
ROOT = "--image-root"
FRACTIONS = ("exact_match", "vqa_accuracy", "recall_at_1")  # scores whose largest value is 1
TABLES = (".csv", ".tsv")  # text files whose header is read
FIRST_LINES = 200  # lines of a file that are searched for training images
WRITTEN_PATH = re.compile(r"[^\",;\t|]+\.(?:jpe?g|png|webp|bmp|gif|tiff?|avif|heic)(?=[\",;\t|]|$)", re.IGNORECASE)
LITTLE = 0.95  # a validation loss above this part of the first one has hardly changed
TASK_FLAGS = {"vqa": ["--question", "what color is it?"], "retrieval": ["--texts", "a red cube | a blue cube"]}


def score_line(folder: Path, best: Best, start: str = "base", images: int = 2) -> str:
    """Return a line with the validation score at the start and the best one. Return "" if the run had no validation.

    start: what the run started from, the base or the initial adapter; "" if its score cannot be compared. images: the number
    of validation images.
    """
    value = abs(best.rank[0])
    if not math.isfinite(value):
        return ""
    base = base_score(folder / METRICS_NAME, best.by) if start else None
    line = f"validation {score_name(best.by)}: " + (f"{start} {score_value(best.by, base)}, " if base is not None else "")
    if not best.step:
        return (
            f"{line}{'and ' * (base is not None)}no later validation was better than that of the {start or 'resumed run'}; "
            f"{ADAPTER_NAME} has the last weights"
        )
    line += f"best adapter {score_value(best.by, value)}, after step {best.step}: {printable(folder / BEST_NAME)}"
    if best.by in FRACTIONS and base is not None and min(value, base) >= 1:
        return f"{line}\nthe {score_name(best.by)} of the {start} is already the best possible; this step has the lowest loss"
    if best.by != "loss" and base is not None and value <= base:
        seldom = 'Long captions are seldom equal to a reference: for them, set BEST_BY = "cider" (--best-by cider). '
        seldom *= best.by == "exact_match" and images > 1  # CIDEr of one image is 0
        line += (
            f"\nwarning: no step has a better {score_name(best.by)} than the {start}, so this step was chosen by its loss. "
            f"{_advice_on_loss(base_score(folder / METRICS_NAME, 'loss'), -best.rank[1])}{seldom}If all validation images are "
            f"of one class, hold out images of each class; the last weights are in {ADAPTER_NAME}"
        )
    return line


def _advice_on_loss(before: float | None, after: float) -> str:
    """Return how the validation loss changed, and what to change if it is the only score that improved."""
    if before is None:
        return ""
    change = f"({before:.4f} → {after:.4f})"
    if after > LITTLE * before:
        return f"The loss has hardly changed {change}: train longer (EPOCHS), or with another LR. "
    return f"The loss fell {change}: train longer (EPOCHS). "


def base_score(metrics: Path, by: str) -> float | None:
    """Return the base's validation score, or None if it was not measured.

    It is the score at step 0: a new adapter does not change the outputs of the base.
    """
    try:
        with metrics.open(encoding="utf-8") as lines:
            for line in lines:
                entry = json.loads(line)
                if entry["step"] == 0 and isinstance(entry.get(f"val_{by}"), int | float):
                    return float(entry[f"val_{by}"])
    except OSError:  # with several machines, only the machine of the main process has the file
        pass
    return None


def evaluate_line(
    task: str, folder: Path, annotations: str, val_annotations: str, examples: list[Example], reading: Sequence[str] = (),
    scored: str = "",
) -> str:  # fmt: skip
    """Return a line with the command that compares the adapter with its base, on images that training has not learned from.

    The references are the annotations if `evaluate` scores one of their splits, which is called `scored`, and there is no
    validation file. Otherwise they are the first of these files that exists: test.jsonl beside the annotations, if it fits
    the task and does not contain the training images; the validation file; val.jsonl; a table with the suffix of the
    annotations, such as test.csv; for the demo's training images, the file of the task in image_test. If none exists, the
    line asks the user to write test.jsonl, or a table like the annotations.

    examples: the training lines. reading: the result of `reading_flags`, for val_annotations and for the file to write.
    """
    start = [*lora_blip_program(), "evaluate", *adapter_flag(folder), "--references"]
    if scored and not val_annotations:
        images = "the validation images" if scored == "val" else "the test images"
        return printable(f"to score it on {images} of {annotations}: {command_line([*start, annotations, *reading])}")
    source = Path(annotations)
    suffixes = [".jsonl"] + [source.suffix] * _is_table(source)
    candidates = [source.parent / f"{name}{suffix}" for suffix in suffixes for name in ("test", "val")]
    if val_annotations:  # its images chose the best weights
        used = {os.path.abspath(path) for path in val_annotations.split(",")}  # noqa: PTH100
        tests = [path for path in candidates if path.stem == "test"]
        candidates = [path for path in tests if os.path.abspath(path) not in used]  # noqa: PTH100
    demos = () if val_annotations else (source.parent / TRAINING_IMAGES, source.parent)
    for demo in demos:  # the annotations are beside the images, or among them
        if demo.name == TRAINING_IMAGES and examples and demo.resolve() in examples[0].image.resolve().parents:
            candidates += [demo.with_name(DEFAULT_IMAGES) / REFERENCES[task]]
    others = [path for path in candidates if path != source and path.is_file()]
    asks = task == "vqa"
    fitting = [path for path in others if _asks(path) == asks or ("--question-key" in reading and _has_columns(path, reading))]
    root = Path(reading[reading.index(ROOT) + 1]) if ROOT in reading else None
    fitting = [path for path in fitting if _has_columns(path, reading) or _is_readable(path)]
    existing = next((path for path in fitting if not _has_images_of(path, examples, root)), None)
    suffix = source.suffix if _is_table(source) else ".jsonl"
    name = ("held_out" if (source.parent / f"test{suffix}").exists() else "test") + suffix  # an existing file does not fit
    new = relative_if_below(source.with_name(name)) if source.is_file() else name
    references = str(existing) if existing else val_annotations or new
    flags = reading  # the training has read the validation file with these flags; the user writes the same columns
    if existing and not _has_columns(existing, reading):
        same_images = root and existing.parent == source.parent and not _has_own_images(existing)
        flags = [ROOT, str(root)] if same_images else []
    command = command_line([*start, references, *flags])
    if existing:
        folder_of_same = f"{existing.parent.name}/" * (existing.name == source.name)  # as image_test/annotations.jsonl
        images = f"the images of {folder_of_same}{existing.name}"
    elif val_annotations:
        images = "the validation images"
    else:
        kind = "questions with answers" if asks else "texts"
        alike = "the annotations" if "," in annotations else source.name
        same = f" with the {'columns' if _is_table(source) else 'keys'} of {alike}" * any(
            part.endswith("-key") for part in reading
        )
        images = f"images that training has not used (write their images and {kind} to {new}{same} first)"
    return printable(f"to score it on {images}: {command}")


def reading_flags(config: TrainConfig) -> list[str]:
    """Return the flags with which `evaluate` reads a file as this training does, such as the names of its columns."""
    changed = {name: value for name in READING if (value := getattr(config, name)) != getattr(TrainConfig, name)}
    return [part for name, value in changed.items() for part in (f"--{name.replace('_', '-')}", value)]


def _asks(path: Path) -> bool:
    """Return True if the first line of a JSONL file is a question, or the header of a table contains the word question.

    An unreadable file has no question.
    """
    line = _first_line(path)
    if _is_table(path):
        return "question" in line.casefold()
    with suppress(ValueError):
        first = parsed(line)
        return isinstance(first, dict) and "question" in first
    return False


def _images_of(path: Path) -> list[str]:
    """Return the paths of images in the first lines of a text file, as they are written."""
    with suppress(OSError, ValueError), path.open(encoding="utf-8-sig") as lines:
        return [name.strip() for line in islice(lines, FIRST_LINES) for name in WRITTEN_PATH.findall(line[:LONGEST])]
    return []


def _has_images_of(path: Path, examples: list[Example], root: Path | None) -> bool:
    """Return True if the first lines of a file contain the path of a training image, relative to its folder or to `root`."""
    roots = [path.parent, *([root] if root else [])]
    names = {os.path.abspath(each / name) for name in _images_of(path) for each in roots}  # noqa: PTH100 — no links resolved
    return bool(names) and any(os.path.abspath(example.file) in names for example in examples)  # noqa: PTH100


def _has_own_images(path: Path) -> bool:
    """Return True if the first image of a file exists relative to the folder of the file."""
    return any((path.parent / name).is_file() for name in _images_of(path)[:1])


def _is_readable(path: Path) -> bool:
    """Return False for a table that `evaluate` cannot read without the names of its columns. Other files are not checked."""
    try:
        refuse_unknown_columns(path, NO_KEYS, "references")
    except DataError:
        return False
    return True


def _has_columns(path: Path, reading: Sequence[str]) -> bool:
    """Return True if the first line of a file contains all names of columns that the training has read."""
    names = [value for flag, value in zip(reading[::2], reading[1::2], strict=True) if flag.endswith("-key")]
    line = _first_line(path)
    return bool(names) and all(name in line for name in names)


def _first_line(path: Path) -> str:
    """Return the first line of a text file, or "" if it cannot be read."""
    with suppress(OSError, ValueError), path.open(encoding="utf-8-sig") as lines:
        return lines.readline(LONGEST)
    return ""


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def adapter_flag(folder: Path) -> list[str]:
    """Return --adapter and the path of a run, which is relative if the run is below the current folder."""
    return ["--adapter", relative_if_below(folder)]


def next_command(task: str, folder: Path, examples: list[Example]) -> str:
    """Return the command that runs inference with the adapter in `folder`.

    The command runs the infer.py next to train.py if train.py was started, otherwise `lora-blip infer`.
    examples: the training lines. The input is the folder of the first training image. If that is the image_train of the demo,
    the input is image_test, the default of `infer`.
    """
    script = Path(sys.argv[0])
    is_script = script.name == "train.py" and script.with_name("infer.py").is_file()
    command = [python(), str(script.with_name("infer.py"))] if is_script else [*lora_blip_program(), "infer"]
    command += adapter_flag(folder)
    images, default = [relative_if_below(each.image.parent) for each in examples[:1]], Path(DEFAULT_IMAGES)
    default = script.with_name(DEFAULT_IMAGES) if is_script else default
    if images and not (default.is_dir() and Path(images[0]).resolve() == default.with_name(TRAINING_IMAGES).resolve()):
        command += ["--images", *images]
    flags = (
        ["--question", examples[0].question]
        if task == "vqa" and examples and examples[0].question
        else TASK_FLAGS.get(task, [])
    )
    return printable(command_line([*command, *flags]))
