"""Draw times relative to another library as bars.

`python -m benchmarks.suite.bars` draws assets/speed.png from the first table of docs/performance.md, whose ranges cover several
machines. `python -m benchmarks.suite.bars RESULT.json` draws the rounds of one machine.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.suite.pairs import OURS
from lora_blip.cli import report_errors

BLUE, LIGHT, GREY, INK, FAINT = "#1f6feb", "#9cc4ff", "#c3c8cf", "#24292f", "#6e7781"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
PICTURE = PAGE.parent.parent / "assets" / "speed.png"
ROWS = ("BLIP base", "BLIP base, five captions per image", "tiny-blip")  # rows of the table that are drawn
LONGEST = 2.5  # a longer bar is cut here; its number is not
TITLES = {
    "step": "a step", "compiled": "a step, both compiled", "captions": "a step", "epoch": "an epoch", "cached": "",
    "generate": "20 tokens", "cubes": "", "merge": "",
}  # fmt: skip


class Bar(NamedTuple):
    """One bar. `ratio` has median, min and max."""

    label: str
    ratio: dict[str, float]
    ours: bool


def groups_of(result: dict[str, Any], rows: list[str], detail: str) -> dict[str, list[Bar]]:
    """Return the bars by title: all contestants of the step at `detail` ("base fp32"), then only ours of all other rows."""
    first = f"a training step, {detail}"
    bars_by_title: dict[str, list[Bar]] = {first: []}
    for cell in result["cells"]:
        if cell["row"] not in rows or cell["unit"] not in ("s", "s/image"):
            continue
        if (cell["row"], cell["setting"]) == ("step", detail):
            everyone = sorted(cell["ratios"].items(), key=lambda item: item[1]["median"])
            bars_by_title[first] = [Bar(name, ratio, name == OURS) for name, ratio in everyone]
            continue
        title = ", ".join(filter(None, (TITLES.get(cell["row"], cell["row"]), cell["setting"])))
        ours = [(name.removeprefix(OURS), ratio) for name, ratio in cell["ratios"].items() if name.startswith(OURS)]
        bars = bars_by_title.setdefault(f"{OURS}, where 1 is {cell['reference']}", [])
        bars.extend(Bar(title + end, ratio, True) for end, ratio in ours)
    return {title: bars for title, bars in bars_by_title.items() if bars}


def ranges_of(page: str) -> dict[str, tuple[float, float]]:
    """Return {"BLIP base, fp32": (0.62, 0.87), …}: the cells of ROWS in the first table of a page in Markdown."""
    lines = [line for line in page.split("\n\n|", 1)[1].split("\n\n", 1)[0].splitlines() if not line.startswith("|---")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    cells = {
        f"{name}, {column}": cell for name, *row in rows if name in ROWS for column, cell in zip(header[1:], row, strict=True)
    }
    numbers = {label: [float(number) for number in re.findall(r"[\d.]+", cell)] for label, cell in cells.items()}
    return {label: (min(each), max(each)) for label, each in numbers.items()}


def draw_ranges(ranges: dict[str, tuple[float, float]], out: Path) -> Path:
    """Draw a bar for each range: dark up to its lower end, light up to its upper end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.42 * len(ranges) + 0.9), dpi=160)
    for y, (low, high) in enumerate(ranges.values()):
        axes.barh(y, low, height=0.62, color=BLUE, zorder=2)
        axes.barh(y, high - low, left=low, height=0.62, color=LIGHT, zorder=2)
        number = f"{low:.2f}" + f"–{high:.2f}" * (low < high)
        place = 1 if 0.8 < high < 1 else high  # a number does not cross the line at 1
        axes.text(place + 0.025, y, number, va="center", fontsize=9, color=INK, zorder=5)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=3)
    axes.text(1, -0.72, "peft", ha="center", va="bottom", fontsize=9, color=INK)
    axes.set(xlim=(0, 1.5), ylim=(len(ranges) - 0.5, -0.7))
    axes.set_yticks(range(len(ranges)), list(ranges), fontsize=9, color=INK)
    style(axes, "time of a training step relative to peft with a manual loop; shorter is better\n"
          "dark: the lowest value on the three machines measured; light: up to the highest value")  # fmt: skip
    return save(figure, out)


def style(axes: Any, label: str) -> None:
    """Remove the frame, and set the label and the colours of the axes."""
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.set_xlabel(label, fontsize=8, color=FAINT)


def save(figure: Any, out: Path) -> Path:
    """Write a figure, and close it."""
    from matplotlib import pyplot as plt

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return out


def draw(result: dict[str, Any], rows: list[str], detail: str, out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups = groups_of(result, rows, detail)
    lines = sum(len(bars) + 1.5 for bars in groups.values())
    figure, axes = plt.subplots(figsize=(8, 0.25 * lines + 0.8), dpi=160)
    y, places, labels = 0.0, [], []
    for title, bars in groups.items():
        axes.text(-0.01, y, title, ha="right", va="center", fontsize=8.5, color=INK, weight="bold")
        for bar in bars:
            y += 1
            draw_bar(axes, y, bar)
            places.append(y)
            labels.append(bar.label)
        y += 1.5
    axes.axvline(1, color=INK, linewidth=0.9, zorder=3)
    axes.set(xlim=(0, LONGEST + 0.3), ylim=(y - 0.7, -0.8))
    axes.set_yticks(places, labels, fontsize=8, color=INK)
    where = f"{result['machine']['name']}, {result['machine']['threads']} threads, {result['date'].split()[0]}"
    style(axes, f"time, median and range of the rounds; shorter is better ({where})")
    return save(figure, out)


def draw_bar(axes: Any, y: float, bar: Bar) -> None:
    low, median, high = (min(bar.ratio[key], LONGEST) for key in ("min", "median", "max"))
    axes.barh(y, median, height=0.7, color=BLUE if bar.ours else GREY, zorder=2)
    if low < high:
        axes.plot([low, high], [y, y], color=INK, linewidth=0.9, zorder=4)
    cut = " …" * (bar.ratio["median"] > LONGEST)
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # a number may be on the line at 1
    number = f"{bar.ratio['median']:.2f}{cut}"
    axes.text(max(median, high) + 0.025, y, number, va="center", fontsize=8, color=INK, zorder=5, bbox=behind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "result", type=Path, nargs="?", help="a file of `python -m benchmarks`; default: draw the table of the docs"
    )
    parser.add_argument("--rows", default="step,captions,epoch,cached,merge,cubes", help="which of them, with commas")
    parser.add_argument("--detail", default="base fp32", help="the step of which every contestant is shown")
    parser.add_argument("--out", type=Path, help="default: assets/speed.png, or a .png beside the result")
    arguments = parser.parse_args()
    if arguments.result is None:
        print(draw_ranges(ranges_of(PAGE.read_text(encoding="utf-8")), arguments.out or PICTURE))
        return
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print(draw(result, arguments.rows.split(","), arguments.detail, arguments.out or arguments.result.with_suffix(".png")))


if __name__ == "__main__":
    report_errors(main)
