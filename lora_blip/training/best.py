"""Record the best validation of a run, and count the validations since the last improvement."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_blip.data.example import Example
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import printable

# With n images, a share p has the standard error √(p (1 − p) / n). For p = 1/2 and n = 20 it is 11 points, more than most
# differences between two validations of a run. So with fewer images, chance mostly selects the best one.
FEW_IMAGES = 20


def few_images_warning(validation: Iterable[Example], drawn: bool = True, annotations: str = "") -> str:
    """Return a warning if there are validation images, but fewer than FEW_IMAGES. Otherwise return "".

    drawn: whether they were drawn at random, by VAL_FRACTION. annotations: the training file. A file val beside it is named.
    """
    images = len({example.image for example in validation})
    if not 0 < images < FEW_IMAGES:
        return ""
    source = Path(annotations)
    beside = source.parent / f"val{source.suffix}"
    fix = "hold out more: VAL_FRACTION (--val-fraction) or VAL_ANNOTATIONS" if drawn else "add validation images to your data"
    if drawn and source.suffix and beside != source and beside.is_file():
        fix = f"if {printable(str(beside))} is for validation: --val-annotations {quoted_for_shell(str(beside))}"
    return (
        f"warning: {counted(images, 'validation image')}: with fewer than {FEW_IMAGES}, one image changes a score by more than "
        f"5 points, so chance mostly chooses best.safetensors; {fix}"
    )


NO_LINES = hashlib.sha256().hexdigest()  # `resume.lines_digest` of no lines
# entries of a run's identity that change its scores: with other values, two scores cannot be compared
SCORED = (
    "validation lines", "best_by", "prompt", "generation", "num_beams", "max_new_tokens", "image_size", "base weights",
    "base processors",
)  # fmt: skip


def scores_differ(earlier: dict[str, Any], current: dict[str, Any]) -> bool:
    """Return True if the scores of two runs with these identities cannot be compared. An older identity may lack an entry.

    Without validation in the current run, the first two entries of SCORED do not count: no new score replaces the best one.
    """
    names = SCORED[2:] if current.get("validation lines") == NO_LINES else SCORED
    return any(earlier[name] != current.get(name) for name in names if name in earlier)


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

    @classmethod
    def restored(cls, state: dict[str, Any], min_improvement: float) -> "Best":
        """Return the best validation that a checkpoint contains. Older checkpoints lack `improved` and `reached`."""
        rank = (state["rank"][0], state["rank"][1])
        improved, reached = state.get("improved", state["step"]), state.get("reached", rank[0])
        return cls(state["by"], state["step"], state["stale"], rank, min_improvement, improved, reached)

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
