"""Measure seconds and memory from annotations to the first batch, by number of lines: `python -m benchmarks.studies.lines`.

Images are not opened, so that only the work for lines is measured. Each size runs in a separate process, and seconds are CPU
time of one core, because other programs may be active. The files are in a temporary folder without images. The model has 512
positions, as Salesforce's models have. The stage "know" is only for retrieval, and is not in the sum. `--csv` compares a CSV
file with a JSONL file of the same lines: the two take turns, and the ratio of the medians is printed.
"""

import argparse
import csv
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora_blip.cli import report_errors

WORDS = (
    "a the red blue green cube on top of table man riding wave surfboard in ocean dog with frisbee park street two people "
    "standing near large white building sky under sitting cat laptop pizza"
).split()
KINDS = {  # kind of the lines → number of lines per image
    "captions, 5 an image": 5,
    "captions, 1 an image": 1,
    "questions, 5 an image": 5,
    "questions, 1 an image": 1,
}
STAGES = ("read and check", "know", "split", "digest", "pictures")


def lines_of(kind: str, count: int) -> Iterator[str]:
    """Return lines as long as COCO's: 8 to 14 words, or a question and ten answers."""
    rng = random.Random(0)
    for number in range(count):
        line: dict[str, Any] = {"image": f"train2014/COCO_train2014_{number // KINDS[kind]:012d}.jpg"}
        if kind.startswith("captions"):
            line["text"] = " ".join(rng.choices(WORDS, k=rng.randint(8, 14)))
        else:
            answers = rng.choices(WORDS, k=10)
            line |= {"question": f"what {' '.join(rng.choices(WORDS, k=6))}?", "answers": answers}
        yield json.dumps(line) + "\n"


def measure(kind: str, source: str) -> dict[str, float]:
    """Return the seconds and the peak MiB of each stage that a training runs with the lines before it opens an image."""
    from benchmarks.suite.sizes import backbone as backbone_of
    from lora_blip.data import annotations, splits
    from lora_blip.data.dataset import ImageDataset
    from lora_blip.tasks.registry import TASKS
    from lora_blip.tasks.retrieval import RetrievalTask
    from lora_blip.training.resume import lines_digest

    backbone = backbone_of("tiny")
    task = TASKS["caption" if kind.startswith("captions") else "vqa"](backbone)
    task.checker.bounds.upper_bound("a", 0)  # the first call examines the tokenizer
    before, seconds = resident(), dict[str, float]()

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[stage] = time.process_time() - start

    with timed("read and check"):
        examples, _ = annotations.read(source, check=task.check, decode=False, pretokenize=task.pretokenize)
    with timed("know"):  # only retrieval does this
        RetrievalTask.prepare_data(SimpleNamespace(), examples)  # type: ignore[arg-type]
    with timed("split"):
        training, validation = splits.split_by_image(examples, 0.1, 0)
    with timed("digest"):
        lines_digest(training, with_images=False)
        lines_digest(validation, with_images=False)
    with timed("pictures"):
        ImageDataset(training, backbone.image_processor, augmented=True, seed=0)
    return seconds | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before}


def resident() -> float:
    """Return the MiB that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure_in_process(kind: str, source: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.studies.lines", "--one", kind, str(source)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(output.splitlines()[-1])
    return measured


def compare_with_csv(count: int, rounds: int) -> None:
    """Print the seconds of all stages for a JSONL file and for a CSV file of the same lines, and their ratio."""
    kind = "captions, 5 an image"
    with tempfile.TemporaryDirectory() as folder:
        jsonl, table = Path(folder, "lines.jsonl"), Path(folder, "lines.csv")
        with jsonl.open("w", encoding="utf-8") as file, table.open("w", encoding="utf-8", newline="") as rows:
            writer = csv.writer(rows)
            writer.writerow(("image", "text"))
            for line in lines_of(kind, count):
                file.write(line)
                writer.writerow(json.loads(line).values())
        seconds: dict[str, list[float]] = {".jsonl": [], ".csv": []}
        for _ in range(rounds):
            for source in (jsonl, table):
                measured = measure_in_process(kind, source)
                seconds[source.suffix].append(sum(measured[stage] for stage in STAGES if stage != "know"))
    medians = {suffix: statistics.median(values) for suffix, values in seconds.items()}
    for suffix, values in seconds.items():
        print(f"{count:>10,} lines {suffix:>6} {medians[suffix]:8.2f} s   rounds:", *(f"{value:.2f}" for value in values))
    print(f"CSV takes {medians['.csv'] / medians['.jsonl']:.2f} of the time of JSONL")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=1_000_000)
    parser.add_argument("--csv", action="store_true", help="compare CSV with JSONL at the largest number of lines")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each file with --csv")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(*chosen.one)))
        return
    print(f"{platform.machine()}, Python {platform.python_version()}: seconds, and MiB of additional peak memory\n")
    if chosen.csv:
        compare_with_csv(chosen.largest, chosen.rounds)
        return
    print(f"{'lines':>30}", *(f"{name:>14}" for name in (*STAGES, "all", "MiB")))
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for power in range(2, len(str(chosen.largest))):
                source = Path(folder, "lines.jsonl")
                with source.open("w", encoding="utf-8") as file:
                    file.writelines(lines_of(kind, 10**power))
                measured = measure_in_process(kind, source)
                seconds = [measured[stage] for stage in STAGES]
                print(
                    f"{10**power:>8,} {kind:>21}",
                    *(f"{x:14.3f}" for x in (*seconds, sum(seconds) - measured["know"])),
                    f"{measured['peak']:14.0f}",
                )


if __name__ == "__main__":
    report_errors(main)
