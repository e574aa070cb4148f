"""Draw README's picture from a demo run: `python -m toyworld.picture lora_blip_output/demo_… assets/before_after.png`."""

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from lora_blip.data.images import open_image
from toyworld.demo import lines

SHOWN = ("000.png", "010.png", "016.png", "101.png", "110.png", "114.png")


def draw(predictions: Path, images: Path, out: Path) -> None:
    """Six test pictures, each with what the frozen base says of it and what it says with the adapter."""
    said = {Path(line["image"]).name: line for line in lines(predictions)}
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, SHOWN, strict=True):
        axes.imshow(open_image(images / name), interpolation="bicubic")
        axes.set_axis_off()
        line = said[name]
        axes.set_title(f"base: {line['base_text']}", fontsize=8.5, color="#b3261e", pad=16)
        axes.text(0.5, 1.02, f"LoRA: {line['text']}", fontsize=8.5, color="#1b6e2c", ha="center", transform=axes.transAxes)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder that `make demo` named")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(arguments.run / "captions" / "predictions.jsonl", Path("image_test"), arguments.out)
