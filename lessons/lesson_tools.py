"""Helpers of the lessons: paths, figures, results, the embedded images, and short trainings. Import this file first."""

import json
import os
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the repository
FIGURES = ROOT / "lessons/figures"
SEED = int(os.environ.get("LESSON_SEED", "0"))

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(ROOT))  # lora_blip, also if it is not installed
warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries; a learner cannot act on them

import matplotlib

if "ipykernel" not in sys.modules:
    matplotlib.use("Agg")

import torch
from matplotlib.figure import Figure
from PIL import Image

import lora_blip

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or min(2, os.cpu_count() or 1))
torch.manual_seed(SEED)


def lesson_name() -> str:
    """Return the name of the running lesson, such as "05_rank", or "notebook"."""
    path = Path(getattr(sys.modules["__main__"], "__file__", "notebook"))
    return "notebook" if "ipykernel" in sys.modules else path.stem


def show(figure: Figure, name: str) -> None:
    """Display the figure in a notebook. In a script, write lessons/figures/<lesson>_<name>.png and print its path."""
    if "ipykernel" in sys.modules:
        from IPython.display import display

        display(figure)
    else:
        FIGURES.mkdir(exist_ok=True)
        path = FIGURES / f"{lesson_name()}_{name}.png"
        figure.savefig(path, dpi=150, facecolor="white")
        print(f"picture: {path.relative_to(ROOT)}")
    import matplotlib.pyplot as plt

    plt.close(figure)


def record(name: str, value: float) -> None:
    """Print a result. If LESSON_RECORD is a path, also append it there as a JSON line: `make lessons-spread` reads it."""
    print(f"{name}: {value:.4g}")
    if path := os.environ.get("LESSON_RECORD"):
        line = {"lesson": lesson_name(), "seed": SEED, "name": name, "value": float(value)}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _examples(annotations: str, count: int | None) -> tuple[list[Image.Image], list[str]]:
    path = ROOT / annotations
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:count]
    return [Image.open(path.parent / line["image"]).convert("RGB") for line in lines], [line["text"] for line in lines]


def cubes(count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Return the first `count` of the 300 training images and their captions."""
    return _examples("annotations.jsonl", count)


def test_cubes(count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Return the first `count` of the 160 test images and their captions. In the last 60, the pairs of colours are new."""
    return _examples("image_test/annotations.jsonl", count)


def quick_train(**settings: Any) -> Path:
    """Train with `lora_blip.TrainConfig(**settings)` in a temporary folder, without output. Return the folder of the run.

    The default base is assets/tiny-blip, the data are the cubes, and nothing is held out.
    """
    folder = tempfile.mkdtemp(prefix="lora_blip_lesson_")
    defaults = {
        "model": str(ROOT / "assets/tiny-blip"), "annotations": str(ROOT / "annotations.jsonl"), "seed": SEED,
        "val_fraction": 0.0, "output_dir": folder, "resume": "off", "checkpoint_seconds": 3600.0, "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    output = StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            return lora_blip.train(lora_blip.TrainConfig(**(defaults | settings))).parent
    except BaseException:
        print(output.getvalue())
        raise


def exact_match(run: Path | None, model: str = "assets/tiny-blip", count: int | None = None) -> float:
    """Return the share of test images whose greedy caption equals the reference, with the adapter of a run or with the base."""
    images, references = test_cubes(count)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # the first prediction prints a check of the fast path
        captioner = lora_blip.Captioner.from_adapter(str(run) if run else None, base=str(ROOT / model) if run is None else None)
        predictions = captioner(list(images), strict=True)
    right = sum(prediction.text == text for prediction, text in zip(predictions, references, strict=True))
    return right / len(references)
