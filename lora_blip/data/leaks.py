"""Find evaluation images that are also in the training data: the same bytes, or nearly the same picture.

The score of such an image shows what the model remembers, not what it has learned.
"""

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
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import sha256_of
from lora_blip.runtime.untrusted import printable

SAME_BYTES, NEARLY = "same bytes", "nearly the same picture"
SIDE = 12  # height and width of a thumbnail in pixels
FAR = 0.015  # largest distance (1 − correlation) of two thumbnails of nearly the same picture
GRAIN = 0.6  # grey levels by which compression changes a thumbnail; this matters for nearly flat pictures
CONTRAST = 0.75  # smallest ratio of the standard deviations of nearly the same pictures
LIGHT = 26.0  # largest difference of their mean colours, in grey levels
BLOCK = 1024  # evaluation images that are compared at a time
LISTED = 3  # largest number of leaks that a warning lists
THREADS = 8  # threads that decode images; Pillow releases the GIL

Floats = NDArray[np.float32]


class Leak(NamedTuple):
    """An evaluation image that is in the training data."""

    evaluation: Path
    training: Path  # the first image with the same bytes, otherwise the most similar one
    kind: str  # SAME_BYTES or NEARLY

    def __str__(self) -> str:
        return f"{self.evaluation}: {self.kind} as {self.training}"


class Fingerprint(NamedTuple):
    """The digest of an image file and its thumbnail (SIDE, SIDE, 3). The thumbnail is NaN if the image cannot be decoded."""

    digest: bytes
    thumbnail: Floats


class ComparedThumbnails(NamedTuple):
    """n thumbnails, ready to be compared. A pattern has mean 0 in each channel and norm 1, or norm 0 if the picture is flat."""

    pattern: Floats  # (n, 3 · SIDE²)
    contrast: Floats  # (n,) standard deviation in grey levels
    light: Floats  # (n, 3) mean colour


def find_leaks(evaluation: Iterable[str | Path], training: Iterable[str | Path]) -> list[Leak]:
    """Return at most one Leak for each evaluation image, in the order of `evaluation`.

    Two pictures are nearly the same if the correlation of their thumbnails is at least 1 − FAR and their contrast and mean
    colours are similar. This detects copies with JPEG quality 70, half the size or 10 % more brightness. It also reports
    neighbouring frames of a video, and pictures that differ only in details smaller than a twelfth of the side. It does not
    detect mirrored, cropped or rotated copies. An image that cannot be decoded is compared only by its bytes.

    Raise ImageError for a file that cannot be read.
    """
    new, known = _unique(evaluation), _unique(training)  # known: in the training data
    if not new or not known:
        return []
    new_prints, known_prints = list(_fingerprints(new)), list(_fingerprints(known))
    first = {one.digest: path for path, one in reversed(list(zip(known, known_prints, strict=True)))}
    nearest_indices = nearest(
        thumbnails([one.thumbnail for one in new_prints]), thumbnails([one.thumbnail for one in known_prints])
    )
    leaks = []
    for path, one, nearest_index in zip(new, new_prints, nearest_indices, strict=True):
        if one.digest in first:
            leaks.append(Leak(path, first[one.digest], SAME_BYTES))
        elif nearest_index >= 0:
            leaks.append(Leak(path, known[nearest_index], NEARLY))
    return leaks


def leak_warning(leaks: Sequence[Leak], images: int, what: str) -> str:
    """Return a one-line warning: the number of leaks of each kind, and the first of them.

    images: the number of all evaluation images. what: the name of their split, such as "validation".
    """
    first_leaks = "; ".join(str(leak) for leak in leaks[:LISTED]) + "; …" * (len(leaks) > LISTED)
    kinds = ", ".join(f"{sum(leak.kind == kind for leak in leaks):,} {kind}" for kind in dict.fromkeys(x.kind for x in leaks))
    verb = "is" if len(leaks) == 1 else "are"
    summary = f"{len(leaks):,} of {counted(images, f'{what} image')} {verb} in the training data ({kinds})"
    return f"{summary}, so the scores are too high: {first_leaks}"


