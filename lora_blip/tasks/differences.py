"""Measure how much the results of the fast path and of the plain path differ."""

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
    """The difference between the fast path and the plain one, in one quantity."""

    what: str
    value: float
    bound: float

    @property
    def too_large(self) -> bool:
        return not self.value <= self.bound  # NaN is too large

    def __str__(self) -> str:
        return f"{self.what} {self.value:.0e}"


def failure(error: Exception) -> Difference:
    """Return the difference for an error of one computation: it is always too large."""
    return Difference(f"{type(error).__name__}: {first_line(error)}:", math.nan, 0.0)


def difference_per_call(fast: list[Tensor], slow: list[Tensor], generated: bool) -> float:
    """Return the largest relative difference of the outputs of two runs, call by call.

    generated: True if the outputs are logits of generated texts. A row is not compared any more after its most probable tokens
    differ, because the two runs then continue with different texts.
    """
    worst = 0.0
    compared = torch.empty(0, dtype=torch.bool)
    for one, other in zip(fast, slow, strict=False):
        if one.shape != other.shape:
            return worst if generated and not compared.all() else math.inf
        if len(compared) != len(one) or one.shape[1:-1] != (1,):  # the first call for another group of rows
            compared = torch.ones(len(one), dtype=torch.bool, device=one.device)
        worst = max(worst, relative(one[compared], other[compared]))
        if not worst < math.inf:
            return math.inf
        if generated:
            tokens = [logits.reshape(len(logits), -1, logits.shape[-1])[:, -1].argmax(-1) for logits in (one, other)]
            compared = compared & (tokens[0] == tokens[1])
            if not compared.any():
                return worst
    return worst if len(fast) == len(slow) or (generated and not compared.all()) else math.inf


def relative(one: Tensor, other: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖, or 0 for an empty tensor.

    Logits are compared without their mean over the last axis, which does not affect the probabilities.
    """
    if not other.numel():
        return 0.0
    if other.ndim > 1 and other.shape[-1] > 2:
        one, other = (each - each.mean(-1, keepdim=True) for each in (one, other))
    return distance(one, other)


def distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm().clamp_min(1e-6))


def gradient_difference(fast: list[Tensor], slow: list[Tensor]) -> float:
    """Return the largest ‖Δ‖ / ‖g‖ over the tensors. Every ‖g‖ counts as at least a twentieth of the largest ‖g‖."""
    norms = [float(gradient.norm()) for gradient in slow]
    floor = max(max(norms, default=0.0) / 20, 1e-12)
    return max((float((a - b).norm()) / max(norm, floor) for a, b, norm in zip(fast, slow, norms, strict=True)), default=0.0)


def texts(results: Sequence[Any]) -> list[str]:
    """Return the texts of predictions."""
    return [result if isinstance(result, str) else result.text for result in results]


def is_texts(results: Any) -> bool:
    """Return True if all predictions are generated texts, not rankings or features."""
    return all(isinstance(one, str) or (hasattr(one, "text") and not getattr(one, "ranking", True)) for one in results)


def numbers(result: Any) -> list[np.ndarray]:
    """Return the numbers of a prediction: probabilities, features or log-odds.

    Probabilities are in the order of their texts, so that two rankings can be compared.
    """
    if isinstance(result, Tensor):
        return [result.double().cpu().numpy().ravel()]
    if isinstance(result, np.ndarray | float | int):
        return [np.asarray(result, dtype=np.float64).ravel()]
    if ranking := getattr(result, "ranking", None):
        return [np.array([probability for _, probability in sorted(ranking)])]
    if isinstance(result, list | tuple):
        return [array for part in result for array in numbers(part)]
    return []
