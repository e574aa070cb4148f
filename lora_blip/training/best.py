"""Record the best validation of a run, and count the validations since the last improvement."""

import math
from dataclasses import dataclass


@dataclass
class Best:
    """The best validation so far by one score.

    If two scores are equal, the one with the lower loss is better. Patience counts the validations since the last
    improvement. A score is an improvement if it is more than `min_improvement` above the score of the last improvement.
    """

    by: str  # "loss", or the name of a score (higher is better)
    step: int = 0  # step of the best validation
    stale: int = 0  # number of validations since the last improvement
    rank: tuple[float, float] = (-math.inf, -math.inf)  # (score, −loss) of the best; with by = "loss", the score is −loss
    min_improvement: float = 0.0
    improved: int = 0  # step of the last improvement
    reached: float = -math.inf  # score of the last improvement

    def record(self, step: int, scores: dict[str, float]) -> bool:
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
