"""95 % bootstrap intervals by percentiles (Efron 1979). They show how much a score would vary with other images."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95
BLOCK = 1 << 22  # random numbers drawn at a time, which bounds the memory to about 100 MB

Numbers = NDArray[np.float64]


class Interval(NamedTuple):
    """A score, and the range [low, high] that contains 95 % of the scores of resampled images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def of_sums(
    counts: ArrayLike,
    statistic: Callable[[Numbers], Numbers],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the interval of a statistic of summed counts, such as BLEU.

    counts: (images, k).
    statistic: maps sums (…, k) to scores (…).

    A resample draws `images` images with replacement. So the numbers of draws of the images have a multinomial distribution.

    Raise ValueError if there is no image, a count is not finite, or `level` is outside 0..1.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"counts of shape {rows.shape}; expected (images, k) with at least one image")
    if not np.isfinite(rows).all():
        raise ValueError("the score of an image is not a finite number")
    random, images = np.random.default_rng(seed), len(rows)
    sums = []
    for size in _blocks(resamples, images):
        times = random.multinomial(images, np.full(images, 1 / images), size=size)  # (size, images)
        sums.append(times @ rows)
    return _interval(float(statistic(rows.sum(0))), np.asarray(statistic(np.concatenate(sums))), level)


def of_mean(values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Return the interval of the mean of scores (images,)."""
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    first = column[0, 0] if len(column) else 0.0  # subtract it before the sum: equal scores then have an interval of width 0
    return of_sums(
        column - first,
        lambda sums: first + sums[..., 0] / len(column),
        resamples=resamples,
        level=level,
        seed=seed,
    )


def of_difference(
    adapted: ArrayLike, base: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return the interval of mean(adapted) − mean(base), both (images,). Each resample uses the same images for both.

    If the interval does not contain 0, the difference is significant at the 5 % level. Raise ValueError if the lengths differ.
    """
    first, second = np.asarray(adapted, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"scores of {first.shape} images and {second.shape}: expected one pair per image")
    return of_mean(first - second, resamples=resamples, level=level, seed=seed)


def of_statistic(
    statistic: Callable[[NDArray[np.int64]], float],
    images: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Return the interval of any statistic, such as a median, a ratio or a recall.

    statistic: called once per resample with the indices of the drawn images (images,), in which an index may repeat. For a
    paired difference, it returns the difference at these indices.
    """
    if images < 1:
        raise ValueError("a bootstrap needs at least one image")
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(images, size=images)) for _ in range(resamples)]
    return _interval(float(statistic(np.arange(images))), np.asarray(drawn, dtype=np.float64), level)


def _interval(value: float, drawn: Numbers, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level = {level}; expected a number between 0 and 1")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _blocks(resamples: int, images: int) -> Sequence[int]:
    """Return the number of resamples of each block. A block has at most BLOCK random numbers, and at least one resample."""
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}; expected at least 1")
    size = max(1, min(resamples, BLOCK // images))
    return [min(size, resamples - done) for done in range(0, resamples, size)]
