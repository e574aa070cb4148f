"""Draw the bars of docs/performance.md, time relative to another library: `python -m benchmarks.suite.bars RESULT.json`."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.suite.pairs import OURS
from lora_blip.cli import report_errors

BLUE, GREY, INK, FAINT = "#1f6feb", "#c3c8cf", "#24292f", "#6e7781"
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
    """Return the bars by title: all contestants of the step at `detail` ("base fp32"), then our side of all others."""
    first = f"a training step, {detail}"
    found: dict[str, list[Bar]] = {first: []}
    for cell in result["cells"]:
        if cell["row"] not in rows or cell["unit"] not in ("s", "s/image"):
            continue
        if (cell["row"], cell["setting"]) == ("step", detail):
            everyone = sorted(cell["ratios"].items(), key=lambda item: item[1]["median"])
            found[first] = [Bar(name, ratio, name == OURS) for name, ratio in everyone]
            continue
        title = ", ".join(filter(None, (TITLES.get(cell["row"], cell["row"]), cell["setting"])))
        mine = [(name.removeprefix(OURS), ratio) for name, ratio in cell["ratios"].items() if name.startswith(OURS)]
        found.setdefault(f"{OURS}, where 1 is {cell['reference']}", []).extend(Bar(title + n, ratio, True) for n, ratio in mine)
    return {title: bars for title, bars in found.items() if bars}


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
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    where = f"{result['machine']['name']}, {result['machine']['threads']} threads, {result['date'].split()[0]}"
    axes.set_xlabel(f"time, median and range of the rounds; shorter is better ({where})", fontsize=8, color=FAINT)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight", facecolor="white")
    plt.close(figure)
    return out


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", default="step,captions,epoch,cached,merge,cubes", help="which of them, with commas")
    parser.add_argument("--detail", default="base fp32", help="the step of which every contestant is shown")
    parser.add_argument("--out", type=Path, default=Path("assets/speed.png"))
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text(encoding="utf-8"))
    print(draw(result, arguments.rows.split(","), arguments.detail, arguments.out))


if __name__ == "__main__":
    report_errors(main)
