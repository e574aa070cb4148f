"""Rows `step`, `dora`, `compiled` and `captions`: the time of one training step."""

from collections.abc import Callable, Iterator
from functools import partial
from resource import RUSAGE_SELF, getrusage
from typing import Any

from benchmarks.contestants import ours, peers, trainer
from benchmarks.suite.pairs import (
    FLOOR,
    FULL,
    HANDMADE,
    OURS,
    PADDED,
    PEFT,
    PEFT16,
    PRODUCTS,
    TRAINER,
    Cell,
    Turn,
    compare,
    freed,
    seconds,
)
from benchmarks.suite.plan import Plan
from benchmarks.suite.sizes import backbone, copy_of, in_dtype
from benchmarks.suite.work import Work, work
from lora_blip.models.loading import Backbone


def step(plan: Plan) -> Iterator[Cell]:
    """Compare all contestants at the tiny and the base size, and lora_blip with peft at the large sizes."""
    for name in ("tiny",) if plan.quick else ("tiny", "base"):
        for precision in plan.precisions:
            with freed():
                yield _step(plan, name, precision, everyone=True)
    for name, precisions in {"large": [] if plan.quick else plan.precisions[1:], "blip2": plan.precisions}.items():
        for precision in precisions:
            with freed():
                yield _step(plan, name, precision, everyone=False)


def _step(plan: Plan, name: str, precision: str, everyone: bool) -> Cell:
    base = _base(plan, name, precision)
    batch, size = work(base), plan.size(name)
    sides: dict[str, Any] = {
        OURS: ours.Training(base, batch, precision),
        PEFT: peers.peft_loop(copy_of(base), batch, precision),
    }
    if precision != "fp32" and base.family == "blip":  # with BLIP-2, all contestants have 16-bit weights
        sides[PEFT16] = peers.peft_loop(in_dtype(copy_of(base), precision), batch, precision)
    if everyone:
        sides[FULL] = peers.full(copy_of(base), batch, precision)
        sides[FLOOR] = peers.floor(copy_of(base), batch, precision)
        sides[PRODUCTS] = peers.Products(copy_of(base), batch, precision)
        if precision == "fp32":
            sides[HANDMADE] = peers.handmade(copy_of(base), batch)
    turns = timed(sides, plan.steps(size))
    if everyone:
        turns[TRAINER] = _trainer(copy_of(base), batch, precision, max(3, plan.steps(size)), plan.device)
    cell = compare("step", f"{name} {precision}", turns, PEFT, plan.rounds)
    cell.notes = {"images": len(batch.texts), "model": size}
    return cell


def dora(plan: Plan) -> Iterator[Cell]:
    """Compare DoRA of lora_blip with DoRA of peft."""
    for name in ("tiny",) if plan.quick else ("tiny", "base"):
        for precision in plan.precisions:
            with freed():
                base, size = _base(plan, name, precision), plan.size(name)
                batch = work(base)
                sides: dict[str, Any] = {
                    OURS: ours.Training(base, batch, precision, variant="dora"),
                    PEFT: peers.peft_loop(copy_of(base), batch, precision, dora=True),
                }
                cell = compare("dora", f"{name} {precision}", timed(sides, plan.steps(size)), PEFT, plan.rounds)
                cell.notes = {"images": len(batch.texts), "model": size}
                yield cell


def compiled(plan: Plan) -> Iterator[Cell]:
    """Compare both sides with compiled models. The time of compiling is a note; no figure includes it."""
    for name in ("tiny",) if plan.quick else ("tiny", "base"):
        for precision in plan.precisions[:1] if plan.quick else plan.precisions:
            with freed():
                base, size = _base(plan, name, precision), plan.size(name)
                batch = work(base)
                sides: dict[str, Any] = {
                    OURS: ours.Training(base, batch, precision, compiled=True),
                    PEFT: peers.peft_loop(copy_of(base), batch, precision, compiled=True),
                }
                if precision != "fp32":
                    sides[PEFT16] = peers.peft_loop(in_dtype(copy_of(base), precision), batch, precision, compiled=True)
                compiling = {key: seconds(side.step) for key, side in sides.items()}
                cell = compare("compiled", f"{name} {precision}", timed(sides, plan.steps(size)), PEFT, plan.rounds)
                cell.notes = {"first step with compiling, s": compiling}
                yield cell


def captions(plan: Plan) -> Iterator[Cell]:
    """Compare steps of two images with five captions each. peft gets ten rows, each with its image."""
    for name, model in {"base": "base", "blip2": "BLIP-2 OPT", "blip2-t5": "BLIP-2 T5"}.items():
        for precision in plan.precisions:
            with freed():
                base = _base(plan, name, precision)
                batch = work(base, captions=5, uneven=True)
                sides: dict[str, Any] = {OURS: ours.Training(base, batch, precision)}
                if name != "base":
                    sides[PADDED] = ours.Training(base, batch, precision, packs=False)
                sides[PEFT] = peers.peft_loop(copy_of(base), batch, precision)
                if name == "base" and precision != "fp32":
                    sides[PEFT16] = peers.peft_loop(in_dtype(copy_of(base), precision), batch, precision)
                turns = timed(sides, plan.steps("captions"))
                cell = compare("captions", f"{model} {precision}, 2 images × 5 captions", turns, PEFT, plan.few)
                cell.notes = {"page faults in a step": {name: page_faults(side.step) for name, side in sides.items()}}
                yield cell


def page_faults(step: Callable[[], object]) -> int:
    """Return the number of pages of memory that the operating system supplies during a step of this process."""
    before = getrusage(RUSAGE_SELF).ru_minflt
    step()
    return getrusage(RUSAGE_SELF).ru_minflt - before


def timed(sides: dict[str, Any], steps: int) -> dict[str, Turn]:
    return {name: partial(seconds, side.step, steps) for name, side in sides.items()}


def _base(plan: Plan, name: str, precision: str) -> Backbone:
    """Load BLIP's weights in fp32 and BLIP-2's in the precision, as lora_blip and users of peft do."""
    return backbone(plan.size(name), plan.device, precision if name.startswith("blip2") else "fp32")


def _trainer(base: Backbone, batch: Work, precision: str, steps: int, device: str) -> Turn:
    model, inputs = peers.with_peft(base), peers.inputs_of(base, batch)
    return lambda: trainer.seconds_a_step(model, inputs, precision, steps, device)
