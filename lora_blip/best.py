"""Which validation of a run was the best, how long ago, and by what."""

import math
from dataclasses import dataclass


@dataclass
class Best:
    """The best validation so far by one score; of equal scores the one of lower loss."""

    by: str  # "loss", or a score of which more is better
    step: int = 0
    stale: int = 0  # validations since
    rank: tuple[float, float] = (-math.inf, -math.inf)

    def better(self, step: int, scores: dict[str, float]) -> bool:
        """Take note of a validation; a score that is no number is never better."""
        value = -scores["loss"] if self.by == "loss" else scores[self.by]
        rank = (value, -scores["loss"])
        if rank > self.rank:
            self.step, self.stale, self.rank = step, 0, rank
            return True
        self.stale += 1
        return False


def shown(key: str, value: float) -> str:
    """A loss in digits, a share in per cent."""
    return f"{value:.4f}" if key == "loss" or not 0 <= value <= 1 else f"{value:.1%}"
