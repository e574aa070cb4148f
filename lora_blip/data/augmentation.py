"""Change training images at random: shift, scale, brightness, and a mirror image unless a text names a side."""

import random
import re

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

LEFT_OR_RIGHT = re.compile(r"\b(left|right)", re.IGNORECASE)  # a text with such a word is wrong for the mirrored image
SHIFT, ZOOM, BRIGHTNESS = 0.05, 0.1, 0.15  # fractions of the side, the scale and the grey level
LEVELS = np.arange(256)


def names_side(text: str) -> bool:
    """Return True if a text contains "left" or "right"."""
    if text.isascii() and "left" not in (lower := text.lower()) and "right" not in lower:
        return False  # this test is ten times as fast as the search
    return LEFT_OR_RIGHT.search(text) is not None


def augment(image: Image.Image, text: str, rng: random.Random, side: int = 384) -> Image.Image:
    """Return the image with a small random shift, scale and brightness, mirrored with probability 1/2.

    text: the texts of the image. If they contain "left" or "right", the image is not mirrored.
    side: height and width of the model's input in pixels. The caller resizes the image to it.
    """
    if rng.random() < 0.5 and not names_side(text):
        image = ImageOps.mirror(image)
    if min(image.size) > 2 * side:  # shrink a large image first: the model does not read the details
        scale = 2 * side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BOX)
    width, height = image.size
    margin = (round(width * (SHIFT + ZOOM)), round(height * (SHIFT + ZOOM)))
    padded = Image.fromarray(padded_by_edges(np.asarray(image), *margin))
    zoom = 1 + rng.uniform(-ZOOM, ZOOM)
    left = margin[0] + width * (rng.uniform(-SHIFT, SHIFT) + (1 - zoom) / 2)
    top = margin[1] + height * (rng.uniform(-SHIFT, SHIFT) + (1 - zoom) / 2)
    box = (max(0.0, left), max(0.0, top), min(padded.width, left + width * zoom), min(padded.height, top + height * zoom))
    moved = padded.resize(image.size, Image.Resampling.BILINEAR, box=box)
    light = 1 + rng.uniform(-BRIGHTNESS, BRIGHTNESS)
    table = np.rint(LEVELS * light).clip(max=255).astype(int).tolist()
    return moved.point(table * 3)


def padded_by_edges(pixels: NDArray[np.uint8], across: int, down: int) -> NDArray[np.uint8]:
    """Return pixels (H, W, 3) with `across` more columns and `down` more rows on each side: copies of the outermost ones.

    It equals np.pad with mode="edge", which takes three times as long.
    """
    height, width, channels = pixels.shape
    padded = np.empty((height + 2 * down, width + 2 * across, channels), dtype=np.uint8)
    rows = padded[down : down + height]
    rows[:, across : across + width] = pixels
    rows[:, :across], rows[:, across + width :] = pixels[:, :1], pixels[:, -1:]
    padded[:down], padded[down + height :] = rows[0], rows[-1]
    return padded
