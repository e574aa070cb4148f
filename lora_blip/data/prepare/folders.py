"""Find the image file that a name means, and detect that two names mean the same file."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lora_blip.data.prepare.published import whole_name

DEPTH = 2  # levels of subfolders that are searched, as for Flickr8k_Dataset/Flicker8k_Dataset
COCO_2014 = re.compile(r"^COCO_(train|val|test)\d{4}_(?=\d{12}\.)")  # the release of 2017 has the same photos without it


class ImageFile(NamedTuple):
    """An image file that exists."""

    path: Path
    identity: object  # equal for two paths of the same file: a link, ./a.jpg, or A.JPG if the file system ignores case


class Folder:
    """The images of a source. by_name: names are unique, so an image in a subfolder is found by its name alone."""

    def __init__(self, root: Path, by_name: bool) -> None:
        self.root = root.absolute()
        self.below = _names(self.root) if by_name else {}
        self.known: dict[str, ImageFile | None] = {}

    def find(self, name: str) -> ImageFile | None:
        """Return the image file, or None if it does not exist."""
        if name not in self.known:
            self.known[name] = next(filter(None, map(_picture, self._spellings(name))), None)
        return self.known[name]

    def _spellings(self, name: str) -> Iterator[Path]:
        if name in self.below:  # `_names` found it, and prefers files in the root
            yield self.below[name]
        yield self.root / name
        if "\\" in name:  # written on Windows
            name = name.replace("\\", "/")
            yield self.root / name
        last = name.rpartition("/")[2]
        yield from (self.below[alias] for alias in (last, COCO_2014.sub("", last), whole_name(last)) if alias in self.below)


def _picture(path: Path) -> ImageFile | None:
    try:
        about = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    if not stat.S_ISREG(about.st_mode):
        return None
    path = path.resolve() if ".." in path.parts else path  # after a link, ".." is the parent of its target
    return ImageFile(path, (about.st_dev, about.st_ino) if about.st_ino else path.resolve())


def _names(root: Path) -> dict[str, Path]:
    """Return {file name: path}. If a name occurs several times, use the file that is nearest to the root."""
    found: dict[str, Path] = {}
    for folder, below, files in os.walk(root):
        below[:] = sorted(below) if len(Path(folder).relative_to(root).parts) < DEPTH else []
        for file in files:
            found.setdefault(file, Path(folder, file))
    return found
