"""Decode each image of a data set once, to find those that are damaged, nearly black or tiny."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from PIL import Image

from lora_blip.data.deep_images import DarkImages
from lora_blip.data.images import open_image
from lora_blip.errors import ImageError
from lora_blip.runtime.counts import counted, first_names
from lora_blip.runtime.progress import track
from lora_blip.runtime.untrusted import printable

TINY = 4  # an image with a side of fewer pixels is probably not a photo
LISTED = 3  # names in a warning

OnDecoded = Callable[[str, Image.Image], object]


def undecodable(
    images: set[str], on_decoded: OnDecoded | None = None, report: Callable[[str], object] = print
) -> dict[str, str]:
    """Return {image file: the reason why it cannot be decoded}. Report images that are nearly black or tiny.

    Each file is decoded once. Threads help, because Pillow releases the GIL while it decodes.
    """
    dark, tiny = DarkImages(), dict[str, tuple[int, int]]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(partial(_decode_failure, on_decoded=on_decoded, dark=dark, tiny=tiny), sorted(images))
        reasons = track(reasons, "decoding the images once", len(images), "image", delay=2)
        failures = {image: reason for image, reason in zip(sorted(images), reasons, strict=True) if reason}
    for warning in filter(None, (dark.warning(), tiny_warning(tiny))):
        report(warning)
    return failures


def tiny_warning(sizes: dict[str, tuple[int, int]]) -> str:
    """Return the warning that names the first tiny images with their sizes, or "" if there is none."""
    if not sizes:
        return ""
    names = [f"{name} ({width} × {height})" for name, (width, height) in sorted(sizes.items())]
    start = f"warning: {counted(len(names), 'image')} with fewer than {TINY} pixels in a row or a column"
    return printable(f"{start}: {first_names(names, LISTED)}; remove their lines if they are not photos")


def _decode_failure(image: str, on_decoded: OnDecoded | None, dark: DarkImages, tiny: dict[str, tuple[int, int]]) -> str:
    """Return the reason why an image cannot be decoded, or "". Call `on_decoded` with a decoded image."""
    try:
        decoded_image = open_image(image, dark=dark)
    except ImageError as error:
        return str(error)
    if min(decoded_image.size) < TINY:
        tiny[image] = decoded_image.size
    if on_decoded:
        on_decoded(image, decoded_image)
    return ""
