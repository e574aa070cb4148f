"""Evaluation images that training has seen: the same bytes, or nearly the same picture. Scores on them say nothing."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_blip.data.images import open_image
from lora_blip.errors import ImageError
from lora_blip.runtime.untrusted import printable

SAME_BYTES, NEARLY = "same bytes", "nearly the same picture"
SIDE = 12  # pixels of a thumbnail's side
FAR = 0.015  # 1 − correlation up to which thumbnails show the same picture
GRAIN = 0.6  # grey levels by which compression moves a thumbnail; it decides on pictures that are nearly flat
CONTRAST = 0.75  # the smaller standard deviation over the larger, at least
LIGHT = 26.0  # grey levels between the mean colours, at most
BLOCK = 1024  # evaluation images compared at a time
LISTED = 3  # leaks that a warning names
THREADS = 8  # Pillow decodes outside of Python's lock

Floats = NDArray[np.float32]


class Leak(NamedTuple):
    evaluation: Path
    training: Path  # the first with the same bytes, or the most alike
    kind: str  # SAME_BYTES or NEARLY

    def __str__(self) -> str:
        return f"{self.evaluation}: {self.kind} as {self.training}"


class Sight(NamedTuple):
    """What is remembered of an image file: its digest, and its thumbnail (SIDE, SIDE, 3), NaN where it cannot be decoded."""

    digest: bytes
    thumbnail: Floats


class ComparedThumbnails(NamedTuple):
    """n thumbnails ready to be compared: their patterns have mean 0 in every channel and length 1 (0 where flat)."""

    pattern: Floats  # (n, 3 · SIDE²)
    contrast: Floats  # (n,) standard deviation in grey levels
    light: Floats  # (n, 3) mean colour


def find_leaks(evaluation: Iterable[str | Path], training: Iterable[str | Path]) -> list[Leak]:
    """The evaluation images that are among the training images, at most one Leak each, in the order of `evaluation`.

    Two pictures are nearly the same if their thumbnails correlate to 1 − FAR and are alike in contrast and light: through
    JPEG of quality 70, half the size and 10 % of brightness, not through mirroring, cropping or turning. Neighbouring
    frames of a film count; so do pictures that differ by nothing larger than about a twelfth of their side.
    An image that cannot be decoded is compared by its bytes alone. Raises ImageError for a file that cannot be read.
    """
    asked, known = _unique(evaluation), _unique(training)
    if not asked or not known:
        return []
    seen, shown = list(_sights(asked)), list(_sights(known))
    first = {sight.digest: path for path, sight in reversed(list(zip(known, shown, strict=True)))}
    twins = nearest(thumbnails([sight.thumbnail for sight in seen]), thumbnails([sight.thumbnail for sight in shown]))
    leaks = []
    for path, sight, twin in zip(asked, seen, twins, strict=True):
        if sight.digest in first:
            leaks.append(Leak(path, first[sight.digest], SAME_BYTES))
        elif twin >= 0:
            leaks.append(Leak(path, known[twin], NEARLY))
    return leaks


def leak_warning(leaks: Sequence[Leak], images: int, what: str) -> str:
    """Return one line: how many of the `what` images ("validation") are in the training data, how, and the first."""
    some = "; ".join(str(leak) for leak in leaks[:LISTED]) + "; …" * (len(leaks) > LISTED)
    kinds = ", ".join(f"{sum(leak.kind == kind for leak in leaks):,} {kind}" for kind in dict.fromkeys(x.kind for x in leaks))
    found = f"{len(leaks):,} of {images:,} {what} images are in the training data ({kinds})"
    return f"{found}, so the scores are too high: {some}"


def nearest(asked: ComparedThumbnails, known: ComparedThumbnails) -> NDArray[np.int64]:
    """(asked,) place of the most alike known thumbnail that is nearly the same, −1 where there is none.

    Of two patterns p, q of contrast s, t the distance is 1 − p·q ≤ FAR + GRAIN² / (s t). Memory: BLOCK × known.
    """
    found = []
    for start in range(0, len(asked.pattern), BLOCK):
        block = ComparedThumbnails(*(part[start : start + BLOCK] for part in asked))
        likeness = block.pattern @ known.pattern.T  # (block, known)
        grain = np.outer(GRAIN / np.maximum(block.contrast, 1e-6), GRAIN / np.maximum(known.contrast, 1e-6))
        likeness += np.minimum(grain, 1)  # flat pictures have no pattern: likeness 0, grain 1
        likeness[likeness < 1 - FAR] = -1
        rows, columns = np.nonzero(likeness >= 0)
        keep = _alike(block, rows, known, columns)
        likeness[rows[~keep], columns[~keep]] = -1
        best = likeness.argmax(1)
        found.append(np.where(likeness[np.arange(len(best)), best] >= 0, best, -1))
    return np.concatenate(found)


def _alike(
    one: ComparedThumbnails, rows: NDArray[np.int64], other: ComparedThumbnails, columns: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Of pairs whose patterns agree: whether contrast and light do too, so that a shadow of a picture is another picture."""
    first, second = one.contrast[rows] + GRAIN, other.contrast[columns] + GRAIN
    same_contrast = np.minimum(first, second) >= CONTRAST * np.maximum(first, second)
    return same_contrast & (np.abs(one.light[rows] - other.light[columns]) <= LIGHT).all(1)


def thumbnails(pictures: Sequence[Floats]) -> ComparedThumbnails:
    """Pictures (SIDE, SIDE, 3) → their patterns, contrasts and colours. What is NaN matches nothing."""
    stack = np.stack(pictures)
    light = stack.mean((1, 2))
    pattern = (stack - light[:, None, None]).reshape(len(stack), -1)
    contrast = pattern.std(1)
    pattern /= np.maximum(np.linalg.norm(pattern, axis=1, keepdims=True), 1e-6)
    return ComparedThumbnails(np.nan_to_num(pattern), np.nan_to_num(contrast, nan=1e9), np.nan_to_num(light, nan=-1e9))


def thumbnail(image: Image.Image) -> Floats:
    """(SIDE, SIDE, 3) mean colours of the cells of a picture, in grey levels."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)


def digest_of(path: Path) -> bytes:
    """Return the SHA-256 of a file. Raises ImageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ImageError(printable(f"{path} cannot be read ({error.strerror or error})")) from None


def look(path: Path) -> Sight:
    """Raises ImageError when the file cannot be read at all."""
    digest = digest_of(path)
    try:
        return Sight(digest, thumbnail(open_image(path)))
    except ImageError:
        return Sight(digest, np.full((SIDE, SIDE, 3), np.nan, dtype=np.float32))


def _sights(paths: list[Path]) -> Iterator[Sight]:
    """Looked at by THREADS at once, a few hundred waiting at most."""
    iterator = iter(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(iterator, 32 * THREADS)):
            yield from pool.map(look, batch)


def _unique(paths: Iterable[str | Path]) -> list[Path]:
    return list(dict.fromkeys(Path(path) for path in paths))
