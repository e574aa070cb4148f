"""Compare lora_blip with peft and others, in turns: `make bench`, or `python -m benchmarks --only step,memory --quick`.

All rows take 55 to 105 minutes on 2 cores. `python -m benchmarks.studies.growth` measures how cost grows, and
`python -m benchmarks.suite.bars` draws a result.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from lora_blip.cli import report_errors

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks.rows import card, cubes, epochs, inference, memory, steps
from benchmarks.suite import report
from benchmarks.suite.plan import Budget, Plan, Row, device, quick

ROWS: dict[str, Row] = {
    "step": steps.step,
    "dora": steps.dora,
    "compiled": steps.compiled,
    "captions": steps.captions,
    "memory": memory.memory,
    "epoch": epochs.epoch,
    "cached": epochs.cached,
    "input": epochs.input,
    "generate": inference.generate,
    "batch": inference.batch,
    "merge": inference.merge,
    "cubes": cubes.cubes,
    "card": card.card,
    "card_compiled": card.card_compiled,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows, with commas: {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="run each row on the smallest model, only to check that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after a warm-up; each contestant runs once per round")
    parser.add_argument("--minutes", type=float, default=0, help="leave out comparisons that would end later; 0: none")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each contestant")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the .json and the .md file")
    given = parser.parse_args(arguments)
    unknown = set(given.only.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    budget = Budget(60 * given.minutes or math.inf)
    measured = Plan(rounds=given.rounds, workers=given.workers, device=device(), budget=budget)
    plan = quick(budget=budget) if given.quick else measured
    rows = {name: ROWS[name](plan) for name in given.only.split(",")}  # in the order of the flag
    _, whole = report.collect(rows, given.out, "quick" * given.quick, budget.left_out)
    return 0 if whole else 1


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
