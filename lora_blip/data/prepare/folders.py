"""Find the image file for a path in a source, and detect two paths of the same file."""

import stat
from pathlib import Path
from typing import NamedTuple

from lora_blip.data.image_paths import ImageFinder


class ImageFile(NamedTuple):
    """An image file that exists."""

    path: Path
    identity: object  # equal for two paths of the same file: a link, ./a.jpg, or A.JPG if the file system ignores case


class Folder:
    """Finds the images of a source under the folder `root`, each path once."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.finder = ImageFinder(root)
        self.known: dict[str, ImageFile | str] = {}  # path as written → image file, or the reason why there is none

    def find(self, name: str) -> ImageFile | str:
        """Return the image file for a path as written in the source, or the reason why there is none."""
        if name not in self.known:
            path, reason = self.finder.find(name)
            self.known[name] = reason or _image_file(Path(path)) or f"{path} is not a file"
        return self.known[name]


def _image_file(path: Path) -> ImageFile | None:
    """Return the ImageFile of a path, or None if it is not a regular file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    path = path.resolve() if ".." in path.parts else path  # ".." after a link is the parent of the link's target
    return ImageFile(path, (status.st_dev, status.st_ino) if status.st_ino else path.resolve())
