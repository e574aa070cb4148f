"""Plot the metrics.jsonl of a run with matplotlib (extra: plots)."""

import json
import os
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from lora_blip.metrics.names import score_name
from lora_blip.runtime.runs import METRICS_NAME

FEW = 20  # with at most this number of logged steps, the loss is not smoothed
WINDOW = 20  # a smoothed value is the mean over 1 / WINDOW of the run


def draw(folder: Path) -> Path | None:
    """Draw loss.png: training and validation loss, and the validation scores below. Return None without matplotlib."""
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook may set a backend that is not installed; a file needs no backend
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    entries = [json.loads(line) for line in (folder / METRICS_NAME).read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(7, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps, losses = points(entries, "loss")
    is_smoothed = len(losses) > FEW
    if is_smoothed:
        upper.plot(steps, losses, color="C0", alpha=0.3, linewidth=0.8, label="training, each logged step")
    upper.plot(steps, smoothed(losses) if is_smoothed else losses, color="C0", label="training" + ", smoothed" * is_smoothed)
    upper.plot(*points(entries, "val_loss"), color="C1", marker="o", label="validation")
    upper.set(ylabel="loss, log scale", yscale="log")
    upper.set_title(folder.name, fontsize="medium")
    upper.legend()
    names = shares(entries)
    for key in names:
        lower.plot(*points(entries, key), marker="o", label=score_name(key.removeprefix("val_")))
    label = score_name(names[0].removeprefix("val_")) if len(names) == 1 else "score"
    lower.set(xlabel="optimizer step", ylabel=f"validation:\n{label}", ylim=(-0.05, 1.05), visible=bool(names))
    if len(names) > 1:
        lower.legend()
    if not names:
        upper.set_xlabel("optimizer step")
        upper.tick_params(labelbottom=True)
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def smoothed(values: list[float]) -> list[float]:
    """Return the geometric mean of each value and its neighbours, because the axis is logarithmic.

    The window is centred on the value, so it is shorter at both ends. Values that are not all positive stay as they are.
    """
    if not all(value > 0 for value in values):
        return values
    most, last = max(2, len(values) // (2 * WINDOW)), len(values) - 1
    halves = [min(most, at, last - at) for at in range(len(values))]
    return [geometric_mean(values[at - half : at + half + 1]) for at, half in enumerate(halves)]


def shares(entries: list[dict[str, Any]]) -> list[str]:
    """Return the names of the validation scores that are always between 0 and 1."""
    names = dict.fromkeys(key for entry in entries for key in entry if key.startswith("val_") and key != "val_loss")
    return [key for key in names if all(0 <= value <= 1 for value in points(entries, key)[1])]


def points(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values, without missing values."""
    present = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in present], [value for _, value in present]
