"""Row `card`: images per second, peak memory, and the share of the matrix rate that a step uses.

Without a GPU, only a quick run measures it, on the smallest models, to check that it runs.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contestants import ours, peers
from benchmarks.rows.memory import peak_bytes
from benchmarks.suite.pairs import OURS, PEFT, PEFT16, Cell, compare, freed, seconds
from benchmarks.suite.plan import Plan
from benchmarks.suite.sizes import backbone, copy_of, in_dtype
from benchmarks.suite.work import work
from lora_blip.models.precision import DTYPES

IMAGES = 16
SQUARE = {"cuda": 8192, "cpu": 512}  # side of the matrices


def card(plan: Plan) -> Iterator[Cell]:
    for name in ("base", "large", "blip2") if torch.cuda.is_available() or plan.quick else ():
        for precision in plan.precisions:
            with freed():
                yield _card(plan, name, precision)


def _card(plan: Plan, name: str, precision: str) -> Cell:
    base = backbone(plan.size(name), plan.device, precision if name == "blip2" else "fp32")
    batch = work(base, IMAGES)
    sides: dict[str, Any] = {
        OURS: ours.Training(base, batch, precision),
        PEFT: peers.peft_loop(copy_of(base), batch, precision),
    }
    if name != "blip2":
        sides[PEFT16] = peers.peft_loop(in_dtype(copy_of(base), precision), batch, precision)
    rate = matrix_rate(plan.device, precision)
    counted = {side: (peak_bytes(training.step), flops(training)) for side, training in sides.items()}
    turns = {side: partial(seconds, training.step, plan.steps(name)) for side, training in sides.items()}
    cell = compare("card", f"{name} {precision}, {IMAGES} images", turns, PEFT, plan.rounds)
    cell.notes["dense matrix rate, Tflop/s"] = rate / 1e12
    for side, median in cell.medians().items():
        peak, work_done = counted[side]
        share = work_done / median / rate
        cell.notes[side] = {"images/s": IMAGES / median, "peak above the model, MB": peak / 1e6, "share of the rate": share}
    return cell


def flops(training: Any) -> int:
    """Return the operations of the matrix products and attention of one step, forward and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        training.step()
    return counter.get_total_flops()


def matrix_rate(device: str, precision: str) -> float:
    """Return the measured operations per second of one large square matrix product."""
    side = SQUARE[device]
    a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
    seconds(lambda: a @ b, 10)
    return 2 * side**3 / seconds(lambda: a @ b, 50)
