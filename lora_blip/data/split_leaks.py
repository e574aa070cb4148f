"""Validation images that are in the training data: found before the first step, in a few seconds, and reported.

A random split of video frames puts neighbours on both sides. The validation scores then measure memory.
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
from lora_blip.runtime.untrusted import printable

KEPT = 300_000  # thumbnails of 432 bytes that are kept in memory
PAIRS = 5 * 10**7  # that are compared: about 2 s on one core
BLOCK = 8192  # training images compared at a time
DECODED = 2048  # images that are decoded for the comparison, at most
SAMPLE = 256  # validation images that are compared if not all images may be decoded
NEIGHBOURS = 4  # training images before and after each of them, in the order of their names
SECONDS = 5.0  # that decoding may take
GROUP = 16  # validation images decoded together


class Thumbnails:
    """The thumbnails of images that were decoded for another reason, as bytes, by file."""

    def __init__(self) -> None:
        self.of: dict[str, bytes] = {}

    def add(self, file: str, picture: Image.Image) -> None:
        """Keep the thumbnail of a picture. Threads may call this at the same time."""
        if len(self.of) < KEPT:
            self.of[file] = packed(picture)


def report_split_leaks(
    validation: Iterable[str], training: Iterable[str], kept: Thumbnails, fix: str, report: Callable[[str], object] = print
) -> None:
    """Report validation images with the same bytes as a training image, or nearly the same picture, and the fix.

    Thumbnails that are missing in `kept` are made now, in bounded time. If not all images can be compared, the number
    of those that were is reported. Nothing else is reported of a clean split. No global random generator is used.
    """
    new, known = list(dict.fromkeys(validation)), list(dict.fromkeys(training))
    total = len(new), len(known)
    if not all(total):
        return
    which, of = "", kept.of
    if not all(file in of for file in (*new, *known)):
        report(f"comparing validation images with training images, for at most {SECONDS:.0f} s")
        groups: list[tuple[Sequence[str], Sequence[str]]] = [(new, known)]
        of = dict(of)
        if sum(total) > DECODED:
            groups, which = list(neighbours(new, known)), " (those with the nearest names)"
        done = groups[: decode(groups, of)]
        new, known = ([f for f in dict.fromkeys(chain(*side)) if f in of] for side in zip(*done, strict=True))
    sample = sample_of(new, PAIRS // max(1, len(known)))
    partial = (len(sample), len(known)) != total
    if partial:
        compared = f"{len(sample):,} of {total[0]:,} validation images with {len(known):,} of {total[1]:,} training images"
        report(f"comparing {compared}{which}")
    if leaks := compare(new, sample, known, of):
        count = "at least " * partial + leak_warning(leaks, total[0], "validation")
        report(printable(f"WARNING: {count}. {fix}"))


def sample_of(files: Sequence[str], most: int) -> Sequence[str]:
    """Return at most `most` of the files, and at least one, drawn from a separate random generator."""
    most = max(1, most)
    return files if len(files) <= most else random.Random(0).sample(files, most)


def compare(new: Sequence[str], sample: Sequence[str], known: Sequence[str], of: dict[str, bytes]) -> list[Leak]:
    """Return the leaks, at most one per validation image, from the thumbnails in `of`.

    All of `new` are compared for equal thumbnails, which copies have. `sample` is compared for similar ones too.
    """
    first = {of[file]: file for file in reversed(known)}
    leaks = {file: leak_of(file, first[of[file]]) for file in new if of[file] in first}
    left = [file for file in sample if file not in leaks]
    for start in range(0, len(known), BLOCK):
        if not left:
            break
        block = known[start : start + BLOCK]
        indices = nearest(thumbnails(floats(left, of)), thumbnails(floats(block, of)))
        leaks |= {file: Leak(Path(file), Path(block[at]), NEARLY) for file, at in zip(left, indices, strict=True) if at >= 0}
        left = [file for file in left if file not in leaks]
    return [leaks[file] for file in new if file in leaks]


def leak_of(new: str, known: str) -> Leak:
    """Return the leak of two images with equal thumbnails."""
    try:
        same = digest_of(Path(new)) == digest_of(Path(known))
    except ImageError:  # one was deleted after it was decoded
        same = False
    return Leak(Path(new), Path(known), SAME_BYTES if same else NEARLY)


def packed(picture: Image.Image) -> bytes:
    """Return the thumbnail of a picture as bytes; `floats` is the inverse."""
    return thumbnail(picture).astype(np.uint8).tobytes()


def floats(files: Sequence[str], of: dict[str, bytes]) -> list[np.ndarray]:
    """Return thumbnails as (SIDE, SIDE, 3) float32 in grey levels."""
    levels = np.frombuffer(b"".join(of[file] for file in files), np.uint8)
    return list(levels.reshape(-1, SIDE, SIDE, 3).astype(np.float32))


def neighbours(new: Sequence[str], known: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Yield groups of a sample of validation images with the training images whose names are next to theirs.

    Frames of a video follow each other in the order of their names.
    """
    order = sorted(known, key=in_walking_order)
    keys = np.array([in_walking_order(file) for file in order], dtype=object)
    sample = sample_of(new, SAMPLE)
    for start in range(0, len(sample), GROUP):
        some = sample[start : start + GROUP]
        indices = np.searchsorted(keys, np.array([in_walking_order(file) for file in some], dtype=object))
        yield some, [file for at in indices for file in order[max(0, at - NEIGHBOURS) : at + NEIGHBOURS]]


def decode(groups: Sequence[tuple[Sequence[str], Sequence[str]]], of: dict[str, bytes]) -> int:
    """Add the thumbnails of groups of images to `of` until the time is over. Return the number of groups that are done."""
    end = time.monotonic() + SECONDS

    def add_thumbnail(file: str) -> None:
        if file not in of and time.monotonic() < end:
            try:
                of[file] = packed(open_image(file))
            except ImageError:
                return  # the training step that needs it reports it

    with ThreadPoolExecutor(THREADS) as pool:
        for number, (new, known) in enumerate(groups, 1):
            list(pool.map(add_thumbnail, dict.fromkeys((*new, *known))))
            if time.monotonic() >= end:
                return number
    return len(groups)