def nearest(new: ComparedThumbnails, known: ComparedThumbnails) -> NDArray[np.int64]:
    """Return, for each new thumbnail, the index of the most similar known one, or −1 if none is nearly the same picture.

    Two patterns p and q with contrasts s and t match if 1 − p·q ≤ FAR + GRAIN² / (s t). The memory is that of a matrix
    of shape (BLOCK, number of known thumbnails).
    """
    best_indices = []
    for start in range(0, len(new.pattern), BLOCK):
        block = ComparedThumbnails(*(part[start : start + BLOCK] for part in new))
        similarity = block.pattern @ known.pattern.T  # (block, known)
        grain = np.outer(GRAIN / np.maximum(block.contrast, 1e-6), GRAIN / np.maximum(known.contrast, 1e-6))
        similarity += np.minimum(grain, 1)  # the pattern of a flat picture is 0; this term is then 1
        similarity[similarity < 1 - FAR] = -1
        rows, columns = np.nonzero(similarity >= 0)
        keep = _alike(block, rows, known, columns)
        similarity[rows[~keep], columns[~keep]] = -1
        best = similarity.argmax(1)
        best_indices.append(np.where(similarity[np.arange(len(best)), best] >= 0, best, -1))
    return np.concatenate(best_indices)


def _alike(
    one: ComparedThumbnails, rows: NDArray[np.int64], other: ComparedThumbnails, columns: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return True for each pair of similar patterns whose contrasts and mean colours are similar too."""
    first, second = one.contrast[rows] + GRAIN, other.contrast[columns] + GRAIN
    same_contrast = np.minimum(first, second) >= CONTRAST * np.maximum(first, second)
    return same_contrast & (np.abs(one.light[rows] - other.light[columns]) <= LIGHT).all(1)


def thumbnails(pictures: Sequence[Floats]) -> ComparedThumbnails:
    """Return the patterns, contrasts and mean colours of thumbnails (SIDE, SIDE, 3). A thumbnail of NaN matches none."""
    stack = np.stack(pictures)
    light = stack.mean((1, 2))
    pattern = (stack - light[:, None, None]).reshape(len(stack), -1)
    contrast = pattern.std(1)
    pattern /= np.maximum(np.linalg.norm(pattern, axis=1, keepdims=True), 1e-6)
    return ComparedThumbnails(np.nan_to_num(pattern), np.nan_to_num(contrast, nan=1e9), np.nan_to_num(light, nan=-1e9))


def thumbnail(image: Image.Image) -> Floats:
    """Return an image as SIDE × SIDE cells, each with its mean colour: (SIDE, SIDE, 3) in grey levels."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)


def digest_of(path: Path) -> bytes:
    """Return the SHA-256 of a file. Raise ImageError if it cannot be read."""
    try:
        return bytes.fromhex(sha256_of(path))
    except OSError as error:
        raise ImageError(printable(f"{path} cannot be read ({error.strerror or error})")) from None


def fingerprint(path: Path) -> Fingerprint:
    """Return the digest and thumbnail of a file. Raise ImageError if it cannot be read."""
    digest = digest_of(path)
    try:
        return Fingerprint(digest, thumbnail(open_image(path)))
    except ImageError:
        return Fingerprint(digest, np.full((SIDE, SIDE, 3), np.nan, dtype=np.float32))


def _fingerprints(paths: list[Path]) -> Iterator[Fingerprint]:
    """Yield the fingerprints of the files. Compute them in threads, at most 32 · THREADS in advance."""
    iterator = iter(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        while batch := list(islice(iterator, 32 * THREADS)):
            yield from pool.map(fingerprint, batch)


def _unique(paths: Iterable[str | Path]) -> list[Path]:
    """Return each path once, in the order of first occurrence."""
    return list(dict.fromkeys(Path(path) for path in paths))
