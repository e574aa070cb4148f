"""95 % percentile bootstrap intervals over images (Efron 1979): how far a score might move with other images of the kind."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
LEVEL = 0.95
BLOCK = 1 << 22  # drawn numbers at a time: bounds the memory at some 100 MB, whatever the number of images

Numbers = NDArray[np.float64]


class Interval(NamedTuple):
    """`value` is the score of the images themselves; `low` and `high` hold 95 % of the scores of resampled images."""

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
    """Interval of a statistic that depends on the images by the sum of their counts alone, such as BLEU.

    counts: (images, k). statistic: (…, k) sums → (…). Drawing images with replacement is drawing how often each is taken,
    from a multinomial. Raises ValueError for no images, counts that are not numbers, or a level outside 0..1.
    """
    rows = np.asarray(counts, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"counts of shape {rows.shape}; (images, k) with at least one image is needed")
    if not np.isfinite(rows).all():
        raise ValueError("a score by image is not a finite number")
    random, images = np.random.default_rng(seed), len(rows)
    sums = []
    for drawn in _blocks(resamples, images):
        taken = random.multinomial(images, np.full(images, 1 / images), size=drawn)  # (drawn, images)
        sums.append(taken @ rows)
    return _between(float(statistic(rows.sum(0))), np.asarray(statistic(np.concatenate(sums))), level)


def of_mean(values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """Interval of the mean of scores by image, (images,)."""
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    first = column[0, 0] if len(column) else 0.0  # taken off, so that equal scores give a width of exactly 0
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
    """Paired: interval of mean(adapted) − mean(base), both (images,), over the same resampled images.

    Zero outside the interval: the gain is more than the luck of these images. ValueError when the lengths differ.
    """
    first, second = np.asarray(adapted, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"scores of {first.shape} images beside {second.shape}: pairs are needed")
    return of_mean(first - second, resamples=resamples, level=level, seed=seed)


def of_statistic(
    statistic: Callable[[NDArray[np.int64]], float],
    images: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """Interval of any statistic of an index array, (images,) places with repeats: a median, a ratio, a recall.

    It is called once a resample. Paired differences: let the statistic itself be the difference, at the same places.
    """
    if images < 1:
        raise ValueError("a bootstrap over no images")
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(images, size=images)) for _ in range(resamples)]
    return _between(float(statistic(np.arange(images))), np.asarray(drawn, dtype=np.float64), level)


def _between(value: float, drawn: Numbers, level: float) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level = {level}; a share between 0 and 1 is needed")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _blocks(resamples: int, images: int) -> Sequence[int]:
    """How many resamples to draw at a time."""
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}; at least one is needed")
    most = max(1, min(resamples, BLOCK // images))
    return [min(most, resamples - done) for done in range(0, resamples, most)]
