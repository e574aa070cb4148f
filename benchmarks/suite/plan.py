"""Define how much is measured: all rows, or a quick run on the smallest models."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from benchmarks.suite.pairs import Cell

R, ALPHA, RATE = 8, 16.0, 1e-3


class Budget:
    """The time of a run. A comparison that would probably end too late is left out, and its name is kept.

    A comparison is expected to take as long as the longest one of its row so far, or FIRST seconds.
    """

    FIRST = 45.0

    def __init__(self, limit: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self.start = self.last = clock()
        self.row = ""  # of the comparison that is running
        self.longest: dict[str, float] = {}
        self.left_out: list[str] = []

    def allows(self, row: str, setting: str) -> bool:
        """Return whether there is time for a comparison. Call it before each comparison."""
        now = self.clock()
        if self.row:
            self.longest[self.row] = max(self.longest.get(self.row, 0.0), now - self.last)
        self.row, self.last = row, now
        if now - self.start + self.longest.get(row, self.FIRST) <= self.limit:
            return True
        self.row = ""
        self.left_out.append(f"{row}: {setting}")
        return False


@dataclass(frozen=True)
class Plan:
    """The settings of all rows. `quick` replaces each model by the smallest one of its kind."""

    quick: bool = False
    rounds: int = 5
    long_rounds: int = 2  # rounds of a row whose turns take a minute
    workers: int = 0  # processes that load images
    device: str = "cpu"
    budget: Budget = field(default_factory=Budget)

    def size(self, name: str) -> str:
        """Return the model that is used for `name`."""
        return name if not self.quick else {"blip2": "mini2", "blip2-t5": "mini2-t5"}.get(name, "mini")

    @property
    def precisions(self) -> list[str]:
        """Return fp32 and bf16 on a CPU, and fp16 and bf16 on a GPU."""
        return ["fp32", "bf16"] if self.device == "cpu" else ["fp16", "bf16"]

    def allows(self, row: str, setting: str) -> bool:
        """Return whether the budget has time for a comparison."""
        return self.budget.allows(row, setting)

    def steps(self, size: str) -> int:
        """Return the number of steps in a turn, so that a turn takes at least a second."""
        return 3 if self.quick else 40 if size == "tiny" else 1 if self.device == "cpu" else 20

    @property
    def few(self) -> int:
        """Return the number of rounds of a row whose turns take ten seconds."""
        return min(3, self.rounds)


Row = Callable[[Plan], Iterator[Cell]]


def quick(rounds: int = 2, budget: Budget | None = None) -> Plan:
    return Plan(True, rounds, 1, 0, device(), budget or Budget())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
