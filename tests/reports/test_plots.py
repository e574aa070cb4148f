"""Test loss.png: smoothed training loss, logged values behind it, and labels of the axes."""

import json
from pathlib import Path

import pytest

from lora_blip.reports import plots

figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")


@pytest.mark.plots
@pytest.mark.parametrize(("steps", "is_smoothed"), [(10, False), (200, True)])
def test_a_long_curve_is_smoothed_with_the_logged_values_behind(tmp_path: Path, monkeypatch, steps: int, is_smoothed: bool):
    """Smoothing keeps the mean of a noisy curve and reduces its noise. The axes and the validation score have labels."""
    losses = [2.0 + (-1) ** n * 0.5 for n in range(steps)]
    lines = [{"step": n + 1, "loss": loss} for n, loss in enumerate(losses)]
    lines += [{"step": n, "val_loss": 2.0, "val_vqa_accuracy": 0.5} for n in (0, steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    plots.draw(tmp_path)
    upper, lower = drawn[0].axes
    curves = {line.get_label(): list(line.get_ydata()) for line in upper.get_lines()}
    names = ["training, each logged step", "training, smoothed"] if is_smoothed else ["training"]
    assert list(curves) == [*names, "validation"] and curves[names[0]] == losses
    if is_smoothed:
        assert all(1.8 < value < 2.2 for value in curves[names[1]][5:-5])
    assert upper.get_ylabel() == "loss, log scale" and lower.get_ylabel() == "validation:\nVQA accuracy"
    assert lower.get_xlabel() == "optimizer step"


def test_smoothing_keeps_a_line_that_is_straight_on_the_axis() -> None:
    """This also holds at both ends: the steep fall at the start is not moved. Curves with values ≤ 0 are not changed."""
    line = [2.0**-n for n in range(100)]
    assert plots.smoothed(line) == pytest.approx(line)
    assert [len(plots.smoothed(line[:n])) for n in range(4)] == [0, 1, 2, 3]
    assert plots.smoothed([1.0, 0.0, 3.0]) == [1.0, 0.0, 3.0]
