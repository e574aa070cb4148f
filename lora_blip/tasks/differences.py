"""How far two computations of one result are apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_blip.models.library import first_line


@dataclass(frozen=True)
class Difference:
    """How far the fast path is from the plain one, in one quantity."""

    what: str
    value: float
    bound: float

    @property
    def too_large(self) -> bool:
        return not self.value <= self.bound  # NaN is too large

    def __str__(self) -> str:
        return f"{self.what} {self.value:.0e}"


def failure(error: Exception) -> Difference:
    return Difference(f"{type(error).__name__}: {first_line(error)}:", math.nan, 0.0)


def stepwise(fast: list[Tensor], slow: list[Tensor], written: bool) -> float:
    """The largest relative difference of the outputs of two runs, call by call.

    Where texts are `written`, a row is left out once the likeliest tokens differ: what follows reads another text.
    """
    worst = 0.0
    alive = torch.empty(0, dtype=torch.bool)
    for one, other in zip(fast, slow, strict=False):
        if one.shape != other.shape:
            return worst if written and not alive.all() else math.inf
        if len(alive) != len(one) or one.shape[1:-1] != (1,):  # another group of rows begins
            alive = torch.ones(len(one), dtype=torch.bool, device=one.device)
        worst = max(worst, relative(one[alive], other[alive]))
        if not worst < math.inf:
            return math.inf
        if written:
            last = [each.reshape(len(each), -1, each.shape[-1])[:, -1].argmax(-1) for each in (one, other)]
            alive = alive & (last[0] == last[1])
            if not alive.any():
                return worst
    return worst if len(fast) == len(slow) or (written and not alive.all()) else math.inf


def relative(one: Tensor, other: Tensor) -> float:
    """‖a − b‖ / ‖b‖ of logits, whose mean over the last axis does not matter. 0 for none."""
    if not other.numel():
        return 0.0
    if other.ndim > 1 and other.shape[-1] > 2:
        one, other = (each - each.mean(-1, keepdim=True) for each in (one, other))
    return distance(one, other)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-6))


def gradient_difference(fast: list[Tensor], slow: list[Tensor]) -> float:
    """The largest ‖Δ‖ / ‖g‖ of a tensor; one that is small beside the largest counts beside a twentieth of that."""
    norms = [float(each.norm()) for each in slow]
    floor = max(max(norms, default=0.0) / 20, 1e-12)
    return max((float((a - b).norm()) / max(norm, floor) for a, b, norm in zip(fast, slow, norms, strict=True)), default=0.0)


def texts(results: Sequence[Any]) -> list[str]:
    return [each if isinstance(each, str) else each.text for each in results]


def is_texts(results: Any) -> bool:
    """Return True if a prediction is written, not ranked or measured."""
    return all(isinstance(each, str) or (hasattr(each, "text") and not getattr(each, "ranking", True)) for each in results)


def numbers(result: Any) -> list[np.ndarray]:
    """The numbers of a prediction in an order that does not depend on them: probabilities by text, features, odds."""
    if isinstance(result, Tensor):
        return [result.double().cpu().numpy().ravel()]
    if isinstance(result, np.ndarray | float | int):
        return [np.asarray(result, dtype=np.float64).ravel()]
    if ranking := getattr(result, "ranking", None):
        return [np.array([probability for _, probability in sorted(ranking)])]
    if isinstance(result, list | tuple):
        return [each for part in result for each in numbers(part)]
    return []
