"""What the lessons share: the seed, the pictures of cubes, short trainings, and where figures and numbers go.

Import it before lora_blip. It uses at most two threads, and no network.
"""

import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the folder that contains lora_blip/, assets/ and image_train/
SEED = int(os.environ.get("LESSON_SEED", "0"))
for name, value in {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|tqdm)\.")  # a learner cannot act on them

import matplotlib
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

import lora_blip
from lora_blip.kernels import paths

IN_NOTEBOOK = "ipykernel" in sys.modules
RUNS = tempfile.TemporaryDirectory(prefix="lora_blip_lesson_")
STYLE = {  # a figure of 5 inches is readable on a phone, and its white background on a dark page
    "figure.figsize": (5, 3.5), "figure.dpi": 150, "figure.constrained_layout.use": True, "figure.facecolor": "white",
    "font.size": 11, "axes.titlesize": 12, "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 2,
    "legend.frameon": False,
}  # fmt: skip
matplotlib.rcParams.update(STYLE)
if not IN_NOTEBOOK:
    matplotlib.use("agg")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or min(2, os.cpu_count() or 1))
torch.manual_seed(SEED)
paths.use(paths.nearest(paths.read(paths.TABLE), paths.processor()))  # limits of the package, and not of `lora-blip tune`


def always_fused() -> None:
    """Use the fused update for linears of each size. By default, small linears use a shorter one, which is faster there."""
    paths.use(replace(paths.row(), fused=0))


def lesson_name() -> str:
    """Return the name of the running lesson, such as "05_rank" or "05_rank_solution", or "notebook"."""
    path = Path("notebook" if IN_NOTEBOOK else getattr(sys.modules["__main__"], "__file__", "notebook"))
    return f"{path.stem}_solution" if path.parent.name == "solutions" else path.stem


def show(figure: Figure, name: str) -> None:
    """Display a figure in a notebook. In a script, write lessons/figures/<lesson>_<name>.png and print its path."""
    if IN_NOTEBOOK:
        from IPython.display import display

        display(figure)
    else:
        path = ROOT / "lessons" / "figures" / f"{lesson_name()}_{name}.png"
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        print(f"figure: {path.relative_to(ROOT)}")
    plt.close(figure)


def record(name: str, value: float) -> None:
    """Print a number that may depend on the seed. `make lessons-spread` collects it through the file LESSON_RECORD."""
    print(f"{name}: {value:.4g}")
    if file := os.environ.get("LESSON_RECORD"):
        line = {"lesson": lesson_name(), "seed": SEED, "name": name, "value": float(value)}
        with Path(file).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def cubes(count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Return the first `count` images of the training set (all 300 for None), as RGB of 96 × 96 pixels, and their captions."""
    return _read(ROOT / "annotations.jsonl", count)


def test_cubes(count: int | None = None) -> tuple[list[Image.Image], list[str]]:
    """Return the first `count` images of the test set (all 160 for None) and their captions. No adapter is trained on them."""
    return _read(ROOT / "image_test" / "annotations.jsonl", count)


def _read(annotations: Path, count: int | None) -> tuple[list[Image.Image], list[str]]:
    lines = [json.loads(line) for line in annotations.read_text(encoding="utf-8").splitlines()[:count]]
    return [Image.open(annotations.parent / line["image"]).convert("RGB") for line in lines], [line["text"] for line in lines]


def tokenize(backbone: Any, captions: list[str], length: int | None = None) -> Any:
    """Return input_ids, attention_mask and labels of captions, each (captions, tokens): the inputs of BLIP beside the image.

    They are those of a training with `lora_blip`. The first token is [DEC], with which BLIP's text decoder was trained; the
    tokenizer alone would write [CLS]. Padding, to the longest caption or to `length`, has the label -100: it is not in the loss.
    """
    padding = "max_length" if length else True
    tokens = backbone.tokenizer(captions, padding=padding, max_length=length, return_tensors="pt", return_token_type_ids=False)
    tokens.input_ids[:, 0] = backbone.tokenizer.bos_token_id  # [DEC]
    tokens["labels"] = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
    return tokens


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing inside the block. If it fails, print its output after all."""
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            yield
    except BaseException:
        print(output.getvalue())
        raise


def quick_train(**settings: Any) -> Path:
    """Train an adapter with these settings of TrainConfig and return the folder of the run, which is deleted at the end.

    The defaults are those of train.py, with three differences: the seed is SEED, the device is the CPU, and all images are
    for training (val_fraction = 0).
    """
    defaults = {
        "model": str(ROOT / "assets/tiny-blip"),
        "annotations": str(ROOT / "annotations.jsonl"),
        "seed": SEED,
        "device": "cpu",
        "val_fraction": 0.0,
    }
    fixed = {"output_dir": RUNS.name, "resume": "off", "checkpoint_seconds": 3600.0}
    with quiet():
        return lora_blip.train(lora_blip.TrainConfig(**{**defaults, **fixed, **settings})).parent


def exact_match(run: Path | None = None, model: Any = "assets/tiny-blip", count: int | None = None) -> float:
    """Return the share of the first `count` test images whose greedy caption is exactly right, from 0 to 1.

    run: a folder of `quick_train`, or None for the base alone. model: the base if `run` is None: a folder in ROOT, or a result
    of `lora_blip.load_backbone`. The adapters on a loaded base are active.
    """
    images, captions = test_cubes(count)
    base = "" if run else str(ROOT / model) if isinstance(model, str) else model
    with quiet():  # the first prediction on a machine prints a check of the fast path
        captioner = lora_blip.Captioner.from_adapter(run, base=base, device="cpu", precision="fp32")
        predictions = captioner(images, strict=True)
    return sum(prediction.text == caption for prediction, caption in zip(predictions, captions, strict=True)) / len(captions)
