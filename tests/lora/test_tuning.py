"""`lora-blip tune`: the limits follow from the measured ratios, and the row is stored for later runs."""

from dataclasses import replace

import pytest
import torch

from lora_blip.kernels import paths
from lora_blip.kernels.linear import FrozenProduct, has_kernel
from lora_blip.lora import tuning
from lora_blip.lora.tune_command import NoSettings, tune
from tests.kernels.test_paths import ROW


@pytest.mark.parametrize(
    ("wins", "expected"),
    [
        ((True, True, True), 4), ((False, True, True), 8), ((False, False, True), 32), ((True, False, True), 32),
        ((False, False, False), paths.NEVER), ((True, True, False), paths.NEVER),
    ],
)  # fmt: skip
def test_the_limit_lies_between_the_largest_loss_and_the_smallest_gain(wins, expected, monkeypatch):
    monkeypatch.setattr(tuning, "ratio", lambda fast, _other: fast)
    seen: list[tuple[str, int, float]] = []
    ratios = [0.5 if win else 1.5 for win in wins]
    comparisons = [tuning.PathPair(size, each, None) for size, each in zip((4, 16, 64), ratios, strict=True)]
    assert tuning.limit("a path", comparisons[::-1], lambda *each: seen.append(each)) == expected
    assert seen == [("a path", size, each) for size, each in zip((4, 16, 64), ratios, strict=True)]


def test_both_sides_of_each_comparison_compute_the_same(monkeypatch):
    """The two products and attentions are equal up to rounding, so only their speed differs."""
    product = tuning.product_paths(5, 16, 8)
    torch.testing.assert_close(product.fast(), product.other(), rtol=1e-5, atol=1e-5)
    results: list[tuple[torch.Tensor, ...]] = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: results.append(real(*given)))
    pairs = [
        (tuning.frozen_paths(20, 32, 24), 1e-5),
        (tuning.attention_paths(1, 2, 9), 5e-2),
        (tuning.by_heads_paths(1, 2, 9), 5e-2),
    ]
    for pair, bound in pairs:
        results.clear()
        pair.fast(), pair.other()
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def test_the_two_sides_of_a_frozen_linear_take_the_two_paths(monkeypatch):
    """Only the fast side calls `FrozenProduct`, whose Python code is a part of its time."""
    taken: list[torch.Size] = []
    apply = FrozenProduct.apply
    monkeypatch.setattr(FrozenProduct, "apply", lambda x, *given: taken.append(x.shape) or apply(x, *given))
    pair = tuning.frozen_paths(20, 32, 24)
    pair.other()
    assert not taken
    pair.fast()
    assert taken == ([torch.Size((20, 32))] if has_kernel() else [])


def test_tune_stores_the_row_beside_those_of_other_machines_and_changes_no_running_process(tmp_path, monkeypatch, capsys):
    """The time of a comparison is shortened. The new file is used by `measured`."""
    file = tmp_path / "folder" / "paths.json"
    monkeypatch.setattr(paths, "tuned_file", lambda: file)
    monkeypatch.setattr(tuning, "PRODUCTS", ((8, 16, 16),))
    for name in ("NARROW_PRODUCTS", "LINEARS"):
        monkeypatch.setattr(tuning, name, ((8, 16),))
    monkeypatch.setattr(tuning, "ATTENTIONS", ((1, 2, 9),))
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "TURN", 0.0)
    before = paths.row()
    file.parent.mkdir()
    file.write_bytes(paths.table(replace(ROW, processor="another machine")))
    tune(NoSettings())
    assert paths.row() == before and set(paths.read(file)) == {"another machine", paths.processor()}
    assert paths.measured.__wrapped__() == paths.read(file)[paths.processor()]
    assert "fast paths by the limits of" in capsys.readouterr().out
