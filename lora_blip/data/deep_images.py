"""Convert grey images with more than 8 bits per pixel (16-bit and 32-bit integers, and floats) to 8 bits.

A value is scaled by the full range of its type, so that equal values have equal brightness in each image of a data set.
"""

import threading
from collections.abc import Callable

import numpy as np
from PIL import Image

from lora_blip.runtime.counts import counted, first_names
from lora_blip.runtime.untrusted import UnreadableError

BITS, SAMPLE_FORMAT, SIGNED = 258, 339, 2  # TIFF's tags, and the sample format of signed integers
MOST = 2.0  # if most floats are larger, 1 is not white; otherwise, larger ones are highlights, which are clipped
DARK = 32  # grey level; an image without a brighter pixel is nearly black
LISTED = 3  # names in a warning


class DarkImages:
    """Collects the names of images that are nearly black after the conversion. Threads may share it."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.lock = threading.Lock()

    def add(self, name: str) -> None:
        """Add the name of an image."""
        with self.lock:
            self.names.append(name)

    def warning(self) -> str:
        """Return the warning that names the first images, or ""."""
        if not self.names:
            return ""
        return (
            f"{counted(len(self.names), 'image')} with 16 or more bits per pixel: nearly black, because the values use a small "
            f"part of the range (0–65,535 for 16 bits, 0–1 for floats): {first_names(sorted(self.names), LISTED)}; "
            "if that is wrong, multiply their values, or save them with 8 bits"
        )


class FirstDarkImage(DarkImages):
    """Prints the warning for the first image only."""

    def add(self, name: str) -> None:
        with self.lock:
            if not self.names:
                self.names.append(name)
                print(self.warning(), flush=True)


def is_deep(image: Image.Image) -> bool:
    """Return True if the image is grey and has more than 8 bits per pixel."""
    return image.mode.startswith("I") or image.mode == "F"


def highest_value(image: Image.Image) -> float:
    """Return the value that becomes white: the largest value of the pixel type in the file, or 1 for floats.

    An image of mode I without TIFF tags (a PNG, or an image made in memory) counts as 16 bits, because PNG has at most 16.
    """
    if image.mode == "F":
        return 1.0
    tags = getattr(image, "tag_v2", None)
    if tags is None or image.mode != "I":
        return 65535.0
    bits, kind = tags.get(BITS, (16,))[0], tags.get(SAMPLE_FORMAT, (1,))[0]
    return float(2 ** (bits - (kind == SIGNED)) - 1)


def to_grey(image: Image.Image, highest: float, on_dark: Callable[[], object]) -> Image.Image:
    """Return 8-bit grey: 0 stays 0, `highest` becomes 255, and values outside are clipped. Transparent pixels become white.

    Call `on_dark` if no pixel of the result is brighter than DARK. Raise UnreadableError for floats from 0 to 255: most of
    them would become white.
    """
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F" and np.sum(values > MOST) > np.sum(values > 0) / 2:
        largest = np.max(values, initial=0, where=values < np.finfo(np.float32).max)
        white = 255 if largest <= 255 else 65535 if largest <= 65535 else "the value of white"
        fix = f"divide the values by {white}, or save the image with 8 bits; if the large values are errors, clip them at 1"
        raise UnreadableError(f"its values are floats up to {largest:.4g}, but white must be 1; {fix}")
    transparent_value = image.info.get("transparency")
    is_transparent = values == transparent_value if isinstance(transparent_value, int) else None
    if highest == 2**32 - 1:  # Pillow reads unsigned values as signed
        values = np.where(values < 0, values + 2**32, values)
    values.clip(0, highest, out=values)
    values *= 255.0 / highest
    grey = values.astype(np.uint8)
    if grey.size and grey.max() < DARK:
        on_dark()
    if is_transparent is not None:
        grey[is_transparent] = 255
    return Image.fromarray(grey)
