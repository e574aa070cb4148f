"""Paths that a user gives: check that they exist, and suggest the nearest existing name.

A command calls these checks before it imports torch, which takes seconds. The code that reads the files calls them too, so the
message of an error does not depend on the time at which it is found.
"""

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from lora_blip.errors import ConfigError, DataError

BASE_OF = {"caption": "assets/tiny-blip", "vqa": "assets/tiny-blip-vqa", "retrieval": "assets/tiny-blip-itm"}  # embedded bases
ANNOTATIONS = 'give a .jsonl file that has a line {"image": "red_1.jpg", "text": "a red cube"} for each example'
TEXT_FILES = (".jsonl", ".json", ".tsv", ".csv", ".txt")
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
MOST_NAMES = 5000  # names of a folder that are compared
FILE_ADDRESS = re.compile(r"file:(?://(?:localhost)?(?=/)|(?!//))(/.*)", re.IGNORECASE | re.DOTALL)  # without a host
SIMILAR = 0.6  # difflib's ratio of two names that are suggested for each other


def require_annotations(source: str | Path, setting: str = "annotations") -> None:
    """Raise DataError if a file or folder of annotations does not exist. Accept several files, separated by commas."""
    if not os.path.lexists(source) and "," not in str(source):
        raise missing_annotations(source, setting)


def paths_of(source: str) -> list[Path]:
    """Return the paths of a setting that names a file or folder, or several, separated by commas."""
    return [Path(source)] if exists(Path(source)) else [Path(part.strip()) for part in source.split(",") if part.strip()]


def exists(path: Path) -> bool:
    """Return True if a path exists. One that is too long for a file name, such as several names, does not exist."""
    try:
        return path.exists()
    except (OSError, ValueError):  # ValueError: a NUL character
        return False


def missing_annotations(source: str | Path, setting: str = "annotations") -> DataError:
    """Return the error for annotations that do not exist. setting: the one that names them."""
    if not str(source):
        return DataError(f"{setting} is empty; {ANNOTATIONS}")
    named = f"annotations {str(source)!r} do not exist{_searched(source)}"
    if setting != "annotations":
        named = f"{setting} = {str(source)!r} (--{setting.replace('_', '-')}): the annotations do not exist{_searched(source)}"
        if setting == "references":
            return DataError(f"{named}; {suggestion(source)}give a file in the format of the training data, with other images")
    return DataError(f"{named}; {suggestion(source)}{ANNOTATIONS}")


def require_folder(setting: str, folder: str | Path) -> None:
    """Raise ConfigError if the folder of images that a setting names does not exist. Accept an empty setting."""
    if folder and not Path(folder).is_dir():
        problem = "it is not a folder" if os.path.lexists(folder) else f"the folder does not exist{_searched(folder)}"
        fix = f"give the folder that contains the images (--{setting.replace('_', '-')})"
        raise ConfigError(f"{setting} = {str(folder)!r}: {problem}; {suggestion(folder, folders=True)}{fix}")


def is_file(text: str, setting: str) -> bool:
    """Return True if a setting names a file. Raise ConfigError if it ends like a file name and there is no such file."""
    try:
        exists = Path(text).is_file()
    except (OSError, ValueError):  # a long question is not a valid path
        return False
    if not exists and Path(text).suffix.lower() in TEXT_FILES:
        fix = "give the path of a file that exists"
        raise ConfigError(f"{setting} = {text!r}: there is no such file{_searched(text)}; {suggestion(text)}{fix}")
    return exists


def local_path(written: str) -> str:
    """Return the path of a file URI, such as file:///home/me/my%20photos/1.jpg, or any other path unchanged."""
    match = FILE_ADDRESS.fullmatch(written)
    if not match:
        return written
    path = unquote(match[1])
    return path[1:] if re.match("/[A-Za-z]:", path) else path


def looks_like_image(text: str) -> bool:
    """Return True if a text has the suffix of an image, or is the path of an existing file."""
    try:
        return Path(text).suffix.lower() in IMAGE_FILES or Path(text).is_file()
    except (OSError, ValueError):  # a long question is not a valid path
        return False


def suggestion(path: str | Path, others: Iterable[str] = (), folders: bool = False) -> str:
    """Return "did you mean '…'? Otherwise " with the nearest existing path, or "" if none is similar.

    others: more paths that may be meant. folders: suggest only folders.
    """
    near = nearest_path(path, others, folders)
    return f"did you mean {near!r}? Otherwise " if near else ""


def nearest_path(path: str | Path, others: Iterable[str] = (), folders: bool = False) -> str:
    """Return the existing path that is most similar to a missing one, or "" if none is similar.

    One part of the path is replaced: the first that does not exist. `others` are compared as whole texts. A path of Windows is
    first written with slashes.
    """
    present = os.path.isdir if folders else os.path.exists  # False for a name that is too long, unlike Path.exists
    if "\\" in str(path) and os.sep == "/":
        path = str(path).replace("\\", "/")
        if present(path):
            return path
    start, missing = Path(path), list[str]()
    while start.name and not os.path.lexists(start):
        missing.insert(0, start.name)
        start = start.parent
    candidates: list[str] = []
    if missing:
        replaced = [Path(start, name, *missing[1:]) for name in _similar(missing[0], _names(start), 3)]
        candidates = [str(each) for each in replaced if present(each) and not _is_other_kind(path, each)]
    return next(iter(candidates), "") or next(iter(_similar(str(path), list(others), 1)), "")


def _is_other_kind(missing: str | Path, near: Path) -> bool:
    """Return True for a missing file and a folder whose name is similar, such as test.jsonl and tests."""
    stem, suffix = os.path.splitext(os.path.basename(missing).casefold())  # noqa: PTH119, PTH122
    is_file = suffix in (*IMAGE_FILES, *TEXT_FILES, ".parquet", ".ndjson", ".gz") and suffix != near.suffix.casefold()
    return is_file and near.name.casefold() != stem and near.is_dir()


def _similar(name: str, names: Iterable[str], most: int) -> list[str]:
    """Return up to `most` of the names that are similar, the most similar first. Ignore upper and lower case."""
    folded = {other.casefold(): other for other in names if similar_without_suffix(name, other)}
    return [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, most, SIMILAR)]


def similar_without_suffix(name: str, other: str) -> bool:
    """Return False if only the suffixes make two names similar, as in missing.jpg and line.jpg.

    The suffixes are left out if they are equal, or if both are those of images or both those of texts.
    """
    stem, suffix = os.path.splitext(name.casefold())  # noqa: PTH122 — also for names that are no paths
    other_stem, other_suffix = os.path.splitext(other.casefold())  # noqa: PTH122
    one_kind = any(suffix in kind and other_suffix in kind for kind in (IMAGE_FILES, TEXT_FILES))
    only_stems = one_kind or (suffix == other_suffix != "")
    return not only_stems or difflib.SequenceMatcher(None, other_stem, stem).ratio() >= SIMILAR


def _names(folder: Path) -> list[str]:
    """Return the names in a folder that are not hidden; none if it cannot be listed."""
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))[:MOST_NAMES]  # noqa: PTH208
    except OSError:
        return []


def _searched(path: str | Path) -> str:
    """Return " in '…'" with the current folder, for a relative path."""
    return "" if Path(path).is_absolute() else f" in {str(Path.cwd())!r}"


def relative_if_below(path: Path) -> str:
    """Return the path relative to the current folder if it is below it, else unchanged."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
