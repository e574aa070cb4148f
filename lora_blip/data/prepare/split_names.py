"""Find the split in the names of files and folders, such as captions_train.json or test/annotations.jsonl."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_blip.data.entries import IMAGE_KEYS, PATH_PARTS, SPLITS, Entry, Located, first_key

Row = TypeVar("Row", bound=Any)
HELD_OUT = re.compile(r"val|test|dev|eval", re.IGNORECASE)  # in the name of a file that may not be for training
SPLIT_NAME = re.compile(rf"(?<![a-z])({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


def without_split(name: str) -> str:
    """Return a file name with * in place of its split: captions_*.json for captions_train.json."""
    return SPLIT_NAME.sub("*", name)


def splits_of_files(paths: Iterable[Path]) -> dict[Path, str]:
    """Return {file: its split} if the files are one data set, else {}.

    Files are one data set if their paths differ only in the split, and a file has the split train.
    """
    splits: dict[Path, str] = {}
    patterns = set()
    for path in paths:
        parts = [path.name, path.absolute().parent.name]
        index = next((index for index, part in enumerate(parts) if SPLIT_NAME.search(part)), None)
        if index is None:
            return {}
        split = SPLIT_NAME.search(parts[index])
        splits[path] = SPLITS[split[1].lower()] if split else ""
        patterns.add((path.absolute().parents[index], *map(without_split, parts[: index + 1])))
    return splits if len(patterns) == 1 < len(splits) and "train" in splits.values() else {}


def splits_of_list(paths: Iterable[Path]) -> dict[Path, str]:
    """Return {file: the split of its name, or "" if it has none}. Return {} if the names have no splits."""
    files = list(paths)
    return splits_of_files(files) or _own_splits(files)


def as_one_value(paths: Iterable[Path]) -> str:
    """Return files as one value of a setting, those for training first, or "" if a name has no split."""
    splits = splits_of_list(paths)
    files = sorted(splits, key=lambda path: (splits[path] != "train", path))
    return ",".join(map(str, files)) if all(splits.values()) else ""


def likely_for_training(files: Iterable[Path]) -> Path:
    """Return the first file whose name and folder contain no word for validation or a test, or else the first file."""
    return min(files, key=lambda path: (bool(HELD_OUT.search(path.name + path.parent.name)), path))


def _own_splits(files: list[Path]) -> dict[Path, str]:
    """Return {file: the split in its name or folder, or ""}, such as train for train_1.csv.

    The rest of the names may differ. Return {} if no file is for training, or if no file is for validation or a test.
    """
    several = len({path.absolute().parent for path in files}) > 1  # one folder for all says nothing about a file
    found = {
        path: SPLIT_NAME.search(path.name) or (several and SPLIT_NAME.search(path.absolute().parent.name)) for path in files
    }
    splits = {path: SPLITS[match[1].lower()] if match else "" for path, match in found.items()}
    named = set(splits.values()) - {""}
    return splits if "train" in named and len(named) > 1 else {}


def split_of_folders(name: str) -> str:
    """Return the split that the innermost folder train, val or test of an image path names, or ""."""
    folders = PATH_PARTS.split(name)[-2::-1]
    return next((SPLITS[folder.lower()] for folder in folders if folder.lower() in SPLITS), "")


def folder_splits(names: Sequence[str]) -> list[str]:
    """Return the split of each image path by its folders, or "" for a path without one.

    Return [] if the folders are no splits: fewer than half of the paths have one, or none is for training, or no other exists.
    """
    found = list(map(split_of_folders, names))
    kinds = set(found) - {""}
    return found if "train" in kinds and len(kinds) > 1 and 2 * sum(map(bool, found)) >= len(found) else []


def with_folder_splits(entries: Iterable[Located]) -> Iterator[Located]:
    """Yield the entries. An entry without a split, whose image path starts with train/, val/ or test/, gets this split."""
    for at, entry in entries:
        image = entry.get(first_key(entry, IMAGE_KEYS) or "") if isinstance(entry, dict) else None
        folder = image.replace("\\", "/").removeprefix("./").partition("/") if isinstance(image, str) else ("", "", "")
        split = SPLITS.get(folder[0].lower()) if folder[1] else None
        yield at, with_split(entry, split) if split and isinstance(entry, dict) else entry


def with_split(entry: Entry, split: str) -> Entry:
    """Return the entry with this split, if it has no split or an empty one."""
    return entry if entry.get("split") else entry | {"split": split}


def with_splits_of_folders(rows: list[Row], names: list[str]) -> list[Row]:
    """Return the rows with the folders train, val and test of their images as splits, if no row has a split.

    rows: named tuples with a field `split`. names: the image paths of the rows. See `folder_splits`.
    """
    folders = [] if any(row.split for row in rows) else folder_splits(names)
    return [row._replace(split=split) for row, split in zip(rows, folders, strict=True)] if folders else rows
