"""Resolve and sort the paths of millions of files."""

import os
from collections.abc import Iterable
from pathlib import Path

FEW = 100  # for fewer files than this, their folder is not listed


def resolved(files: Iterable[str]) -> dict[str, str]:
    """Return {file: str(Path(file).resolve())}. For speed, each folder is resolved and listed only once."""
    resolved_by_file: dict[str, str] = {}
    by_folder: dict[str, list[str]] = {}
    for file in files:
        end = file.rfind(os.sep)
        if end < 0 or file[-1] in "./":  # the last part is not a name, such as ".."
            resolved_by_file[file] = str(Path(file).resolve())
        else:
            by_folder.setdefault(file[:end], []).append(file)
    for folder, inside in by_folder.items():
        start = len(folder) + 1  # the index at which the name begins in a path
        real, links = os.path.join(os.path.realpath(folder + os.sep), ""), _links(folder + os.sep, inside, start)  # noqa: PTH118
        if real == folder + os.sep and not links:
            # the same string objects, because copies would fill the memory
            resolved_by_file.update(zip(inside, inside, strict=True))
            continue
        for file in inside:
            resolved_by_file[file] = str(Path(file).resolve()) if file[start:] in links else real + file[start:]
    return resolved_by_file


def _links(folder: str, files: list[str], start: int) -> set[str]:
    """Return the names in a folder that may be links. `start` is the index at which the name begins in each of `files`."""
    if len(files) < FEW:
        return {file[start:] for file in files}
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:  # the folder can be entered but not listed
        return {file[start:] for file in files}


def in_walking_order(file: str) -> str:
    """Return a sort key that orders paths part by part, as Path does."""
    return file.replace(os.sep, "\0")
