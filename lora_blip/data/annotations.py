"""`annotations.jsonl` → checked examples. A line each: {"image": "red_1.jpg", "text": "a red cube"}."""

import json
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # comes with transformers

from lora_blip.data.images import ImageError, open_image

IMAGE_KEYS = ("image", "image_path", "file_name")
TEXT_KEYS = ("text", "caption")
LISTED = 20  # problems printed before "and N more"


class DataError(ValueError):
    """Data that cannot be trained on: which file and line, why, and what to do."""


@dataclass(frozen=True)
class Example:
    """One line: an image and a text that describes it. `group` is free for the user ("unseen pairs")."""

    image: Path
    text: str
    name: str  # the image as the line wrote it
    line: int
    group: str = ""


@dataclass(frozen=True)
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
    check_text: Callable[[str], str] | None = None,
    decode: bool = True,
) -> tuple[list[Example], list[Problem]]:
    """Every good line as an Example, and every bad one as a Problem with file and line.

    Image paths are relative to `image_root`, or to the file's own folder. Every line is checked: JSON,
    keys, that the image is there and decodes, that the text is not empty, and `check_text`, which gives
    the reason why a text is no good, or "". `decode` false leaves the images unopened. Raises DataError
    listing the problems if there are any and `on_bad_data` is "stop", and in any case if no line is good.
    """
    source = Path(source)
    root = Path(image_root) if image_root else source.parent
    if not source.is_file():
        raise DataError(
            f'annotations {str(source)!r} do not exist; expected a .jsonl file, a line each {{"image": …, "text": …}}'
        )
    parsed = [_parse(line, number, root) for number, line in _lines(source)]
    broken = _undecodable({p.image for p in parsed if isinstance(p, Example)}) if decode else {}
    good, problems = [], []
    for entry in parsed:
        if isinstance(entry, Example):
            reason = broken.get(entry.image) or (check_text(entry.text) if check_text else "")
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
    images = sorted({example.image.resolve() for example in examples})  # however a line spells its path
    random.Random(seed).shuffle(images)
    count = max(1, round(len(images) * fraction)) if fraction > 0 else 0
    held_out = set(images[:count])
    if count >= len(images):
        raise DataError(f"val_fraction {fraction} of {len(images)} image(s) leaves none to train on; lower it, or set it to 0")
    train = [example for example in examples if example.image.resolve() not in held_out]
    return train, [example for example in examples if example.image.resolve() in held_out]


def _lines(source: Path) -> Iterable[tuple[int, str]]:
    """Numbered lines that are not blank; bytes that are no UTF-8 are kept as surrogates, for `_parse` to name."""
    with source.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _parse(line: str, number: int, root: Path) -> Example | tuple[int, str]:
    """An Example, or the line's number with what is wrong with it."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        return number, f"not valid JSON ({error}): {line.strip()[:60]!r}"
    if not isinstance(entry, dict):
        return number, f'expected an object {{"image": …, "text": …}}, got {line.strip()[:60]!r}'
    image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    text = next((entry[key] for key in TEXT_KEYS if key in entry), None)
    if not isinstance(image, str) or not image:
        return number, f"no image: expected one of the keys {', '.join(IMAGE_KEYS)}, with a path"
    if not isinstance(text, str):
        return number, f"no text: expected one of the keys {', '.join(TEXT_KEYS)}, with a string"
    if any("\ud800" <= letter <= "\udfff" for letter in image + text):
        return number, "not UTF-8 (or half a surrogate pair); save the file as UTF-8"
    if not text.strip():
        return number, "the text is empty"
    group = entry.get("group", "")
    return Example(root / image, " ".join(text.split()), image, number, group if isinstance(group, str) else "")


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
