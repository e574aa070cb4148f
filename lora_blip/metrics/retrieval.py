"""Compute the recall of retrieval, from image to text and from text to image, from a matrix of scores."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10)
BLOCK = 1 << 24  # scores compared at a time

Ranks = NDArray[np.int64]


def recalls(scores: ArrayLike, image_of_text: ArrayLike) -> dict[str, float]:
    """Return recalls and ranks from image to text and from text to image, for scores (images, texts).

    A higher score means a better match.

    image_of_text: (texts,) the index of each text's image. If a text belongs to several images, as equal captions do, give
    (images, texts) booleans.

    The rank of a query is that of its best match, as in Karpathy and Fei-Fei 2015: 1 + the number of wrong candidates whose
    score is at least as high. So a tie counts as an error, and constant scores have a recall of 0.

    The keys of the result are image_to_text_r1, _r5, _r10 (the fraction of ranks that are at most 1, 5 and 10), _mean_rank and
    _median_rank, and the same for text_to_image. An image without a text is a candidate, but not a query.

    Raise ValueError if the shapes do not match, a score is NaN, or a text belongs to no image.
    """
    by_image, by_text = ranks(scores, image_of_text)
    return summary("image_to_text", by_image) | summary("text_to_image", by_text)


def ranks(scores: ArrayLike, image_of_text: ArrayLike) -> tuple[Ranks, Ranks]:
    """Return the ranks of the images that have a text, (images with a text,), and of the texts, (texts,). The best is 1."""
    table = np.asarray(scores)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"scores of shape {table.shape}; expected (images, texts)")
    right = relation(image_of_text, (len(table), table.shape[1]))
    has_text = right.any(1)
    return row_ranks(table[has_text], right[has_text]), row_ranks(table.T, right.T)


def relation(image_of_text: ArrayLike, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return (images, texts) booleans: True if image and text belong together. Raise ValueError as in `recalls`."""
    array = np.asarray(image_of_text)
    images, texts = shape
    if array.dtype == np.bool_:
        right = array
    elif array.shape == (texts,) and array.min() >= 0 and array.max() < images and np.issubdtype(array.dtype, np.integer):
        right = array == np.arange(images)[:, None]
    else:
        raise ValueError(f"image_of_text must contain {texts} indices of 0..{images - 1}, or booleans of shape {shape}")
    if right.shape != shape:
        raise ValueError(f"image_of_text has the shape {right.shape}, but the scores have the shape {shape}")
    if not right.any(0).all():
        raise ValueError(f"text {int(np.flatnonzero(~right.any(0))[0])} belongs to no image")
    return right


def row_ranks(scores: NDArray[Any], right: NDArray[np.bool_]) -> Ranks:
    """Return the rank of each row's best right column, (rows,): 1 + the number of wrong columns with at least this score."""
    blocks = []
    step = max(1, BLOCK // scores.shape[1])
    for start in range(0, len(scores), step):
        rows, is_right = scores[start : start + step], right[start : start + step]
        if np.isnan(rows).any():
            raise ValueError("a score is NaN")
        best = np.where(is_right, rows, -np.inf).max(1, keepdims=True)
        blocks.append(1 + ((rows >= best) & ~is_right).sum(1))
    return np.concatenate(blocks)


def summary(direction: str, ranks: Ranks) -> dict[str, float]:
    """Return the fractions of ranks that are at most 1, 5 and 10, and the mean and median rank. Keys start with `direction`."""
    shares = {f"{direction}_r{k}": float((ranks <= k).mean()) for k in RECALLS}
    return shares | {f"{direction}_mean_rank": float(ranks.mean()), f"{direction}_median_rank": float(np.median(ranks))}
