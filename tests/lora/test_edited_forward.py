"""An edit of `forward` in layer.py acts in every path: the fused update steps aside, and a merge is refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.kernels import paths
from lora_blip.lora import attached, injection
from lora_blip.lora.fused import is_product
from lora_blip.lora.layer import LoRA
from lora_blip.lora.mergeable import adds_delta
from lora_blip.lora.sites import Site
from lora_blip.lora.variants import CLASSES, RsLoRA

ORIGINAL = LoRA.forward


def written_out(lora: LoRA, x: Tensor) -> Tensor:
    """Return the same update as the original `forward`, in other words."""
    return F.pad((lora.scale * x.to(lora.A.dtype)) @ (lora.B @ lora.A).T, lora.padding)


def with_relu(lora: LoRA, x: Tensor) -> Tensor:
    return F.pad(F.linear(F.linear(x.to(lora.A.dtype), lora.A).relu(), lora.B) * lora.scale, lora.padding)


EDITS: dict[str, Callable[[LoRA, Tensor], Tensor]] = {
    "twice the update": lambda lora, x: 2 * ORIGINAL(lora, x),
    "another scale": lambda lora, x: ORIGINAL(lora, x) / lora.scale,
    "a ReLU": with_relu,
    "a limit of large values": lambda lora, x: ORIGINAL(lora, x).clamp(-100, 100),
    "no gradient of A": lambda lora, x: F.pad(F.linear(F.linear(x, lora.A.detach()), lora.B) * lora.scale, lora.padding),
    "noise in training": lambda lora, x: ORIGINAL(lora, x) * (1 + 0.1 * torch.rand(()) * lora.training),
    "a constant": lambda lora, x: ORIGINAL(lora, x) + 1.0,
    "the sign of x": lambda lora, x: ORIGINAL(lora, x.abs()),
}


def test_the_classes_of_lora_compute_the_product_and_dora_does_not(monkeypatch):
    assert {name: is_product(kind) for name, kind in CLASSES.items()} == {"lora": True, "rslora": True, "dora": False}
    monkeypatch.setattr(LoRA, "forward", written_out)
    assert is_product(LoRA) and is_product(RsLoRA)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_forward_is_not_the_product(edit, monkeypatch):
    monkeypatch.setattr(LoRA, "forward", EDITS[edit])
    assert not is_product(LoRA) and not is_product(RsLoRA)


def test_a_class_with_another_parameter_or_an_error_is_not_the_product():
    class Gated(LoRA):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.gate = nn.Parameter(torch.ones(1))

    class Broken(LoRA):
        def forward(self, x: Tensor) -> Tensor:
            return x.no_such_name

    assert not is_product(Gated) and not is_product(Broken)


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),  # as torch.set_default_device("cuda") does
    ],
)
def test_the_comparison_depends_on_no_mode_and_draws_no_random_number(mode, monkeypatch):
    linear = nn.Linear(6, 9)
    injection.inject(nn.Sequential(linear), [Site("0", 2, 3.0)])
    nn.init.normal_(linear.lora["default"].B)
    monkeypatch.setattr(LoRA, "forward", lambda lora, x: written_out(lora, x) * 1)  # a new function is compared again
    state = torch.get_rng_state()
    with mode():
        assert is_product(LoRA) and adds_delta(linear, "default")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("limit", [0, 10**9], ids=["fused", "short"])
@pytest.mark.parametrize("edit", [edit for edit in EDITS if edit != "noise in training"])
def test_an_edited_forward_is_trained_with_the_fast_path_on(edit, limit, monkeypatch):
    """Before, the fast path computed (alpha / r) · B A x, and an own training loop ignored the edit without a message."""
    monkeypatch.setattr(LoRA, "forward", EDITS[edit])
    row = replace(paths.row(), fused=limit)
    monkeypatch.setattr(paths, "row", lambda: row)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))
    for lora in injection.inject(model, [Site("0", 2, 3.0), Site("2", 2, 3.0)]).values():
        nn.init.normal_(lora.B)
    plain, x = copy.deepcopy(model), 20 * torch.randn(5, 6)
    attached.fast(plain, False)
    attached.fast(model)
    outputs = model(x), plain(x)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for (_, one), (_, other) in zip(attached.every_adapter(model), attached.every_adapter(plain), strict=True):
        torch.testing.assert_close(one.B.grad, other.B.grad)
        torch.testing.assert_close(one.A.grad, other.A.grad)


@pytest.mark.parametrize("rows", [None, (0, 3), (2, 5), (100, 200)])
@pytest.mark.parametrize("edit", [None, *EDITS])
def test_an_edited_forward_differs_from_delta_weight(edit, rows, monkeypatch):
    linear = nn.Linear(6, 200)
    injection.inject(nn.Sequential(linear), [Site("0", 2, 3.0, "q" if rows else "", rows)])
    (key,) = linear.lora
    assert adds_delta(linear, key)  # B is zero
    nn.init.normal_(linear.lora[key].B)
    if edit:
        monkeypatch.setattr(LoRA, "forward", EDITS[edit])
    same = edit in (None, "no gradient of A", "noise in training")  # the noise is off in eval mode
    assert adds_delta(linear, key) is same
