"""The data set of a training run: images with their lines. An image is decoded and augmented, or read from a cache."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lora_blip.data.annotations import unreadable
from lora_blip.data.augmentation import augment, names_side
from lora_blip.data.disk_cache import Store, image_digest
from lora_blip.data.example import Example
from lora_blip.data.images import open_image
from lora_blip.data.preprocessing import pixels_of, planes_of, side_of
from lora_blip.errors import ImageError

Key = tuple[int, int]  # (epoch, index of an item)
MAX_LINES = 8  # largest number of lines in one item; an image with more lines has several items


class Caches(NamedTuple):
    """Disk caches of tensors that do not change between epochs. None: not cached."""

    pixels: Store | None = None  # resized images, (H, W, 3) uint8
    states: Store | None = None  # see `tasks.frozen_prefix`


NO_CACHES = Caches()


class ImageItem(NamedTuple):
    """One image and its lines. Either `pixel_values` or `states` is set."""

    examples: list[Example]
    pixel_values: Tensor | None  # (3, H, W), float32, or uint8 if `Pixels.exact`: `DeviceBatch` has float32
    states: Tensor | None = None  # (tokens, width), from the cache
    key: str = ""  # the key under which the image's states will be cached; "": they are not cached


class ImageDataset(Dataset[ImageItem]):
    """Return the ImageItem of a key (epoch, index).

    together: if True, an item has up to MAX_LINES lines of an image. If False, an item has one line.
    views: the number of augmented versions of an image. Epoch e uses version e modulo `views`. 0: a new version in each epoch.

    The augmentation is seeded by the run's seed, and by the epoch and the line, or, with `views`, by the version and the image.
    So an item depends neither on the number of workers nor on the step at which a run is resumed.
    """

    def __init__(
        self, examples: list[Example], image_processor: Any, augmented: bool, seed: int, together: bool = False, views: int = 0,
        caches: Caches = NO_CACHES,
    ) -> None:  # fmt: skip
        self.examples, self.augmented, self.seed, self.views, self.caches = examples, augmented, seed, views, caches
        self.pixels = pixels_of(image_processor)
        self.side = side_of(image_processor)
        self.lines, self.starts = grouped(examples, MAX_LINES if together else 1)
        self.text_with_side: dict[str, str] = {}  # image file → a text with "left" or "right": do not mirror this image
        for words, file in ((e.words, e.file) for e in examples if augmented):
            if names_side(words):
                self.text_with_side[file] = words

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, key: Key) -> ImageItem:
        return self.item(key)

    def item(self, key: Key, use_cached: bool = True) -> ImageItem:
        """Return the item of a key. If `use_cached` is False, it has pixel values even if the cache contains its states.

        Raise DataError, with file and line, if the image cannot be read.
        """
        epoch, index = key
        lines = self.lines[self.starts[index] : self.starts[index + 1]].tolist()
        examples = [self.examples[line] for line in lines]
        try:
            return self._item(examples, epoch, lines[0], use_cached)
        except ImageError as error:
            raise unreadable(examples[0], error) from None

    def _item(self, examples: list[Example], epoch: int, line: int, use_cached: bool) -> ImageItem:
        image = examples[0].image
        if not self.augmented:
            digest = image_digest(image) if any(self.caches) else ""
            return self._load(examples, digest, partial(open_image, image), use_cached)
        if not self.views:
            return self._load(examples, "", partial(self._augmented, image, f"{epoch} {line}"), use_cached)
        view, digest = epoch % self.views, image_digest(image)  # all lines of an image share its views
        key = f"{digest}-{self.seed}-{view}{'-sided' * (str(image) in self.text_with_side)}"
        return self._load(examples, key, partial(self._augmented, image, f"{view} {digest}"), use_cached)

    def _augmented(self, image: Path, draw: str) -> Image.Image:
        """Return a decoded image after a random augmentation, which depends on the run's seed and on `draw`."""
        text = self.text_with_side.get(str(image), "")
        return augment(open_image(image), text, random.Random(f"{self.seed} {draw}"), self.side)

    def _load(self, examples: list[Example], key: str, decode: Callable[[], Image.Image], use_cached: bool) -> ImageItem:
        """Return the item from a cache. If no cache has it, call `decode` for the image, and cache its pixels.

        key: the key of the image in both caches. "": the image is not cached.
        """
        state_cache = self.caches.states if key else None
        if state_cache and use_cached and (states := state_cache.get(key)) is not None:
            return ImageItem(examples, None, states)
        values = self._bytes(key, decode) if self.pixels.exact else self.pixels(decode())
        return ImageItem(examples, values, key=key if state_cache else "")

    def _bytes(self, key: str, decode: Callable[[], Image.Image]) -> Tensor:
        """Return the bytes of an image at the model's size, (3, H, W) uint8, from the cache or by `decode`."""
        cache = self.caches.pixels if key else None
        levels = cache.get(key) if cache else None
        if levels is None:
            levels = self.pixels.resized(decode())
            if cache:
                cache.put(key, levels)
        return planes_of(levels)


def grouped(examples: list[Example], max_lines: int) -> tuple[Any, Any]:
    """Group the lines by image, with at most `max_lines` lines in a group. Images are in the order of their first lines.

    Return `lines`, the line numbers sorted by group, and `starts` (groups + 1,): group i is lines[starts[i] : starts[i + 1]].
    """
    count = len(examples)
    if max_lines == 1:
        return np.arange(count), np.arange(count + 1)
    images: dict[str, int] = {}
    image_of_line = np.fromiter((images.setdefault(e.file, len(images)) for e in examples), dtype=np.int64, count=count)
    lines = np.argsort(image_of_line, kind="stable")
    first = np.searchsorted(image_of_line[lines], np.arange(len(images)))  # (images,)
    rank = np.arange(count) - first[image_of_line[lines]]  # (lines,) position among the lines of the image
    return lines, np.append(np.flatnonzero(rank % max_lines == 0), count)
