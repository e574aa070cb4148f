"""Compare a training that is killed repeatedly with one that is not: `python -m benchmarks.robustness.chaos --precision bf16`

Each start of the run is a separate process. Most end by SIGKILL at a random moment, some by SIGKILL while a checkpoint is
written, and a few by SIGTERM or SIGUSR1, which save first. At the end, the adapters must have equal bytes, and metrics.jsonl
equal lines except for times. The exit status is 1 if they differ, or if the run ended before it was killed often enough.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lora_blip.cli import report_errors
from lora_blip.config import TrainConfig
from lora_blip.lora import adapter_file
from lora_blip.runtime import files, signals
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, METRICS_NAME
from lora_blip.training import checkpoint, loop

TIMES = ("seconds", "images_per_s")
POINTS = ("before", "half the tensors", "half a state.json", "before the rename", "after the rename", "an old one half gone")


def config_of(folder: Path, precision: str, steps: int, checkpoint_seconds: float) -> TrainConfig:
    return TrainConfig(
        output_dir=str(folder), precision=precision, max_steps=steps, batch_size=4, accumulation=3, augment=True, num_workers=2,
        dropout=0.1, validate_every=20, val_fraction=0.03, max_new_tokens=8, log_every=1, device="cpu",
        checkpoint_seconds=checkpoint_seconds,
    )  # fmt: skip


def start(config: TrainConfig, die_at: str, rng: random.Random) -> int:
    """Start the run in a child process, and return its pid."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        if die_at:
            arm(die_at, rng)
        loop.train(config)
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def wait(child: int, runs: Path, seconds: float, early: float) -> None:
    """Wait until `seconds` after the first new checkpoint of the process, or only `early` seconds if that is not 0."""
    before, deadline = newest(runs), time.perf_counter() + (early or 60)
    while (
        newest(runs) == before
        and time.perf_counter() < deadline
        and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    ):
        time.sleep(0.01)
    time.sleep(0 if early else seconds)


def newest(runs: Path) -> str:
    """Return the name of the newest checkpoint, or ""."""
    return max((path.name for path in runs.glob(f"20*/{checkpoint.FOLDER}/0*")), default="")


def arm(point: str, rng: random.Random) -> None:
    """Change this process so that it kills itself at `point` while it writes one of its next three checkpoints."""
    left = rng.randint(0, 2)

    def die() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def after(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            die()
            return result

        return wrapped

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            die()
            return real(*arguments, **named)

        return wrapped

    def half(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def wrapped(path: Path, content: Any, *arguments: Any, **named: Any) -> Any:
            if path.name == name:
                real(path, content[: len(content) // 2])
                die()
            return real(path, content, *arguments, **named)

        return wrapped

    if point == "before":
        checkpoint.make_whole = before(checkpoint.make_whole)
    elif point == "half the tensors":
        Path.write_bytes = half(Path.write_bytes, checkpoint.TENSORS)  # type: ignore[method-assign]
    elif point == "half a state.json":
        Path.write_text = half(Path.write_text, checkpoint.STATE)  # type: ignore[method-assign]
    elif point == "before the rename":
        files.sync_folder = before(files.sync_folder)
    elif point == "after the rename":
        checkpoint.make_whole = after(checkpoint.make_whole)
    else:
        real = files.shutil.rmtree

        def remove_partly(folder: Path, **named: Any) -> None:
            for path in list(Path(folder).iterdir())[:1]:
                path.unlink()
                die()
            real(folder, **named)

        files.shutil.rmtree = remove_partly  # type: ignore[assignment]


def lines(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without times."""
    records = [json.loads(line) for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in records]


def same(one: Path, other: Path) -> bool:
    """Return True if two adapter files have equal tensors, bit for bit."""
    a, b = adapter_file.read(one).tensors, adapter_file.read(other).tensors
    return a.keys() == b.keys() and all(x.numpy().tobytes() == b[key].numpy().tobytes() for key, x in a.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--kills", type=int, default=50, help="least number of SIGKILLs")
    parser.add_argument("--steps", type=int, default=90, help="optimizer steps of the run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place, "whole"), Path(place, "killed")
        started = time.perf_counter()
        if status := os.waitpid(start(config_of(whole, options.precision, options.steps, 0.2), "", rng), 0)[1]:
            sys.exit(f"the run that is not killed ended with status {status}")
        one = next(iter(whole.glob("20*")))
        pace = json.loads((one / METRICS_NAME).read_text(encoding="utf-8").splitlines()[-2])["seconds"] / options.steps
        print(f"uninterrupted, {options.precision}: {options.steps} steps in {time.perf_counter() - started:.1f} s", flush=True)
        ends: Counter[str] = Counter()
        points: Counter[str] = Counter()
        # checkpoints are frequent enough that each process saves before it is killed
        config = config_of(killed, options.precision, options.steps, min(0.2, pace / 2))
        where: Counter[str] = Counter()
        finished, step = False, 0
        while not finished:
            kills = ends["SIGKILL"]
            kind = rng.choices(("kill", "inside", "signal"), (5, 3, 1))[0] if kills < options.kills else "free"
            point = rng.choice(POINTS) if kind == "inside" else ""
            child = start(config, point, random.Random(rng.random()))
            if kind in ("kill", "signal"):
                patience = 0.6 * pace * (options.steps - step) / max(1, options.kills - kills)  # the other kills are "inside"
                wait(child, killed, rng.uniform(0, 2 * patience), rng.uniform(0.1, 3) if rng.random() < 0.2 else 0)
                number = signal.SIGKILL if kind == "kill" else rng.choice((signal.SIGTERM, signal.SIGUSR1))
                os.kill(child, number)
            status = os.waitpid(child, 0)[1]
            end = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
            ends[end] += 1
            points[point] += bool(point) and end == "SIGKILL"
            run = next(iter(killed.glob("20*")), None)
            saved = checkpoint.newest(run)[0] if run else None
            if saved:
                step = saved.state["progress"]["step"]
                where["in a step" if saved.state["progress"]["slot"] else "between steps"] += 1
                print(f"{sum(ends.values()):4}  {kind:<6} {point:<20} {end:<8} {saved.folder.name}", flush=True)
            finished = run is not None and not (run / checkpoint.FOLDER).exists()  # even if it was killed after the last step
            if end not in ("exit 0", "SIGKILL", f"exit {signals.SAVED}", "SIGTERM", "SIGUSR1"):
                sys.exit(f"a process of the run ended with {end}")
        runs = sorted(killed.glob("20*"))
        results = {
            "one run folder": list(killed.glob("[!.]*")) == runs and len(runs) == 1,
            "adapter's bytes": same(one / ADAPTER_NAME, runs[-1] / ADAPTER_NAME),
            "best adapter's bytes": same(one / BEST_NAME, runs[-1] / BEST_NAME),
            "lines of metrics.jsonl": lines(one) == lines(runs[-1]),
        }
    print(f"{sum(ends.values())} processes ended with: {dict(ends)}")
    print(f"SIGKILLs while a checkpoint was written: {sum(points.values())}, {dict(+points)}")
    print(f"resumed from checkpoints: {dict(where)}")
    for name, equal in results.items():
        print(f"{name:<24}{'equal' if equal else 'DIFFERS'}")
    if ends["SIGKILL"] < options.kills:
        print(f"the run ended after {ends['SIGKILL']} of {options.kills} SIGKILLs; set --steps to more than {options.steps}")
    return 0 if all(results.values()) and ends["SIGKILL"] >= options.kills else 1


if __name__ == "__main__":
    report_errors(lambda: sys.exit(main()))
