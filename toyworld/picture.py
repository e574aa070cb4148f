"""Draw README's picture from a demo run: `python -m toyworld.picture lora_blip_output/demo_… assets/before_after.png`."""

import argparse
import random
from pathlib import Path
from textwrap import fill, wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_blip.cli import report_errors
from lora_blip.data.images import open_image
from lora_blip.metrics.exact import exact_match, normal
from toyworld.demo import REFERENCES, lines

SHOWN, COLUMNS, SEED = 6, 3, 0
SIZE, WIDTH = 12.5, 28  # of a text: points, so that it can be read on a telephone, and characters of a line
RIGHT, WRONG, QUIET = "#1b6e2c", "#b3261e", "#5c6066"


def draw(predictions: Path, references: Path, out: Path, seed: int = SEED) -> None:
    """Draw test images, each with the texts of the base and of the adapter: green if a text equals the reference, else red.

    The images are drawn at random, the same number from each group of the references, whether their texts are right or not.
    """
    texts = {Path(line["image"]).name: line for line in lines(predictions)}
    known = lines(references)
    groups = list(dict.fromkeys(line["group"] for line in known))
    chance = random.Random(seed)
    drawn = [
        line
        for group in groups
        for line in chance.sample([line for line in known if line["group"] == group], SHOWN // len(groups))
    ]
    figure = Figure(figsize=(9, 8.2))
    figure.subplots_adjust(0.01, 0.19, 0.99, 0.945, 0.02, 0.69)  # room for seven lines of text below each image
    for axes, line in zip(figure.subplots(SHOWN // COLUMNS, COLUMNS).flat, drawn, strict=True):
        axes.imshow(open_image(references.parent / line["image"]), interpolation="bicubic")
        axes.set_axis_off()
        prediction = texts[Path(line["image"]).name]
        below = 4.0  # points between the image and the text
        for name, key in (("base", "base_text"), ("LoRA", "text"), ("reference", "")):
            text = prediction[key] if key else line["text"]
            color = (RIGHT if normal(text) == normal(line["text"]) else WRONG) if key else QUIET
            text = f"{'✓ ' * (color == RIGHT)}{'✗ ' * (color == WRONG)}{name}: {text}"
            write(axes, below, text, color)
            below += 1.25 * SIZE * len(wrap(text, WIDTH))
    right = [[line["text"]] for line in known]
    base, adapted = (
        exact_match([texts[Path(line["image"]).name][key] for line in known], right) for key in ("base_text", "text")
    )
    figure.suptitle(
        f"{len(drawn)} of {len(known)} test images, drawn with seed {seed}. "
        f"Exact match on all: base {base:.1%}, LoRA {adapted:.1%}", fontsize=12,
    )  # fmt: skip
    figure.savefig(out, dpi=100)


def write(axes: Axes, below: float, text: str, color: str) -> None:
    """Write a text `below` points below the image."""
    text = fill(text, WIDTH)
    axes.annotate(text, (0.5, 0), (0, -below), "axes fraction", "offset points", color=color, size=SIZE, ha="center", va="top")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that `make demo` named")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(arguments.run / "captions" / "predictions.jsonl", REFERENCES, arguments.out)


if __name__ == "__main__":
    report_errors(main)
