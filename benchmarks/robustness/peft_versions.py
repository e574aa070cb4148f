"""Compare lora_blip with versions of peft in both directions: `python -m benchmarks.robustness.peft_versions`.

Every version is installed without its dependencies, which are the same for all, into a folder that comes first on PYTHONPATH.
A cell is the largest relative difference of the outputs in fp32, for an adapter of `tests.support.peft_cases`.
The exit status is 1 if a difference is larger than BOUND.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from benchmarks.robustness.versions import overlay
from lora_blip.cli import report_errors

VERSIONS = ("0.18.0", "0.21.2")  # the lowest and the newest that are tested
ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e-6
NAMES = {"blip": "BLIP", "opt": "BLIP-2, OPT", "t5": "BLIP-2, T5", "vqa": "BLIP VQA", "itm": "BLIP ITM"}


def rows() -> bool:
    """Print a row for each shape, model and variant, with one column for each direction. Return True if all are below BOUND."""
    import peft
    from transformers.utils import logging

    from lora_blip.models.loading import Backbone, load_backbone
    from lora_blip.runtime.setting_checks import VARIANTS
    from tests.support import peft_cases, tiny

    logging.disable_progress_bar()
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_blip(folder / "blip")
        tiny.save_blip2(folder / "opt", "opt")
        tiny.save_blip2(folder / "t5", "t5")
        tiny.save_vqa(folder / "vqa")
        tiny.save_itm(folder / "itm")
        for kind in peft_cases.KINDS:
            with redirect_stdout(io.StringIO()):
                original = load_backbone(str(folder / kind), "cpu")

            def make(_: str, original: Backbone = original) -> Backbone:
                return replace(original, model=deepcopy(original.model))

            for variant in VARIANTS:
                cells = []
                for shape in peft_cases.SHAPES:
                    for direction in peft_cases.DIRECTIONS:
                        with tempfile.TemporaryDirectory() as work, redirect_stdout(io.StringIO()):
                            differences = peft_cases.MEASURES[direction](make, kind, variant, shape, Path(work))
                        cells.append(max(differences))
                worst = max(worst, *cells)
                shown = " | ".join("0" if cell == 0 else f"{cell:.0e}" for cell in cells)
                print(f"| {peft.__version__} | {NAMES[kind]} | {variant} | {shown} |", flush=True)
    return worst <= BOUND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="versions of peft")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows:
        raise SystemExit(0 if rows() else 1)
    from tests.support.peft_cases import DIRECTIONS, SHAPES

    columns = [f"{shape}, {direction}" for shape in SHAPES for direction in DIRECTIONS]
    print(f"| peft | model | variant | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for version in options.versions:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.robustness.peft_versions", "--rows"]
            failed |= subprocess.run(command, cwd=ROOT, env=overlay("peft", version, Path(folder)), check=False).returncode != 0
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    report_errors(main)
