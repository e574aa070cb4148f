"""Plots of a run's metrics.jsonl with matplotlib (extra: plots)."""

import json
import os
from pathlib import Path
from typing import Any


def draw(folder: Path) -> Path | None:
    """Draw loss.png: training and validation loss, and the validation scores below. Return None without matplotlib."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook sets a backend that may not be installed; a file needs none
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for key, label, marker in (("loss", "training", ""), ("val_loss", "validation", "o")):
        upper.plot(*points(entries, key), marker=marker, label=label)
    upper.set(ylabel="loss", yscale="log", title=folder.name)
    upper.legend()
    names = shares(entries)
    for key in names:
        lower.plot(*points(entries, key), marker="o", label=key.removeprefix("val_").replace("_", " "))
    lower.set(xlabel="optimizer step", ylabel="validation", ylim=(-0.05, 1.05), visible=bool(names))
    if names:
        lower.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def shares(entries: list[dict[str, Any]]) -> list[str]:
    """Return the names of the validation scores that are always between 0 and 1."""
    names = dict.fromkeys(key for entry in entries for key in entry if key.startswith("val_") and key != "val_loss")
    return [key for key in names if all(0 <= value <= 1 for value in points(entries, key)[1])]


def points(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values, without missing values."""
    found = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]
