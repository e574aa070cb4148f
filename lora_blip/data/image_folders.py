"""Find the image files in folders and globs, in a fixed order, and count the files that are not images."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lora_blip.data.example import Example
from lora_blip.data.images import HEAD, SUFFIXES, is_picture
from lora_blip.errors import ImageError
from lora_blip.runtime.untrusted import open_regular, os_error_reason, printable

SHARD = ".tar"
MAX_SUFFIXES = 100  # largest number of suffixes that are counted separately


@dataclass(frozen=True, slots=True)
class MissingImage(Example):
    """An example for a folder or shard that cannot be read. `reason` is a message for the user."""

    reason: str = ""


def example_of(image: str | Path, question: str = "") -> Example:
    """Return an example of an image without a text."""
    return Example(Path(image), "", str(image), 0, question=question)


def missing(name: str | Path, reason: str) -> MissingImage:
    """Return a MissingImage for a file, folder or shard that cannot be read."""
    return MissingImage(Path(name), "", str(name), 0, reason=reason)


def walk(folder: str, others: Counter[str]) -> Iterator[Example]:
    """Yield the images of a folder and its subfolders, sorted by name. Skip links to folders, which may form a loop."""
    stack = [_entries(folder, others)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
        elif isinstance(entry, Example):
            yield entry
        else:
            stack.append(_entries(entry, others))


def _entries(folder: str, others: Counter[str]) -> Iterator[Example | str]:
    """Yield the images of one folder and the paths of its subfolders, sorted by name."""
    try:
        images, shards, folders, rest = list_folder(folder)
    except OSError as error:
        yield missing(folder, f"{folder} cannot be listed ({os_error_reason(error)})")
        return
    others.update(rest + Counter({SHARD: len(shards)}))
    inner = set(folders)
    for name in sorted(images + folders):
        path = str(Path(folder) / name)
        yield path if name in inner else example_of(path)


def list_folder(folder: str) -> tuple[list[str], list[str], list[str], Counter[str]]:
    """Return the names of the image files, shards and subfolders, and the number of other files by suffix."""
    others: Counter[str] = Counter()
    images: list[str] = []
    shards: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            dot = entry.name.rfind(".")  # not Path.suffix, which takes seconds for a million names
            suffix = entry.name[dot:].lower() if dot > 0 else ""
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.is_dir():
                others["links to folders"] += 1
            elif suffix == SHARD:
                shards.append(entry.name)
            elif (suffix in SUFFIXES and entry.name[0] != ".") or is_picture(entry.name, partial(first_bytes, entry.path)):
                images.append(entry.name)
            else:
                count_other(entry.name, others)
    return images, sorted(shards), folders, others


def first_bytes(path: str) -> bytes:
    """Return the first bytes of a file, or b"" if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD)
    except OSError:
        return b""


def count_other(name: str, others: Counter[str]) -> None:
    """Count a file that is not an image, by its suffix."""
    kind = "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without a suffix"
    others[kind if kind in others or len(others) < MAX_SUFFIXES else "of other kinds"] += 1


def globbed(pattern: str) -> list[str]:
    """Return the files that match a glob, in the order of `walk`. Raise ImageError if the glob is invalid."""
    path = Path(pattern)
    root = Path(path.anchor) if path.is_absolute() else Path()
    try:
        files = [str(p) for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file()]
    except ValueError as error:
        raise ImageError(
            printable(f"{pattern!r} is not a valid glob ({error}); give a file, a folder or a glob such as 'photos/*.jpg'")
        ) from None
    return sorted(files, key=lambda name: name.replace(os.sep, "\0"))
