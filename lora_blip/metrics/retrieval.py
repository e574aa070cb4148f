"""Recall of retrieval, image to text and text to image, from a matrix of scores."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10)
BLOCK = 1 << 24  # scores compared at a time

Ranks = NDArray[np.int64]


def recalls(scores: ArrayLike, image_of_text: ArrayLike) -> dict[str, float]:
    """Return recalls and ranks of scores (images, texts), both ways. A higher score is a better match.

    image_of_text: (texts,) the row of each text's image, or (images, texts) booleans if a text matches several images, such
    as equal captions. If several are right, the best-ranked counts (Karpathy and Fei-Fei 2015). Ties count against the model:
    rank = 1 + the number of wrong ones that score at least as high. So a constant score has no recall.

    Keys: image_to_text_r1, _r5, _r10 (fractions of ranks up to 1, 5, 10), _mean_rank, _median_rank; the same for
    text_to_image_. Images without a text are only distractors.

    Raise ValueError for shapes that do not match, a score that is NaN, or a text without an image.
    """
    by_image, by_text = ranks(scores, image_of_text)
    return summary("image_to_text", by_image) | summary("text_to_image", by_text)


def ranks(scores: ArrayLike, image_of_text: ArrayLike) -> tuple[Ranks, Ranks]:
    """Return the ranks of the images that have a text, in order, and of the texts (texts,). The best rank is 1."""
    table = np.asarray(scores)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores of shape {table.shape}; expected (images, texts)")
    right = relation(image_of_text, (len(table), table.shape[1]))
    asked = right.any(1)
    return row_ranks(table[asked], right[asked]), row_ranks(table.T, right.T)


def relation(image_of_text: ArrayLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (images, texts) booleans: which belong together. Raise ValueError as in `recalls`."""
    given = np.asarray(image_of_text)
    images, texts = shape
    if given.dtype == np.bool_:
        right = given
    elif given.shape == (texts,) and given.min() >= 0 and given.max() < images and np.issubdtype(given.dtype, np.integer):
        right = given == np.arange(images)[:, None]
    else:
        raise ValueError(f"image_of_text must contain {texts} rows of 0..{images - 1}, or {shape} booleans")
    if right.shape != shape:
        raise ValueError(f"a relation of shape {right.shape} for scores of shape {shape}")
    if not right.any(0).all():
        raise ValueError(f"text {int(np.flatnonzero(~right.any(0))[0])} belongs to no image")
    return right


def row_ranks(scores: NDArray[Any], right: NDArray[np.bool_]) -> Ranks:
    """Return the rank of each row's best right column (rows,): 1 + the number of wrong columns that score at least as high."""
    found = []
    step = max(1, BLOCK // scores.shape[1])
    for start in range(0, len(scores), step):
        rows, mine = scores[start : start + step], right[start : start + step]
        if np.isnan(rows).any():
            raise ValueError("a score is NaN")
        best = np.where(mine, rows, -np.inf).max(1, keepdims=True)
        found.append(1 + ((rows >= best) & ~mine).sum(1))
    return np.concatenate(found)


def summary(way: str, found: Ranks) -> dict[str, float]:
    """Return the fractions of ranks up to 1, 5 and 10, their mean and their median."""
    shares = {f"{way}_r{most}": float((found <= most).mean()) for most in RECALLS}
    return shares | {f"{way}_mean_rank": float(found.mean()), f"{way}_median_rank": float(np.median(found))}
