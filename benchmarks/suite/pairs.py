"""Measure contestants in turns, A B C … C B A, in one run, so that a change of the machine's speed affects all of them equally.

Each round gives the ratio of each contestant to the reference. The report has the median, the smallest and the largest ratio.
"""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

OURS, PEFT, PEFT16, TRAINER = "lora_blip", "peft", "peft, 16-bit weights", "peft + Trainer"
FULL, FLOOR, HANDMADE, HF = "full fine-tuning", "floor: no adapters", "hand-made", "transformers"
TRAINER16, HF16 = "peft + Trainer, 16-bit weights", "transformers, 16-bit weights"
PADDED = "lora_blip, a row for each text"
PRODUCTS, STATIC = "frozen products alone", "transformers, static cache"

Turn = Callable[[], float | dict[str, float]]  # runs one contestant once, and returns its figure, or several figures by name


@dataclass
class Cell:
    """One comparison: the figures of each contestant in each round."""

    row: str
    setting: str
    reference: str
    unit: str = "s"
    figures: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # figures of the warm-up; no ratio contains them
    notes: dict[str, Any] = field(default_factory=dict)

    def ratios(self) -> dict[str, dict[str, float]]:
        """Return, for each name, median, min and max of the ratios to the reference's figure of the same round."""
        ratios = {}
        for name, figures in self.figures.items():
            each = [a / b for a, b in zip(figures, self.figures[self.reference], strict=True)]
            ratios[name] = {"median": statistics.median(each), "min": min(each), "max": max(each)}
        return ratios

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(figures) for name, figures in self.figures.items()}

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"ratios": self.ratios(), "medians": self.medians()}

    def __str__(self) -> str:
        medians, ratios = self.medians(), self.ratios()
        lines = [f"{self.row}: {self.setting} (reference: {self.reference})"]
        for name, ratio in ratios.items():
            spread = f"{ratio['median']:.3f} ({ratio['min']:.3f}–{ratio['max']:.3f})"
            lines.append(f"  {name:<40}{spread:<24}{medians[name]:>12.5g} {self.unit}")
        return "\n".join(lines)


def compare(
    row: str, setting: str, turns: Mapping[str, Turn], reference: str, rounds: int, unit: str = "s", warm: bool = True
) -> Cell:
    """Run the contestants in turns, in reversed order in every second round. The figures of a first warm-up are separate."""
    cell = Cell(row, setting, reference, unit)
    if warm:
        for name, turn in turns.items():
            cell.first |= _named(name, turn())
    for number in range(rounds):
        for name in list(turns)[:: -1 if number % 2 else 1]:
            gc.collect()  # so that no contestant frees the memory of another one
            for key, value in _named(name, turns[name]()).items():
                cell.figures.setdefault(key, []).append(value)
    order = [key for name in turns for key in cell.figures if key == name or key.startswith(f"{name}, ")]
    cell.figures = {key: cell.figures[key] for key in dict.fromkeys(order)}
    return cell


def _named(name: str, figure: float | dict[str, float]) -> dict[str, float]:
    return {f"{name}, {key}": value for key, value in figure.items()} if isinstance(figure, dict) else {name: figure}


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Return the mean seconds of one `run`. The GPU is synchronized before each reading of the clock."""
    synchronize()
    started = time.perf_counter()
    for _ in range(times):
        run()
    synchronize()
    return (time.perf_counter() - started) / times


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def freed() -> Iterator[None]:
    """Free the memory of the block after it, so that the models of the next comparison have room."""
    try:
        yield
    finally:
        gc.collect()
        torch._dynamo.reset()
        with suppress(OSError, AttributeError):  # without glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise glibc keeps freed memory, up to ten gigabytes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
