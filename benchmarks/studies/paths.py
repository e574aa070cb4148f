"""Measure the fast paths on this machine, and write its row of the package's table: `python -m benchmarks.studies.paths`.

It prints the time of each path relative to that of the other one, for each size. `--dry` writes nothing. `lora-blip tune`
measures the same for a user, and writes the user's own table.
"""

import argparse
import sys

from lora_blip.cli import report_errors
from lora_blip.kernels import paths
from lora_blip.lora import tuning
from lora_blip.runtime.files import write_whole


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.paths", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="print the row, but do not write it")
    given = parser.parse_args(arguments)
    row = tuning.measure(lambda name, size, ratio: print(f"{name:<28}{size:>14,}{ratio:>8.2f}", flush=True))
    print(row)
    if not given.dry:
        rows = paths.read(paths.TABLE) | {row.processor: row}
        write_whole(paths.TABLE, paths.table(*rows.values()))
    return 0


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
