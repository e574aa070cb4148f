"""Train the demo's cubes with each variant of LoRA: exact match on held-out cubes, and the time.

`python -m benchmarks.studies.variants [STEPS SEED …]` prints a line for each training. STEPS = 0 trains with the default
settings (30 epochs), and captions image_test/. docs/variants.md has the tables.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_blip.cli import report_errors
from lora_blip.config import TrainConfig
from lora_blip.inference.captioner import Captioner
from lora_blip.runtime.runs import METRICS_NAME
from lora_blip.training.loop import train

VARIANTS: dict[str, dict[str, Any]] = {  # name → settings; with LoRA+, the geometric mean of the two learning rates is LR
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "LoRA+": {"lr_ratio": 4.0, "lr": 1.5e-3},
}
TEST = Path("image_test")


def measure(name: str, seed: int, steps: int, folder: str) -> dict[str, Any]:
    """Train one adapter for some steps. Return the scores of the last validation, and the seconds per step without it."""
    lines, _ = trained(name, folder, max_steps=steps, validate_every=steps, val_fraction=0.2, seed=seed, checkpoint_seconds=1e9)
    scores = next(line for line in reversed(lines) if "val_loss" in line)
    logged = [line for line in lines if "seconds" in line]
    seconds = (logged[-1]["seconds"] - logged[0]["seconds"]) / (logged[-1]["step"] - logged[0]["step"])
    return {"variant": name, "seed": seed, "exact": scores["val_exact_match"], "loss": scores["val_loss"], "s/step": seconds}


def measure_demo(name: str, seed: int, folder: str) -> dict[str, Any]:
    """Train one adapter with the settings of train.py. Return the exact match of each group of image_test/, and the seconds.

    The CPU seconds count this process only, so other programs on the machine change them less than the seconds.
    """
    started, cpu = time.perf_counter(), time.process_time()
    _, path = trained(name, folder, seed=seed)
    times = {"seconds": time.perf_counter() - started, "CPU seconds": time.process_time() - cpu}
    references = [json.loads(line) for line in (TEST / "annotations.jsonl").read_text(encoding="utf-8").splitlines()]
    predictions = Captioner.from_adapter(path, device="cpu")([TEST / line["image"] for line in references])
    right: dict[str, list[bool]] = {}
    for line, prediction in zip(references, predictions, strict=True):
        right.setdefault(line["group"], []).append(prediction.text == line["text"])
    return {"variant": name, "seed": seed, **{group: sum(hits) / len(hits) for group, hits in right.items()}, **times}


def trained(name: str, folder: str, **settings: Any) -> tuple[list[dict[str, Any]], Path]:
    """Train one adapter on the demo's cubes. Return the lines of its metrics, and its file."""
    given = {"num_workers": 0, "resume": "off", "device": "cpu", **VARIANTS[name], **settings}
    path = train(TrainConfig(annotations="annotations.jsonl", output_dir=folder, **given))
    return [json.loads(line) for line in (path.parent / METRICS_NAME).read_text(encoding="utf-8").splitlines()], path


def main() -> None:
    steps, *seeds = map(int, sys.argv[1:] or ("200", "0", "1", "2"))
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for name in VARIANTS:
                place = str(Path(folder) / f"{name}_{seed}")
                result = measure(name, seed, steps, place) if steps else measure_demo(name, seed, place)
                print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    report_errors(main)
