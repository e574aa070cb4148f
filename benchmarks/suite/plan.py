"""How much is measured: the whole suite, or a quick look at the smallest models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.suite.pairs import Cell

R, ALPHA, RATE = 8, 16.0, 1e-3


@dataclass(frozen=True)
class Plan:
    """What the rows share. `quick` puts the smallest model of its kind in the place of every other."""

    quick: bool = False
    rounds: int = 5
    long_rounds: int = 2  # of what takes a minute a turn
    workers: int = 0  # processes that load images
    device: str = "cpu"

    def size(self, name: str) -> str:
        """The model that stands for `name`."""
        return name if not self.quick else "mini2" if name == "blip2" else "mini"

    @property
    def precisions(self) -> list[str]:
        """fp32 and bf16 on a CPU; the two kinds of 16 bits on a GPU."""
        return ["fp32", "bf16"] if self.device == "cpu" else ["fp16", "bf16"]

    def steps(self, size: str) -> int:
        """Steps in one turn, so that it takes a second or more."""
        return 3 if self.quick else 40 if size == "tiny" else 1 if self.device == "cpu" else 20

    @property
    def few(self) -> int:
        """Rounds of what takes ten seconds a turn."""
        return min(3, self.rounds)


Row = Callable[[Plan], Iterator[Cell]]


def quick(rounds: int = 2) -> Plan:
    return Plan(True, rounds, 1, 0, device())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
