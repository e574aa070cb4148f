"""The pictures of a data set, each with the lines about it: opened, augmented, made into pixel values, or read from a cache."""

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
from lora_blip.data.disk_cache import Store, image_digest
from lora_blip.data.example import Example
from lora_blip.data.images import augment, names_side, open_image
from lora_blip.data.preprocessing import pixels_of, side_of
from lora_blip.errors import ImageError

Key = tuple[int, int]  # (epoch, number of a group of lines)
MOST = 8  # lines about one image that come together: what is more comes with another batch


class Caches(NamedTuple):
    """What is kept of pictures that do not change between epochs."""

    pixels: Store | None = None  # (H, W, 3) uint8, resized
    states: Store | None = None  # what a frozen ViT makes of them, see `tasks.prefix`


NO_CACHES = Caches()


class ImageItem(NamedTuple):
    """Lines about one image, and what is known of it: its pixel values, or what a frozen ViT once made of them."""

    examples: list[Example]
    pixel_values: Tensor | None  # (3, H, W) float32
    states: Tensor | None = None  # (tokens, width)
    key: str = ""  # to keep its states under; "": they are not kept


class ImageDataset(Dataset[ImageItem]):
    """(epoch, number) → the lines about one image, and the image.

    Augmentation draws from a generator of its own for each key, so that it is the same whatever the number of workers
    and wherever a run is taken up again. `together`: all lines about an image come with one look at it, MOST at a time;
    else each comes alone. `views`: so many versions of an augmented picture come in turn; 0: always another.
    """

    def __init__(
        self, examples: list[Example], image_processor: Any, augmented: bool, seed: int, together: bool = False, views: int = 0,
        caches: Caches = NO_CACHES,
    ) -> None:  # fmt: skip
        self.examples, self.augmented, self.seed, self.views, self.caches = examples, augmented, seed, views, caches
        self.pixels = pixels_of(image_processor)
        self.side = side_of(image_processor)
        self.lines, self.starts = grouped(examples, MOST if together else 1)
        self.sided: dict[str, str] = {}  # what is said of an image: a mirror must not make any of it false
        for words, file in ((e.words, e.file) for e in examples if augmented):
            if names_side(words):
                self.sided[file] = words

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, key: Key) -> ImageItem:
        return self.look(key)

    def look(self, key: Key, known: bool = True) -> ImageItem:
        """`known`: its states will do, where they are kept; else its pixel values are given in any case.

        Raises DataError, with the line, for a picture that cannot be read.
        """
        epoch, number = key
        lines = self.lines[self.starts[number] : self.starts[number + 1]].tolist()
        examples = [self.examples[line] for line in lines]
        try:
            return self._looked(examples, epoch, lines[0], known)
        except ImageError as error:
            raise unreadable(examples[0], error) from None

    def _looked(self, examples: list[Example], epoch: int, line: int, known: bool) -> ImageItem:
        image = examples[0].image
        if not self.augmented:
            return self._kept(examples, image_digest(image) if any(self.caches) else "", partial(open_image, image), known)
        if not self.views:
            return self._kept(examples, "", partial(self._drawn, image, f"{epoch} {line}"), known)
        view, digest = epoch % self.views, image_digest(image)  # one digest, one view, whichever line asks for it
        name = f"{digest}-{self.seed}-{view}{'-sided' * (str(image) in self.sided)}"
        return self._kept(examples, name, partial(self._drawn, image, f"{view} {digest}"), known)

    def _drawn(self, image: Path, draw: str) -> Image.Image:
        return augment(open_image(image), self.sided.get(str(image), ""), random.Random(f"{self.seed} {draw}"), self.side)

    def _kept(self, examples: list[Example], name: str, make: Callable[[], Image.Image], known: bool) -> ImageItem:
        """What a cache has under this name, "" being none; else what is made is kept there."""
        states = self.caches.states if name else None
        if states and known and (value := states.get(name)) is not None:
            return ImageItem(examples, None, value)
        pixels = self.caches.pixels if name and self.pixels.exact else None
        levels = pixels.get(name) if pixels else None
        if levels is None and pixels:
            levels = self.pixels.resized(make())
            pixels.put(name, levels)
        values = self.pixels(make()) if levels is None else self.pixels.of_bytes(levels)
        return ImageItem(examples, values, key=name if states else "")


def grouped(examples: list[Example], most: int) -> tuple[Any, Any]:
    """The lines in groups of up to `most` about one image, in the order in which the images come first.

    Numbers of lines (lines,), and where each group starts among them (groups + 1,).
    """
    count = len(examples)
    if most == 1:
        return np.arange(count), np.arange(count + 1)
    images: dict[str, int] = {}
    of_line = np.fromiter((images.setdefault(e.file, len(images)) for e in examples), dtype=np.int64, count=count)
    lines = np.argsort(of_line, kind="stable")
    first = np.searchsorted(of_line[lines], np.arange(len(images)))  # of each image
    place = np.arange(count) - first[of_line[lines]]  # of each line among those of its image
    return lines, np.append(np.flatnonzero(place % most == 0), count)
