"""Plot the metrics.jsonl of a run with matplotlib (extra: plots)."""

import json
import os
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from lora_blip.metrics.names import score_name
from lora_blip.runtime.runs import METRICS_NAME

FEW = 20  # smooth the loss only if more steps are logged
WINDOW = 20  # a smoothed value is the mean over a fraction 1 / WINDOW of the run


def draw(folder: Path) -> Path | None:
    """Draw training loss, validation loss and validation scores into loss.png in `folder`, and return its path.

    Return None if matplotlib is not installed.
    """
    backend = os.environ.pop("MPLBACKEND", None)  # a notebook may set a backend that is not installed; loss.png needs none
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

    The window is centred on the value, so it is shorter at both ends. Return the values unchanged if one is not positive.
    """
    if not all(value > 0 for value in values):
        return values
    half_window, last = max(2, len(values) // (2 * WINDOW)), len(values) - 1
    halves = [min(half_window, at, last - at) for at in range(len(values))]
    return [geometric_mean(values[at - half : at + half + 1]) for at, half in enumerate(halves)]


def shares(entries: list[dict[str, Any]]) -> list[str]:
    """Return the names of the validation scores whose values are all between 0 and 1."""
    names = dict.fromkeys(key for entry in entries for key in entry if key.startswith("val_") and key != "val_loss")
    return [key for key in names if all(0 <= value <= 1 for value in points(entries, key)[1])]


def points(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a key, without missing values."""
    present = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
    return [step for step, _ in present], [value for _, value in present]
