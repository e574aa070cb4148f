"""Compare a run of infer.py that is killed repeatedly with a run that is not: `python -m benchmarks.studies.bulk`

The study makes small images, some of them broken, and captions them with infer.py in separate processes: first a few, then
all, then all again with SIGKILL at random moments, resuming each time. At the end, each image must be in the output exactly
once, and both files must equal those of the run that was not killed. The peak memory must not grow with the number of images.
The exit status is 1 if a check fails.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from lora_blip.cli import report_errors
from lora_blip.inference.output import ERRORS_NAME, FILE_NAME, SETTINGS_NAME

ROOT = Path(__file__).resolve().parents[2]
BROKEN = 97  # each 97th file is broken: empty, truncated or not an image
IN_FOLDER = 1000
GROWTH = 32  # largest difference of the peak memory of the large run and the small one, in MB


def draw(folder: Path, count: int) -> list[str]:
    """Write `count` images into folders of IN_FOLDER, and return their paths."""
    paths = []
    for number in range(count):
        path = folder / f"{number // IN_FOLDER:03}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(random.Random(number).choices(range(256), k=6))
        picture = Image.new("RGB", (32, 32), colour[:3])
        picture.paste(colour[3:], (number % 16, number % 11, 16 + number % 16, 22))
        picture.save(path)
        if number % BROKEN == BROKEN - 1:
            path.write_bytes((b"", path.read_bytes()[:60], b"no picture")[number // BROKEN % 3])
        paths.append(str(path))
    return paths


def start(images: Path, output: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    flags = {
        "model": options.model, "adapter": options.adapter, "images": images, "output-dir": output,
        "max-new-tokens": options.max_new_tokens, "batch-size": options.batch_size, "device": "cpu",
    }  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "infer.py"),
        *(part for key, value in flags.items() for part in (f"--{key}", str(value))),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def finish(child: subprocess.Popen[bytes]) -> float:
    """Wait for the process, and return its peak memory in MB. Stop if it failed."""
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"infer.py ended with {child.returncode}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KB on Linux


def whole_run(images: Path, output: Path, options: argparse.Namespace, count: int) -> tuple[float, float]:
    """Return the seconds and the peak memory in MB of a run that is not killed."""
    started = time.perf_counter()
    peak = finish(start(images, output, options))
    seconds = time.perf_counter() - started
    print(
        f"unkilled, {count:,} images: {seconds:.1f} s, {count / seconds:.0f} a second with its start, peak {peak:.0f} MB",
        flush=True,
    )
    return seconds, peak


def written(output: Path) -> int:
    return sum((output / name).stat().st_size for name in (FILE_NAME, ERRORS_NAME) if (output / name).exists())


def killed_run(images: Path, output: Path, options: argparse.Namespace, seconds: float, size: int) -> Counter[str]:
    """Start the run again after each kill until it is complete. Return how often it was killed in each phase.

    seconds: the time of a run that is not killed. size: the bytes that it writes.
    """
    rng, ends = random.Random(options.seed), Counter[str]()
    while sum(ends.values()) < options.kills:
        child, before = start(images, output, options), written(output)
        early = rng.random() < 0.15  # while the process starts
        deadline = time.perf_counter() + (rng.uniform(0, 6) if early else 600)
        while child.poll() is None and time.perf_counter() < deadline and written(output) == before:
            time.sleep(0.005)
        if not early:
            left = 1 - written(output) / size
            time.sleep(rng.uniform(0, 2 * seconds * left / (options.kills - sum(ends.values()) + 1)))
        child.send_signal(signal.SIGKILL)
        if child.wait() != -signal.SIGKILL:
            sys.exit(
                f"the run ended with status {child.returncode} before {options.kills} kills; set --images to a larger number"
            )
        torn = (output / FILE_NAME).exists() and not (output / FILE_NAME).read_bytes().endswith(b"\n")
        ends["in a line" if torn else "while captioning" if written(output) > before else "before it wrote"] += 1
        print(f"{sum(ends.values()):4} SIGKILL after {written(output):,} bytes", flush=True)
    if not json.loads((output / SETTINGS_NAME).read_text(encoding="utf-8"))[
        "finished"
    ]:  # the process was killed while it ended
        finish(start(images, output, options))
    return ends


def images_in(output: Path) -> Counter[str]:
    lines = [line for name in (FILE_NAME, ERRORS_NAME) for line in (output / name).read_text(encoding="utf-8").splitlines()]
    return Counter(json.loads(line)["image"] for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--few", type=int, default=2_000, help="images of the run whose memory is compared")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--model", default="assets/tiny-blip")
    parser.add_argument("--adapter", default="none")
    parser.add_argument("--max-new-tokens", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        few, many = Path(place, "few"), Path(place, "many")
        draw(few, options.few)
        paths = draw(many, options.images)
        outputs = [Path(place, name) for name in ("out_few", "out_whole", "out_killed")]
        _, low = whole_run(few, outputs[0], options, options.few)
        seconds, high = whole_run(many, outputs[1], options, options.images)
        ends = killed_run(many, outputs[2], options, seconds, written(outputs[1]))
        lines_by_image = images_in(outputs[2])
        failed = len((outputs[2] / ERRORS_NAME).read_text(encoding="utf-8").splitlines())
        results = {
            "every image exactly once": lines_by_image == Counter(paths),
            f"both files, as unkilled ({failed:,} lines of errors)": all(
                (outputs[1] / name).read_bytes() == (outputs[2] / name).read_bytes() for name in (FILE_NAME, ERRORS_NAME)
            ),
            f"memory flat: {low:.0f} MB for {options.few:,} images, {high:.0f} MB for {options.images:,}": high - low <= GROWTH,
        }
    print(f"{sum(ends.values())} SIGKILLs: {dict(ends)}")
    for name, holds in results.items():
        print(f"{'yes' if holds else 'NO':<4}{name}")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
