"""Draw README's picture from a demo run: `python -m toyworld.picture lora_blip_output/demo_… assets/before_after.png`."""

import argparse
import random
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_blip.data.images import open_image
from lora_blip.metrics.exact import exact_match, normal
from toyworld.demo import REFERENCES, lines

SHOWN, COLUMNS, SEED = 6, 3, 0
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
    figure = Figure(figsize=(8.6, 7.4))
    figure.subplots_adjust(left=0.04, right=0.96, top=0.94, bottom=0.13, hspace=0.42, wspace=0.35)
    for axes, line in zip(figure.subplots(SHOWN // COLUMNS, COLUMNS).flat, drawn, strict=True):
        axes.imshow(open_image(references.parent / line["image"]), interpolation="bicubic")
        axes.set_axis_off()
        made = texts[Path(line["image"]).name]
        for height, name, key in ((-0.05, "base", "base_text"), (-0.2, "LoRA", "text")):
            color = RIGHT if normal(made[key]) == normal(line["text"]) else WRONG
            write(axes, height, f"{'✓' if color == RIGHT else '✗'} {name}: {made[key]}", color)
        write(axes, -0.35, f"reference: {line['text']}", QUIET)
    right = [[line["text"]] for line in known]
    base, adapted = (
        exact_match([texts[Path(line["image"]).name][key] for line in known], right) for key in ("base_text", "text")
    )
    figure.suptitle(
        f"{len(drawn)} of {len(known)} test images, drawn with seed {seed}. "
        f"Exact match on all {len(known)}: frozen base {base:.1%}, with LoRA {adapted:.1%}", fontsize=10,
    )  # fmt: skip
    figure.savefig(out, dpi=110)


def write(axes: Axes, height: float, text: str, color: str) -> None:
    """Write a text of at most two lines below the image."""
    axes.text(0.5, height, fill(text, 42), fontsize=8, color=color, ha="center", va="top", transform=axes.transAxes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that `make demo` named")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(arguments.run / "captions" / "predictions.jsonl", REFERENCES, arguments.out)
