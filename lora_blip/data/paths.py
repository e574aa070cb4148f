"""Where files are in truth, when there are a million of them."""

import os
from collections.abc import Iterable
from pathlib import Path

FEW = 100  # names in a folder, for which it is not listed whole


def resolved(files: Iterable[str]) -> dict[str, str]:
    """File → where it is, as Path.resolve() says, for a million of them: each folder is resolved and listed once."""
    found: dict[str, str] = {}
    by_folder: dict[str, list[str]] = {}
    for file in files:
        end = file.rfind(os.sep)
        if end < 0 or file[-1] in "./":  # "..", and what else may be no name
            found[file] = str(Path(file).resolve())
        else:
            by_folder.setdefault(file[:end], []).append(file)
    for folder, inside in by_folder.items():
        before = len(folder) + 1
        real, links = os.path.join(os.path.realpath(folder + os.sep), ""), _links(folder + os.sep, inside, before)  # noqa: PTH118
        if real == folder + os.sep and not links:
            found.update(zip(inside, inside, strict=True))  # the same strings: two of each would fill the memory
            continue
        for file in inside:
            found[file] = str(Path(file).resolve()) if file[before:] in links else real + file[before:]
    return found


def _links(folder: str, files: list[str], before: int) -> set[str]:
    """Which names in a folder, what follows the first `before` characters, may be links."""
    if len(files) < FEW:
        return {file[before:] for file in files}
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_symlink()}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError:  # it may be entered, and not listed
        return {file[before:] for file in files}


def in_walking_order(file: str) -> str:
    """A key that sorts as Path does: part by part."""
    return file.replace(os.sep, "\0")
