"""Measure how cost grows with image size, rank, targets and captions: `python -m benchmarks.studies.growth`.

Each point is a separate comparison: the seconds of a step, measured in turns, and the memory that autograd keeps.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from benchmarks.contestants import ours, peers
from benchmarks.rows.memory import MB, kept_bytes
from benchmarks.rows.steps import timed
from benchmarks.suite import report
from benchmarks.suite.pairs import OURS, PEFT, Cell, compare, freed
from benchmarks.suite.plan import Plan, R, device, quick
from benchmarks.suite.sizes import backbone, copy_of
from benchmarks.suite.work import work
from lora_blip.cli import report_errors

SIDES = (192, 384, 576)  # pixels
RANKS = (1, 4, 8, 16, 64)
# peft cannot adapt one block of rows of the fused qkv; for the first two targets it adapts the whole qkv
TARGETS = ("vit.q", "vit.q,vit.v", "vit.attn", "vit", "vit,text")
CAPTIONS = (1, 2, 5, 10)


def growth(plan: Plan, precision: str) -> Iterator[Cell]:
    few = 1 if plan.quick else None
    for side in SIDES[:few]:
        yield from _point(plan, precision, f"image side {side}", {} if plan.quick else {"image_size": side})
    for r in RANKS[:few]:
        yield from _point(plan, precision, f"r {r}", r=r)
    for where in TARGETS[:few]:
        yield from _point(plan, precision, f"targets {where}", where=where)
    for captions in CAPTIONS[:few]:
        yield from _point(plan, precision, f"captions an image {captions}", captions=captions)


def _point(
    plan: Plan,
    precision: str,
    what: str,
    vision: dict[str, Any] | None = None,
    where: str = "vit",
    r: int = R,
    captions: int = 1,
) -> Iterator[Cell]:
    """Measure the seconds and the kept megabytes of one step, for each value of one setting."""
    with freed():
        base = backbone(plan.size("base"), plan.device, **vision or {})
        batch = work(base, captions=captions, uneven=captions > 1)
        sides: dict[str, Any] = {
            OURS: ours.Training(base, batch, precision, where, r),
            PEFT: peers.peft_loop(copy_of(base), batch, precision, where, r),
        }
        kept = {name: [kept_bytes(side.model, side.forward) / MB] for name, side in sides.items()}
        yield compare("growth", f"{precision}, {what}", timed(sides, plan.steps("base")), PEFT, plan.rounds)
        yield Cell("growth", f"{precision}, {what}, kept", PEFT, "MB", kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the smallest model, the first point of each kind")
    arguments = parser.parse_args()
    plan = quick() if arguments.quick else Plan(rounds=arguments.rounds, device=device())
    report.collect(
        {"growth": growth(plan, arguments.precision)}, report.RESULTS, "growth_quick" if arguments.quick else "growth"
    )


if __name__ == "__main__":
    report_errors(main)
