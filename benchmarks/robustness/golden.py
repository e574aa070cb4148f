"""Record what the scripts produce, and compare two records.

`python -m benchmarks.robustness.golden record DIR`, and `python -m benchmarks.robustness.golden compare DIR DIR`.

A restructuring must not change results. `record` trains an adapter for each case through train.py, then runs infer.py and
`lora_blip evaluate` with it, and keeps the adapter's bytes, the metrics and the predictions, without times, dates and paths.
`compare` prints a line for each file and exits with 1 if one differs. Record both on one machine, with one version of torch.
`--scripts FOLDER` runs the scripts of another checkout, and `--adapters DIR` uses the adapters of another record.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lora_blip.cli import report_errors

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "caption": "--targets vit,text",
    "blip2": "--model assets/tiny-blip2 --targets vit,qformer,lm",
    "vqa": "--model assets/tiny-blip-vqa --annotations image_train/questions.jsonl --targets vit,text",
    "retrieval": "--model assets/tiny-blip-itm --annotations image_train/sentences.jsonl --targets vit,text",
    "plain": "--targets vit,text --no-fast --precision bf16",
}
TRAIN = "--max-steps 24 --batch-size 8 --accumulation 2 --val-fraction 0.1 --device cpu --seed 7 --num-workers 1"
REFERENCES = {"vqa": "image_test/questions.jsonl", "retrieval": "image_test/sentences.jsonl"}
CHANGING = re.compile(r"second|_dir\b|time|date|version|created|path|folder|images_per|_per_s|run\b|host|commit|peak|memory")


def run(scripts: Path, *command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(scripts), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=scripts, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def steady(value: Any) -> Any:
    """Return a JSON value without entries that differ between two equal runs."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if not CHANGING.search(key)}
    return [steady(each) for each in value] if isinstance(value, list) else value


def json_lines(path: Path) -> str:
    return "".join(json.dumps(steady(json.loads(line))) + "\n" for line in path.read_text(encoding="utf-8").splitlines())


def tensors(path: Path) -> str:
    """Return the SHA-256 of each tensor of an adapter file, and its metadata."""
    with safe_open(path, "pt") as file:
        lines = [f"{key} {hashlib.sha256(file.get_tensor(key).numpy().tobytes()).hexdigest()}" for key in sorted(file.keys())]
        metadata = {key: as_json(value) for key, value in (file.metadata() or {}).items()}
    return "\n".join(lines) + "\n" + json.dumps(steady(metadata), indent=1, sort_keys=True) + "\n"


def as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def record(folder: Path, scripts: Path, adapters: Path | None) -> None:
    for case, flags in CASES.items():
        print(f"{case}: training, predictions and evaluation, about a minute", flush=True)
        case_folder = folder / case
        case_folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            out, texts = Path(place), Path(place) / "texts.txt"
            texts.write_text("a red cube\na blue cube\nnothing\n", encoding="utf-8")
            run(scripts, "train.py", *TRAIN.split(), *flags.split(), "--output-dir", str(out / "run"))
            (trained,) = (out / "run").glob("*/adapter.safetensors")
            (case_folder / "adapter.txt").write_text(tensors(trained), encoding="utf-8")
            (case_folder / "metrics.jsonl").write_text(json_lines(trained.parent / "metrics.jsonl"), encoding="utf-8")
            shutil.copy(trained, case_folder / "adapter.safetensors")
            adapter = str((adapters or folder) / case / "adapter.safetensors")
            task = ["--texts", str(texts)] if case == "retrieval" else []
            task = ["--question", "what color is the cube?"] if case == "vqa" else task
            infer = ["infer.py", "--adapter", adapter, "--device", "cpu", "--compare", *task]
            run(scripts, *infer, "--output-dir", str(out / "predictions"))
            (case_folder / "predictions.jsonl").write_text(json_lines(out / "predictions/predictions.jsonl"), encoding="utf-8")
            references = REFERENCES.get(case, "image_test/annotations.jsonl")
            evaluate = ["-m", "lora_blip", "evaluate", "--adapter", adapter, "--references", references, "--device", "cpu"]
            run(scripts, *evaluate, "--output-dir", str(out / "evaluation"))
            for path in sorted((out / "evaluation").glob("*")):
                if path.suffix in (".json", ".jsonl"):
                    text = path.read_text(encoding="utf-8")
                    value = json_lines(path) if path.suffix == ".jsonl" else json.dumps(steady(json.loads(text)))
                    (case_folder / f"evaluation_{path.name}").write_text(value, encoding="utf-8")
                elif path.suffix == ".csv":
                    shutil.copy(path, case_folder / f"evaluation_{path.name}")


def compare(one: Path, other: Path) -> bool:
    """Print whether each file of two records is equal. Return False if one differs or is missing."""
    names = sorted({path.relative_to(root) for root in (one, other) for path in root.rglob("*") if path.is_file()})
    good = bool(names)
    for name in names:
        if name.suffix == ".safetensors":
            continue  # adapter.txt has its tensors
        existing = [root / name for root in (one, other) if (root / name).is_file()]
        equal = len(existing) == 2 and existing[0].read_bytes() == existing[1].read_bytes()
        good = good and equal
        print(f"{'equal' if equal else 'DIFFERS' if len(existing) == 2 else 'MISSING':8} {name}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--scripts", type=Path, default=ROOT)
    recording.add_argument("--adapters", type=Path, default=None)
    comparing = commands.add_parser("compare")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("other", type=Path)
    options = parser.parse_args()
    if options.command == "compare":
        raise SystemExit(0 if compare(options.one, options.other) else 1)
    record(options.folder.resolve(), options.scripts.resolve(), options.adapters and options.adapters.resolve())


if __name__ == "__main__":
    report_errors(main)
