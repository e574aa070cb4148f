"""Find the images that already have a line in the files of a run, so that no image is predicted twice."""

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
    """Count the lines of each image and question. Each needs 12 bytes: a hash and a count."""

    def __init__(self, keys: "array[int]") -> None:
        self.keys, counts = np.unique(np.frombuffer(keys, np.uint64), return_counts=True)
        self.counts = counts.astype(np.uint32)

    def matcher(self) -> Callable[[Example], bool]:
        """Return a function that returns True if an example is done. Call it once per example: each line counts for one."""
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
    """Return a hash of 64 bits. With ten million images, two of them collide once in 400,000 runs."""
    own = f"\0{question_id}\0{prompt}" if prompt or question_id != "" else ""
    digest = hashlib.blake2b(f"{image}\0{question}{own}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _cut_torn(path: Path) -> None:
    """Remove the part after the last line end: an incomplete line of a process that was killed."""
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
    """Yield the lines of a file. Raise OutputError, with the line, for one that we did not write."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["image"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise OutputError(f"{path}:{number} is not a prediction line; fix it, or give another output_dir") from None
            yield entry


def asked_in(line: dict[str, Any]) -> Example:
    """Return the example of a line."""
    image, number = line["image"], line.get("question_id", "")
    prompt, number = str(line.get("prompt", "")), number if isinstance(number, int) else str(number)
    return Example(Path(image), "", image, 0, question=str(line.get("question", "")), prompt=prompt, question_id=number)


def take_up(path: Path, keys: "array[int]") -> int:
    """Remove an incomplete last line, add the key of each line to `keys`, and return the number of lines."""
    before = len(keys)
    if path.exists():
        _cut_torn(path)
        keys.extend(map(_key_of_line, lines_of(path)))
    return len(keys) - before


def texts_of(path: Path, subject: Callable[[Example], Any], wanted: Container[Path], name: str) -> dict[str, dict[Any, str]]:
    """Return {`name`, and "base" if it was compared: {subject: text}} for the images in `wanted`."""
    found: dict[str, dict[Any, str]] = {}
    for line in lines_of(path):
        if Path(line["image"]) in wanted:
            about = subject(asked_in(line))
            if "base_text" in line:
                found.setdefault("base", {})[about] = line["base_text"]
            found.setdefault(name, {})[about] = line["text"]
    return found
