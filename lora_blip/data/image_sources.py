"""Find the images of the setting `images`: a folder, a glob, a list or tar shards."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from lora_blip.data.annotations import plain
from lora_blip.data.entries import IMAGE_KEYS, as_text
from lora_blip.data.example import Example
from lora_blip.data.formats import TOO_LONG, jsonl_entries, numbered_lines
from lora_blip.data.image_folders import (
    SHARD,
    MissingImage,
    count_other,
    example_of,
    first_bytes,
    globbed,
    list_folder,
    missing,
    walk,
)
from lora_blip.data.image_paths import ImageFinder
from lora_blip.data.images import is_picture, open_image
from lora_blip.data.shards import BRACES, ShardImage, expanded, images_in_shard, open_shard_image
from lora_blip.errors import ImageError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.runtime.user_paths import local_path, suggestion

TABLES = (".csv", ".tsv", ".json", ".xlsx", ".parquet", ".arrow")  # suffixes of annotations that are not read as lists
MAX_LISTED = 8  # largest number of suffixes in the message about other files


class ImageSource:
    """An iterable of the images that a setting names, each as an example without a text. It keeps no image in memory.

    The setting is one of:
    - a folder, with its subfolders, or a folder of shards
    - a glob
    - a list: .txt with a path per line, or .jsonl with the key "image" (see `ListedImages`)
    - a tar shard, or a pattern such as 'shards/{0000..0031}.tar'

    `images.is_picture` decides which files are images. After an iteration, `others` contains the number of other files by
    suffix. The constructor raises ImageError if there is no image.
    """

    def __init__(self, setting: str | Path, image_root: str = "") -> None:
        """image_root: a folder that the paths of a list may be relative to, besides the folder of the list."""
        self.setting, self.image_root = local_path(str(setting)), image_root
        self.others: Counter[str] = Counter()
        if not str(setting).strip():
            raise ImageError(
                "IMAGES (--images) is empty; give a file, a folder, a glob or a list; for the current folder, give '.'"
            )
        self.moved_line = ""  # a message about paths of a list that were found by their last parts; it is set by an iteration
        problem = ""
        for example in self:
            if not isinstance(example, MissingImage):
                return
            problem = problem or f" ({example.reason})"
        problem = problem or f" ({self.others_line()})" * bool(self.others)
        raise ImageError(
            f"no image found at {self.setting!r}{printable(problem)}; {suggestion(self.setting)}give a file, a folder, a glob "
            "such as 'photos/*.jpg', a list (.txt, .jsonl) or shards such as 'shards/{0000..0031}.tar' (--images)"
        )

    def __iter__(self) -> Iterator[Example]:
        others: Counter[str] = Counter()
        yield from self._images(others)
        self.others = others

    def _images(self, others: Counter[str]) -> Iterator[Example]:
        path = Path(self.setting)
        if self.setting.startswith(("http://", "https://")):
            address = quoted_for_shell(self.setting)
            raise ImageError(printable(f"{self.setting} is a web address; download it first: curl -O {address}"))
        if path.is_file() and path.suffix.lower() in TABLES:
            raise ImageError(
                f"{printable(self.setting)} is a table, not an image or a list of images; give a folder of images, or write a "
                "list: a .txt file with a path in each line"
            )
        if path.is_dir():
            return in_folder(path, others)
        if path.is_file():
            return self._listed(path, others) if path.suffix.lower() in LISTS else in_file(path, others)
        if BRACES.search(self.setting) and path.suffix == SHARD:
            return chain.from_iterable(images_in_shard(shard, others) for shard in expanded(self.setting))
        return in_glob(self.setting, others)

    def _listed(self, path: Path, others: Counter[str]) -> Iterator[Example]:
        listed = ListedImages(path, self.image_root)
        yield from LISTS[path.suffix.lower()](path, listed, others)
        self.moved_line = printable(listed.describe())

    def others_line(self) -> str:
        """Return a line with the number of files that are not images, by suffix, or "" if there are none."""
        if not self.others:
            return ""
        kinds = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count:,} {quoted(kind)[1:-1]}" for kind, count in kinds[:MAX_LISTED]]
        parts += ["…"] * (len(self.others) > MAX_LISTED)
        return f"not images, left out: {counted(self.others.total(), 'file')} ({', '.join(parts)})"


def open_example(example: Example) -> Image.Image:
    """Return the decoded image of an example of any source. Raise ImageError as `open_image` does."""
    if isinstance(example, MissingImage):
        raise ImageError(printable(example.reason))
    return open_shard_image(example) if isinstance(example, ShardImage) else open_image(example.image)


def image_key(example: Example) -> Any:
    """Return a key that is equal for two examples of the same image."""
    return (example.shard, example.offset) if isinstance(example, ShardImage) else example.image


def in_file(path: str | Path, others: Counter[str]) -> Iterator[Example]:
    """Yield the image of a file, or the images of a shard."""
    return images_in_shard(str(path), others) if str(path).endswith(SHARD) else iter((example_of(path),))


def in_glob(pattern: str, others: Counter[str]) -> Iterator[Example]:
    """Yield the images that match a glob, and the images of shards that match it."""
    for path in globbed(pattern):
        if path.endswith(SHARD) or is_picture(Path(path).name, partial(first_bytes, path)):
            yield from in_file(path, others)
        else:
            count_other(Path(path).name, others)


def in_folder(folder: Path, others: Counter[str]) -> Iterator[Example]:
    """Yield the images of a folder and its subfolders. If the folder has only shards, yield the images of the shards."""
    try:
        images, shards, folders, rest = list_folder(str(folder))
    except OSError:
        return walk(str(folder), others)  # `walk` reports the reason
    if shards and not images and not folders:
        others.update(rest)
        return chain.from_iterable(images_in_shard(str(folder / name), others) for name in shards)
    return walk(str(folder), others)


class ListedImages:
    """Finds the files of a list: relative to its folder, or to `image_root`, or else by the last parts of a path."""

    def __init__(self, path: Path, image_root: str) -> None:
        self.path = path
        self.roots = [path.parent, *([Path(local_path(image_root))] if image_root else [])]
        self.finders = [ImageFinder(root) for root in self.roots]

    def file(self, written: str) -> Path:
        """Return the path of a file. If no file or several files match, return the path in the first root."""
        for root in self.roots:
            if os.path.lexists(path := root / local_path(written)):
                return path
        found = (finder.find(written)[0] for finder in self.finders)
        return Path(next(filter(None, found), self.roots[0] / local_path(written)))

    def describe(self) -> str:
        """Return a message about the paths that were found by their last parts, or "" if there are none."""
        texts = filter(None, (finder.describe() for finder in self.finders))
        return "\n".join(f"{self.path}: {text}" for text in texts)


def in_text(path: Path, listed: ListedImages, others: Counter[str]) -> Iterator[Example]:
    """Yield the images of a list with a path per line."""
    for number, line in numbered_lines(path):
        if line is None:
            yield missing(f"{path}:{number}", f"{path}:{number}: {TOO_LONG}")
        else:
            yield from in_file(listed.file(line.strip()), others)


def in_jsonl(path: Path, listed: ListedImages, others: Counter[str]) -> Iterator[Example]:
    """Yield the images of a JSONL file with the paths in the key "image". An object may also have a "prompt"."""
    for number, entry in jsonl_entries(path):
        image = entry if isinstance(entry, str) else next((entry[key] for key in IMAGE_KEYS if key in entry), None)
        if isinstance(entry, str) or not isinstance(image, str) or not image.strip():
            reason = entry if isinstance(entry, str) else f"no image: expected one of the keys {', '.join(IMAGE_KEYS[:3])}"
            yield missing(f"{path}:{number}", f"{path}:{number}: {reason}")
        else:
            prompt = plain(as_text(entry.get("prompt")) or "")
            examples = in_file(listed.file(image), others)
            yield from (replace(example, prompt=prompt) for example in examples) if prompt else examples


LISTS: dict[str, Callable[[Path, ListedImages, Counter[str]], Iterator[Example]]] = {".txt": in_text, ".jsonl": in_jsonl}
