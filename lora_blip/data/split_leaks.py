"""Report validation images that are also in the training data. This runs before the first step, for a few seconds.

There are such images if, for example, the images are frames of a video: a random split puts neighbouring frames into training
and validation.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from lora_blip.data.images import open_image
from lora_blip.data.leaks import (
    NEARLY,
    SAME_BYTES,
    SIDE,
    THREADS,
    Leak,
    digest_of,
    leak_warning,
    nearest,
    thumbnail,
    thumbnails,
)
from lora_blip.data.paths import in_walking_order
from lora_blip.errors import ImageError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable

MOST_THUMBNAILS = 300_000  # largest number of thumbnails in memory; each has 432 bytes
PAIRS = 5 * 10**7  # largest number of pairs of images that are compared; this takes about 2 s on one core
BLOCK = 8192  # training images that are compared at a time
DECODED = 2048  # with more images than this, only a sample is decoded
SAMPLE = 256  # validation images in the sample
NEIGHBOURS = 4  # training images before and after each image of the sample, in the order of their names
SECONDS = 5.0  # longest time for decoding
GROUP = 16  # validation images of the sample that are decoded together


class Thumbnails:
    """The thumbnails of images that were decoded when the annotations were checked: {image file: bytes}."""

    def __init__(self) -> None:
        self.by_file: dict[str, bytes] = {}

    def add(self, file: str, picture: Image.Image) -> None:
        """Keep the thumbnail of a picture. Threads may call this at the same time."""
        if len(self.by_file) < MOST_THUMBNAILS:
            self.by_file[file] = packed(picture)


def report_split_leaks(
    validation: Iterable[str], training: Iterable[str], kept: Thumbnails, fix: str, report: Callable[[str], object] = print
) -> None:
    """Report how many validation images have the same bytes, or nearly the same picture, as a training image.

    kept: thumbnails that already exist. Missing ones are computed for at most SECONDS. fix: advice, added to the warning.
    If only some images can be compared, report their number. If all are compared and none matches, report nothing. Global
    random generators are not used.
    """
    new, known = list(dict.fromkeys(validation)), list(dict.fromkeys(training))
    total = len(new), len(known)
    if not all(total):
        return
    selection_note, packed_by_file = "", kept.by_file
    if not all(file in packed_by_file for file in (*new, *known)):
        report(f"comparing validation images with training images, for at most {SECONDS:.0f} s")
        groups: list[tuple[Sequence[str], Sequence[str]]] = [(new, known)]
        packed_by_file = dict(packed_by_file)
        if sum(total) > DECODED:
            groups, selection_note = list(neighbours(new, known)), " (those with the nearest names)"
        done = groups[: decode(groups, packed_by_file)]
        new, known = ([f for f in dict.fromkeys(chain(*side)) if f in packed_by_file] for side in zip(*done, strict=True))
    sample = sample_of(new, PAIRS // max(1, len(known)))
    is_partial = (len(sample), len(known)) != total
    if is_partial:
        totals = counted(total[0], "validation image"), counted(total[1], "training image")
        compared = f"{len(sample):,} of {totals[0]} with {len(known):,} of {totals[1]}"
        report(f"comparing {compared}{selection_note}")
    if leaks := compare(new, sample, known, packed_by_file):
        warning = "at least " * is_partial + leak_warning(leaks, total[0], "validation")
        report(printable(f"WARNING: {warning}. {fix}"))


def sample_of(files: Sequence[str], limit: int) -> Sequence[str]:
    """Return a random sample of at most `limit` files, and of at least one. The global random generator is not used."""
    limit = max(1, limit)
    return files if len(files) <= limit else random.Random(0).sample(files, limit)


def compare(new: Sequence[str], sample: Sequence[str], known: Sequence[str], packed_by_file: dict[str, bytes]) -> list[Leak]:
    """Return the leaks, at most one for each validation image in `new`.

    All of `new` are searched for equal thumbnails, which is quick. Only `sample` is searched for similar thumbnails.
    """
    first = {packed_by_file[file]: file for file in reversed(known)}
    leaks = {file: leak_of(file, first[packed_by_file[file]]) for file in new if packed_by_file[file] in first}
    unmatched = [file for file in sample if file not in leaks]
    for start in range(0, len(known), BLOCK):
        if not unmatched:
            break
        block = known[start : start + BLOCK]
        indices = nearest(thumbnails(floats(unmatched, packed_by_file)), thumbnails(floats(block, packed_by_file)))
        pairs = zip(unmatched, indices, strict=True)
        leaks |= {file: Leak(Path(file), Path(block[at]), NEARLY) for file, at in pairs if at >= 0}
        unmatched = [file for file in unmatched if file not in leaks]
    return [leaks[file] for file in new if file in leaks]


def leak_of(new: str, known: str) -> Leak:
    """Return the leak of two images with equal thumbnails."""
    try:
        same = digest_of(Path(new)) == digest_of(Path(known))
    except ImageError:  # a file was deleted after it was decoded
        same = False
    return Leak(Path(new), Path(known), SAME_BYTES if same else NEARLY)


def packed(picture: Image.Image) -> bytes:
    """Return the thumbnail of an image as bytes. `floats` is the inverse."""
    return thumbnail(picture).astype(np.uint8).tobytes()


def floats(files: Sequence[str], packed_by_file: dict[str, bytes]) -> list[np.ndarray]:
    """Return the thumbnail of each file, (SIDE, SIDE, 3) float32 in grey levels."""
    levels = np.frombuffer(b"".join(packed_by_file[file] for file in files), np.uint8)
    return list(levels.reshape(-1, SIDE, SIDE, 3).astype(np.float32))


def neighbours(new: Sequence[str], known: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Yield groups of validation images from a random sample, each with the training images that have the nearest names.

    In the order of their names, frames of a video follow each other.
    """
    order = sorted(known, key=in_walking_order)
    keys = np.array([in_walking_order(file) for file in order], dtype=object)
    sample = sample_of(new, SAMPLE)
    for start in range(0, len(sample), GROUP):
        group = sample[start : start + GROUP]
        indices = np.searchsorted(keys, np.array([in_walking_order(file) for file in group], dtype=object))
        yield group, [file for at in indices for file in order[max(0, at - NEIGHBOURS) : at + NEIGHBOURS]]


def decode(groups: Sequence[tuple[Sequence[str], Sequence[str]]], packed_by_file: dict[str, bytes]) -> int:
    """Add the thumbnails of groups of images to `packed_by_file`, for at most SECONDS. Return the number of decoded groups."""
    end = time.monotonic() + SECONDS

    def add_thumbnail(file: str) -> None:
        if file not in packed_by_file and time.monotonic() < end:
            try:
                packed_by_file[file] = packed(open_image(file))
            except ImageError:
                return  # the training step that reads this image reports the error

    with ThreadPoolExecutor(THREADS) as pool:
        for number, (new, known) in enumerate(groups, 1):
            list(pool.map(add_thumbnail, dict.fromkeys((*new, *known))))
            if time.monotonic() >= end:
                return number
    return len(groups)
