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
from lora_blip.runtime.system_errors import reading, writing

CHUNK = 2**16  # bytes that are read at once, from the end of a file


class FinishedExamples:
    """The examples that have a line in the files of a run, as hashes with the number of their lines, 12 bytes for each."""

    def __init__(self, keys: "array[int]") -> None:
        self.keys, counts = np.unique(np.frombuffer(keys, np.uint64), return_counts=True)
        self.counts = counts.astype(np.uint32)

    def matcher(self) -> Callable[[Example], bool]:
        """Return a function that returns True if an example is finished.

        Call it once per example: each True uses up one line. If the input contains an image three times, and the files have
        two lines for it, the function returns True, True and False.
        """
        remaining = self.counts.copy()

        def is_done(example: Example) -> bool:
            key = np.uint64(key_of(example))
            index = int(np.searchsorted(self.keys, key))
            if index == len(self.keys) or self.keys[index] != key or not remaining[index]:
                return False
            remaining[index] -= 1
            return True

        return is_done


def key_of(example: Example) -> int:
    """Return a hash of the image, question, question_id and prompt of an example."""
    return _key(str(example.image), example.question, example.question_id, example.prompt)


def _key_of_line(line: dict[str, Any]) -> int:
    return _key(line["image"], str(line.get("question", "")), line.get("question_id", ""), str(line.get("prompt", "")))


def _key(image: str, question: str, question_id: int | str, prompt: str) -> int:
    """Return a hash of 64 bits. For ten million images, the probability that any two have the same hash is 1 in 400,000."""
    suffix = f"\0{question_id}\0{prompt}" if prompt or question_id != "" else ""
    digest = hashlib.blake2b(f"{image}\0{question}{suffix}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def _remove_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line, which a killed process may have written."""
    with writing(path), path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - CHUNK)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a file. Raise OutputError, with the line number, if a line is not a prediction of `infer`."""
    with reading(path):
        file = path.open("rb")
    with file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                if not isinstance(entry["image"], str):
                    raise TypeError
            except (ValueError, TypeError, KeyError):
                raise OutputError(
                    f"{path}:{number} is not a prediction line; remove the line, or set OUTPUT_DIR (--output-dir) to ''"
                ) from None
            yield entry


def example_of_line(line: dict[str, Any]) -> Example:
    """Return the example to which a line of predictions.jsonl or errors.jsonl belongs."""
    image, number = line["image"], line.get("question_id", "")
    prompt, number = str(line.get("prompt", "")), number if isinstance(number, int) else str(number)
    return Example(Path(image), "", image, 0, question=str(line.get("question", "")), prompt=prompt, question_id=number)


def resume_from(path: Path, keys: "array[int]") -> int:
    """Remove an incomplete last line, add the key of each line to `keys`, and return the number of lines."""
    before = len(keys)
    if path.exists():
        _remove_incomplete_line(path)
        keys.extend(map(_key_of_line, lines_of(path)))
    return len(keys) - before


def texts_of(path: Path, subject: Callable[[Example], Any], images: Container[Path], name: str) -> dict[str, dict[Any, str]]:
    """Return {`name`: {subject: text}} with the texts of a predictions file for `images`.

    Add the key "base" if the lines also have texts of the base.
    """
    texts: dict[str, dict[Any, str]] = {}
    for line in lines_of(path):
        if Path(line["image"]) in images:
            key = subject(example_of_line(line))
            if "base_text" in line:
                texts.setdefault("base", {})[key] = line["base_text"]
            texts.setdefault(name, {})[key] = line["text"]
    return texts
