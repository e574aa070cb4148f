"""Recall of retrieval, image to text and text to image, from a matrix of scores."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10)
BLOCK = 1 << 24  # scores looked at at a time

Ranks = NDArray[np.int64]


def recalls(scores: ArrayLike, image_of_text: ArrayLike) -> dict[str, float]:
    """Recalls and ranks of scores (images, texts), higher = better fitting, both ways.

    image_of_text: (texts,) the row of each text's image; or (images, texts) booleans, where a text fits several images, as
    equal captions do. With several right ones the best-ranked counts (Karpathy and Fei-Fei 2015). Ties count against the
    model: rank = 1 + how many wrong ones score at least as high, so that a constant score finds nothing.
    Keys: image_to_text_r1, _r5, _r10 (shares of ranks within 1, 5, 10), _mean_rank, _median_rank; the same text_to_image_.
    Images without a text are only there to be confused with. Raises ValueError for shapes that do not fit, scores that are
    NaN, and a text without an image.
    """
    by_image, by_text = ranks(scores, image_of_text)
    return summary("image_to_text", by_image) | summary("text_to_image", by_text)


def ranks(scores: ArrayLike, image_of_text: ArrayLike) -> tuple[Ranks, Ranks]:
    """The ranks behind `recalls`, best = 1: of the images that have a text, in order, and of the texts, (texts,)."""
    table = np.asarray(scores)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores of shape {table.shape}; (images, texts) is needed")
    right = relation(image_of_text, (len(table), table.shape[1]))
    asked = right.any(1)
    return row_ranks(table[asked], right[asked]), row_ranks(table.T, right.T)


def relation(image_of_text: ArrayLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(images, texts) booleans: which belong together. ValueError as in `recalls`."""
    given = np.asarray(image_of_text)
    images, texts = shape
    if given.dtype == np.bool_:
        right = given
    elif given.shape == (texts,) and given.min() >= 0 and given.max() < images and np.issubdtype(given.dtype, np.integer):
        right = given == np.arange(images)[:, None]
    else:
        raise ValueError(f"image_of_text must hold {texts} rows of 0..{images - 1}, or {shape} booleans")
    if right.shape != shape:
        raise ValueError(f"a relation of shape {right.shape} for scores of shape {shape}")
    if not right.any(0).all():
        raise ValueError(f"text {int(np.flatnonzero(~right.any(0))[0])} belongs to no image")
    return right


def row_ranks(scores: NDArray[Any], right: NDArray[np.bool_]) -> Ranks:
    """(rows,) rank of each row's best right column: 1 + the wrong columns that score at least as high."""
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
    """Shares of ranks within 1, 5 and 10, their mean and their median."""
    shares = {f"{way}_r{most}": float((found <= most).mean()) for most in RECALLS}
    return shares | {f"{way}_mean_rank": float(found.mean()), f"{way}_median_rank": float(np.median(found))}
