"""Train the demo's cubes with each variant of LoRA: exact match on held-out cubes, and seconds per step.

`python -m benchmarks.studies.variants [STEPS SEED …]` prints a line for each training. docs/variants.md has the table.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from lora_blip.cli import report_errors
from lora_blip.config import TrainConfig
from lora_blip.runtime.runs import METRICS_NAME
from lora_blip.training.loop import train

VARIANTS: dict[str, dict[str, Any]] = {  # name → settings; with LoRA+, the geometric mean of the two learning rates is LR
    "lora": {},
    "rslora": {"variant": "rslora"},
    "dora": {"variant": "dora"},
    "LoRA+": {"lr_ratio": 4.0, "lr": 1.5e-3},
}


def measure(name: str, seed: int, steps: int, folder: str) -> dict[str, Any]:
    """Train one adapter. Return the scores of the last validation, and the seconds per step without the validations."""
    config = TrainConfig(
        annotations="annotations.jsonl", max_steps=steps, validate_every=steps, val_fraction=0.2, seed=seed, num_workers=0,
        output_dir=folder, resume="off", device="cpu", checkpoint_seconds=1e9, **VARIANTS[name],
    )  # fmt: skip
    run = train(config).parent
    lines = [json.loads(line) for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    scores = next(line for line in reversed(lines) if "val_loss" in line)
    logged = [line for line in lines if "seconds" in line]
    seconds = (logged[-1]["seconds"] - logged[0]["seconds"]) / (logged[-1]["step"] - logged[0]["step"])
    return {"variant": name, "seed": seed, "exact": scores["val_exact_match"], "loss": scores["val_loss"], "s/step": seconds}


def main() -> None:
    steps, *seeds = map(int, sys.argv[1:] or ("200", "0", "1", "2"))
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for name in VARIANTS:
                result = measure(name, seed, steps, str(Path(folder) / f"{name}_{seed}"))
                print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    report_errors(main)
