"""Which validation of a run was the best, and how many validations brought no improvement since."""

import math
from dataclasses import dataclass


@dataclass
class Best:
    """The best validation so far by one score.

    Of equal scores, the one with the lower loss is the best. Patience is stricter: it counts validations without a score
    that is better by more than `min_improvement`, whatever the loss does.
    """

    by: str  # "loss", or a score of which more is better
    step: int = 0
    stale: int = 0  # validations since the last improvement
    rank: tuple[float, float] = (-math.inf, -math.inf)
    min_improvement: float = 0.0
    improved: int = 0  # the step of the last improvement
    reached: float = -math.inf  # the score of the last improvement

    def better(self, step: int, scores: dict[str, float]) -> bool:
        """Record a validation and return True if it is the best so far. NaN is never better."""
        value = -scores["loss"] if self.by == "loss" else scores[self.by]
        if value > self.reached + self.min_improvement:
            self.improved, self.stale, self.reached = step, 0, value
        else:
            self.stale += 1
        rank = (value, -scores["loss"])
        if rank > self.rank:
            self.step, self.rank = step, rank
            return True
        return False


def shown(key: str, value: float) -> str:
    """A loss in digits, a share in per cent."""
    return f"{value:.4f}" if key == "loss" or not 0 <= value <= 1 else f"{value:.1%}"
