"""Rows `card` and `card_compiled`: images per second, peak memory, and the share of the matrix rate that a step uses.

Without a GPU, only a quick run measures them, on the smallest models and without a compiler, to check that they run.
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
from benchmarks.suite.work import Work, work
from lora_blip.models.loading import Backbone
from lora_blip.models.precision import DTYPES

IMAGES = 16
SQUARE = {"cuda": 8192, "cpu": 512}  # side of the matrices
SIZES = ("large", "base", "blip2")


def card(plan: Plan) -> Iterator[Cell]:
    """Measure steps of lora_blip and peft, in 16 bits with the weights of both kinds."""
    for name in SIZES if torch.cuda.is_available() or plan.quick else ():
        for precision in plan.precisions[-1:] if plan.quick else plan.precisions[::-1]:
            setting = f"{name} {precision}, {IMAGES} images"
            if plan.allows("card", setting):
                with freed():
                    yield _card(plan, name, precision, setting)


def card_compiled(plan: Plan) -> Iterator[Cell]:
    """Measure the same steps compiled, in bf16. lora_blip compiles the blocks of the ViT, and peft the whole model."""
    for name in SIZES if torch.cuda.is_available() or plan.quick else ():
        setting = f"{name} {plan.precisions[-1]}, {IMAGES} images"
        if plan.allows("card_compiled", setting):
            with freed():
                yield _card(plan, name, plan.precisions[-1], setting, compiled=True)


def _card(plan: Plan, name: str, precision: str, setting: str, compiled: bool = False) -> Cell:
    base = backbone(plan.size(name), plan.device, precision if name == "blip2" else "fp32")
    sides = _sides(base, work(base, IMAGES), precision, both_dtypes=name != "blip2" and not compiled)
    rate = matrix_rate(plan.device, precision)
    counted = {side: flops(training) for side, training in sides.items()}  # before compiling: the counter sees no fused kernel
    notes: dict[str, Any] = {"dense matrix rate, Tflop/s": rate / 1e12}
    if compiled:
        for training in sides.values():
            training.compile(**compile_options(plan))
        notes["first step with compiling, s"] = {side: seconds(training.step) for side, training in sides.items()}
    peaks = {side: peak_bytes(training.step) for side, training in sides.items()}
    turns = {side: partial(seconds, training.step, plan.steps(name)) for side, training in sides.items()}
    cell = compare("card_compiled" if compiled else "card", setting, turns, PEFT, plan.rounds)
    cell.notes = notes
    for side, median in cell.medians().items():
        share = counted[side] / median / rate
        cell.notes[side] = {
            "images/s": IMAGES / median,
            "peak above the model, MB": peaks[side] / 1e6,
            "share of the rate": share,
        }
    return cell


def _sides(base: Backbone, batch: Work, precision: str, both_dtypes: bool) -> dict[str, Any]:
    sides: dict[str, Any] = {
        OURS: ours.Training(base, batch, precision),
        PEFT: peers.peft_loop(copy_of(base), batch, precision),
    }
    if both_dtypes:
        sides[PEFT16] = peers.peft_loop(in_dtype(copy_of(base), precision), batch, precision)
    return sides


def compile_options(plan: Plan) -> dict[str, str]:
    """Return options of torch.compile. A quick run on a CPU needs no compiler, which would take a minute."""
    return {"backend": "eager"} if plan.quick and plan.device == "cpu" else {}


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
