"""Resolve the paths of millions of files."""

import os
from collections.abc import Iterable
from pathlib import Path

FEW = 100  # files in a folder below which the folder is not listed


def resolved(files: Iterable[str]) -> dict[str, str]:
    """Return file → the same as Path.resolve(), for millions of files: resolve and list each folder once."""
    found: dict[str, str] = {}
    by_folder: dict[str, list[str]] = {}
    for file in files:
        end = file.rfind(os.sep)
        if end < 0 or file[-1] in "./":  # ".." and other parts that may not be names
            found[file] = str(Path(file).resolve())
        else:
            by_folder.setdefault(file[:end], []).append(file)
    for folder, inside in by_folder.items():
        before = len(folder) + 1
        real, links = os.path.join(os.path.realpath(folder + os.sep), ""), _links(folder + os.sep, inside, before)  # noqa: PTH118
        if real == folder + os.sep and not links:
            found.update(zip(inside, inside, strict=True))  # the same string objects: copies would fill the memory
            continue
        for file in inside:
            found[file] = str(Path(file).resolve()) if file[before:] in links else real + file[before:]
    return found


def _links(folder: str, files: list[str], before: int) -> set[str]:
    """Return the names in a folder that may be links. A name starts at character `before` of its path."""
    if len(files) < FEW:
        return {file[before:] for file in files}
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:  # the folder can be entered but not listed
        return {file[before:] for file in files}


def in_walking_order(file: str) -> str:
    """Return a sort key that orders paths part by part, as Path does."""
    return file.replace(os.sep, "\0")
