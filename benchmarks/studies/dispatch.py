"""Measure the cost of dispatch per training step: `python -m benchmarks.studies.dispatch`.

The models have the depth of BLIP's base and large models, but the width 32. So the products take almost no time, and the rest
of a step remains: Python code and the calls of PyTorch's operations. For each contestant, the command prints three figures and
their ratios to those of peft: operations that PyTorch's profiler counts, calls of Python functions, and CPU time of one thread.
The two counts are the same on each machine. "plain update" is lora_blip with `lora_hook` instead of `fused`. "tiny" is the
embedded base.
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

from lora_blip.cli import report_errors

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import ours, peers
from benchmarks.suite import sizes
from benchmarks.suite.pairs import OURS, PEFT
from benchmarks.suite.work import work
from lora_blip.lora import attached

NARROW: sizes.Settings = {"image_size": 32, "patch_size": 8}
PLAIN = "lora_blip, plain update"
DEPTHS: dict[str, tuple[sizes.Settings, None, sizes.Settings]] = {
    f"{name}, width 32": (
        sizes._width(32, layers, 4, **NARROW),
        None,
        sizes.SMALL_TEXT | sizes._width(32, 12, 4, encoder_hidden_size=32),
    )
    for name, layers in (("base", 12), ("large", 24))
}
FIGURES = ("operations", "Python calls", "CPU ms")


def sides_of(size: str, precision: str) -> dict[str, Any]:
    """Return the contestants. All have the same weights and the same batch."""
    base = sizes.backbone(size)
    batch = work(base)
    plain = ours.Training(base, batch, precision)
    attached.fast(plain.model, False)
    return {
        OURS: ours.Training(base, batch, precision),
        PLAIN: plain,
        PEFT: peers.peft_loop(sizes.copy_of(base), batch, precision),
    }


def operations(side: Any) -> int:
    """Return the number of operations of a step, each with the operations that it calls."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        side.step()
    return sum(event.count for event in recorded.key_averages() if event.key.startswith("aten::"))


def python_calls(side: Any) -> int:
    """Return the number of calls of Python functions in a step. On a CPU, the backward pass runs in the same thread."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        side.step()
    finally:
        sys.setprofile(None)
    return count


def cpu_times(sides: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Return the CPU milliseconds of each step. The contestants alternate, so that other programs slow all of them down."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            started = time.process_time()
            sides[name].step()
            times[name].append((time.process_time() - started) * 1e3)
    return times


def figures(size: str, precision: str, rounds: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the value of each figure and its ratio to peft, for each contestant."""
    sides = sides_of(size, precision)
    for side in sides.values():
        for _ in range(3):
            side.step()
    counts = {name: (operations(side), python_calls(side)) for name, side in sides.items()}
    times = cpu_times(sides, rounds)
    result = {}
    for name in sides:
        pairs = [a / b for a, b in zip(times[name], times[PEFT], strict=True)]
        each = [(float(own), own / other) for own, other in zip(counts[name], counts[PEFT], strict=True)]
        result[name] = dict(zip(FIGURES, [*each, (statistics.median(times[name]), statistics.median(pairs))], strict=True))
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.dispatch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="timed steps of each contestant")
    parser.add_argument("--only", default=",".join(["base", "large", "tiny"]), help="models, with commas")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sizes.SIZES.update(DEPTHS)
    print(f"{'':44}" + "".join(f"{figure + ' (of peft)':>26}" for figure in FIGURES))
    for size in [*DEPTHS, "tiny"]:
        for precision in ("fp32", "bf16") if size.split(",")[0] in given.only.split(",") else ():
            for name, each in figures(size, precision, given.rounds).items():
                cells = "".join(f"{f'{value:.1f} ({ratio:.3f})':>26}" for value, ratio in each.values())
                print(f"{f'{size}, {precision}: {name}':44}{cells}", flush=True)
    return 0


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
