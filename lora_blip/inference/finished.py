"""Which images have their line already: what is read back from a run's files, so that no image is done twice."""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lora_blip.data.example import Example
from lora_blip.errors import OutputError

CHUNK = 2**16


class Done:
    """How often each image and question has its line: a hash and a number, 12 bytes, for each."""

    def __init__(self, keys: "array[int]") -> None:
        self.keys, counts = np.unique(np.frombuffer(keys, np.uint64), return_counts=True)
        self.counts = counts.astype(np.uint32)

    def matcher(self) -> Callable[[Example], bool]:
        """Return a function that says for one example after another if it is done. Each line counts for one example."""
        left = self.counts.copy()

        def take(example: Example) -> bool:
            key = np.uint64(key_of(example))
            place = int(np.searchsorted(self.keys, key))
            if place == len(self.keys) or self.keys[place] != key or not left[place]:
                return False
            left[place] -= 1
            return True

        return take


def key_of(example: Example) -> int:
    return _key(str(example.image), example.question, example.question_id, example.prompt)


def _key_of_line(line: dict[str, Any]) -> int:
    return _key(line["image"], str(line.get("question", "")), line.get("question_id", ""), str(line.get("prompt", "")))


def _key(image: str, question: str, question_id: int | str, prompt: str) -> int:
    """64 bits: among ten million images two are taken for one once in 400,000 runs."""
    own = f"\0{question_id}\0{prompt}" if prompt or question_id != "" else ""
    digest = hashlib.blake2b(f"{image}\0{question}{own}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _cut_torn(path: Path) -> None:
    """Cut off what stands behind the last line end: half a line of a process that died writing."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - CHUNK)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        file.truncate(end)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines that are there already. OutputError names one that is not ours."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["image"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise OutputError(
                    f"{path}:{number} is no line that was written here; mend it, or give another output_dir"
                ) from None
            yield entry


def asked_in(line: dict[str, Any]) -> Example:
    """What a line that was written here is about."""
    image, number = line["image"], line.get("question_id", "")
    prompt, number = str(line.get("prompt", "")), number if isinstance(number, int) else str(number)
    return Example(Path(image), "", image, 0, question=str(line.get("question", "")), prompt=prompt, question_id=number)


def take_up(path: Path, keys: "array[int]") -> int:
    """Cut off half a line, and add the key of each that is whole; how many there are."""
    before = len(keys)
    if path.exists():
        _cut_torn(path)
        keys.extend(map(_key_of_line, lines_of(path)))
    return len(keys) - before


def texts_of(path: Path, subject: Callable[[Example], Any], wanted: Container[Path], name: str) -> dict[str, dict[Any, str]]:
    """Of the images that are wanted: "base" (where it was compared) and `name` → subject → what was said."""
    found: dict[str, dict[Any, str]] = {}
    for line in lines_of(path):
        if Path(line["image"]) in wanted:
            about = subject(asked_in(line))
            if "base_text" in line:
                found.setdefault("base", {})[about] = line["base_text"]
            found.setdefault(name, {})[about] = line["text"]
    return found
