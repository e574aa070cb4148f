"""`annotations.jsonl` (or .tsv) → checked examples. A line each: {"image": "red_1.jpg", "text": "a red cube"}.

For questions: {"image": "red_1.jpg", "question": "what is it?", "answers": ["a red cube", "red cube"]}.
"""

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # comes with transformers

from lora_blip.data.formats import Entry, canonical, jsonl_entries, tsv_entries
from lora_blip.data.images import ImageError, open_image
from lora_blip.untrusted import why

LISTED = 20  # problems printed before "and N more"


class DataError(ValueError):
    """Data that cannot be trained on: which file and line, why, and what to do."""


@dataclass(frozen=True)
class Example:
    """One line: an image and a text that describes it, or a question and its answers, one for each who was asked.

    `group` is free for the user ("unseen pairs").
    """

    image: Path
    text: str  # empty for a question
    name: str  # the image as the line wrote it
    line: int
    group: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """All that the line says of its picture."""
        return " ".join(filter(None, (self.text, self.question, *dict.fromkeys(self.answers))))


@dataclass(frozen=True, slots=True)  # a wrong file has a million
class Problem:
    source: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}"


def read(
    source: str | Path,
    image_root: str | Path = "",
    on_bad_data: str = "stop",
    check: Callable[[Example], str] | None = None,
    decode: bool = True,
) -> tuple[list[Example], list[Problem]]:
    """Every good line as an Example, and every bad one as a Problem with file and line.

    Image paths are relative to `image_root`, or to the file's own folder. Every line is checked: JSON,
    keys, that the image is there and decodes, that texts are not empty, and `check`, which gives the
    reason why a task cannot use the line, or "". `decode` false leaves the images unopened. Raises DataError
    listing the problems if there are any and `on_bad_data` is "stop", and in any case if no line is good.
    """
    source = Path(source)
    root = Path(image_root) if image_root else source.parent
    entries = tsv_entries(source) if source.suffix == ".tsv" else jsonl_entries(source)
    expected = 'expected a .jsonl file, a line each {"image": …, "text": …}'
    try:
        parsed = [_example(entry, number, root) for number, entry in entries]
    except FileNotFoundError:
        raise DataError(f"annotations {str(source)!r} do not exist; {expected}") from None
    except OSError as error:
        raise DataError(f"annotations {str(source)!r} cannot be read ({why(error)}); {expected}") from None
    broken = _undecodable({p.image for p in parsed if isinstance(p, Example)}) if decode else {}
    good, problems = [], []
    for entry in parsed:
        if isinstance(entry, Example):
            reason = broken.get(entry.image) or (check(entry) if check else "")
            if not reason:
                good.append(entry)
                continue
            entry = (entry.line, reason)
        problems.append(Problem(source, *entry))
    if problems and on_bad_data == "stop":
        raise DataError(f'{listing(problems)}\nfix the lines, or set ON_BAD_DATA = "skip" to leave them out')
    if not good:
        raise DataError(f"{source}: no usable line\n{listing(problems)}".strip())
    return good, problems


def listing(problems: list[Problem]) -> str:
    """The first problems, a line each, and how many more there are."""
    lines = [str(problem) for problem in problems[:LISTED]]
    return "\n".join(lines + [f"… and {len(problems) - LISTED} more"] * (len(problems) > LISTED))


def split_by_image(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation parts; all lines of an image are on the same side, chosen at random from `seed`.

    At least one image is held out if `fraction` > 0. Raises DataError if nothing is left to train on.
    """
    files = {image: image.resolve() for image in {example.image for example in examples}}  # however a line spells its path
    images = sorted(set(files.values()))
    random.Random(seed).shuffle(images)
    count = max(1, round(len(images) * fraction)) if fraction > 0 else 0
    held_out = set(images[:count])
    if count >= len(images):
        raise DataError(f"val_fraction {fraction} of {len(images)} image(s) leaves none to train on; lower it, or set it to 0")
    train = [example for example in examples if files[example.image] not in held_out]
    return train, [example for example in examples if files[example.image] in held_out]


def _example(found: Entry | str, number: int, root: Path) -> Example | tuple[int, str]:
    """An Example, or the line's number with what is wrong with it."""
    entry = found if isinstance(found, str) else canonical(found, answered=False)
    if isinstance(entry, str):
        return number, entry
    image, group = entry["image"], entry.get("group", "")
    group = group if isinstance(group, str) else ""
    answers = tuple(entry.get("answers", ()))
    return Example(root / image, entry.get("text", ""), image, number, group, entry.get("question", ""), answers)


def plain(text: str) -> str:
    """One space between words."""
    return " ".join(text.split())


def _undecodable(images: set[Path]) -> dict[Path, str]:
    """Image → why it cannot be read; each file is decoded once, in threads (Pillow lets go of the GIL)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(_decode_failure, sorted(images))
        reasons = tqdm(reasons, total=len(images), desc="checking", unit="image", disable=None, delay=2, leave=False)
        return {image: reason for image, reason in zip(sorted(images), reasons, strict=True) if reason}


def _decode_failure(image: Path) -> str:
    try:
        open_image(image)
    except ImageError as error:
        return str(error)
    return ""
