"""Pictures of a run, drawn from its metrics.jsonl with matplotlib (extra: plots)."""

import json
from pathlib import Path


def draw(folder: Path) -> Path | None:
    """loss.png: training and validation loss, exact match beneath; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    lower.set_visible(any("val_exact_match" in entry for entry in entries))
    for axes, key, label in ((upper, "loss", "training"), (upper, "val_loss", "validation"), (lower, "val_exact_match", "")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="o" if key != "loss" else "", label=label)
    upper.set(ylabel="loss per token", yscale="log", title=folder.name)
    upper.legend()
    lower.set(xlabel="optimizer step", ylabel="exact match", ylim=(-0.05, 1.05))
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
