"""Define how much is measured: all rows, or a quick run on the smallest models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.suite.pairs import Cell

R, ALPHA, RATE = 8, 16.0, 1e-3


@dataclass(frozen=True)
class Plan:
    """The settings of all rows. `quick` replaces each model by the smallest one of its kind."""

    quick: bool = False
    rounds: int = 5
    long_rounds: int = 2  # rounds of a row whose turns take a minute
    workers: int = 0  # processes that load images
    device: str = "cpu"

    def size(self, name: str) -> str:
        """Return the model that is used for `name`."""
        return name if not self.quick else {"blip2": "mini2", "blip2-t5": "mini2-t5"}.get(name, "mini")

    @property
    def precisions(self) -> list[str]:
        """Return fp32 and bf16 on a CPU, and fp16 and bf16 on a GPU."""
        return ["fp32", "bf16"] if self.device == "cpu" else ["fp16", "bf16"]

    def steps(self, size: str) -> int:
        """Return the number of steps in a turn, so that a turn takes at least a second."""
        return 3 if self.quick else 40 if size == "tiny" else 1 if self.device == "cpu" else 20

    @property
    def few(self) -> int:
        """Return the number of rounds of a row whose turns take ten seconds."""
        return min(3, self.rounds)


Row = Callable[[Plan], Iterator[Cell]]


def quick(rounds: int = 2) -> Plan:
    return Plan(True, rounds, 1, 0, device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
