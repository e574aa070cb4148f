"""Networks of a few linears."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from lora_blip.lora import attached, fused, injection
from lora_blip.lora.sites import Site


def line(*names: str) -> nn.Sequential:
    """One linear with an adapter of each name, whose update is large."""
    model = nn.Sequential(nn.Linear(4, 3))
    for name in names:
        injection.inject(model, [Site("0", r=2)], name=name)["0"].B.data.normal_()
    return model


def plus(model: nn.Sequential, x: torch.Tensor, *names: str) -> torch.Tensor:
    """W x + b + Σ ΔW x written out."""
    delta = sum((attached.adapters(model, name)["0"].delta_weight() for name in names), torch.zeros_like(model[0].weight))
    return x @ (model[0].weight + delta).T + model[0].bias


QV = [Site("0", 2, 8.0, "q", (0, 4)), Site("0", 3, 4.0, "v", (8, 12)), Site("2", 4, 2.0)]


def network(dtype: torch.dtype = torch.float32, sites: list[Site] | None = None, dropout: float = 0.0) -> nn.Sequential:
    """A fused qkv with two blocks of its rows adapted, and a whole linear behind it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5)).to(dtype)
    for x in injection.inject(model, sites or QV, dropout).values():
        x.B.data.normal_()
    return model


def gradients(model: nn.Module, x: torch.Tensor, fast: bool, context=nullcontext) -> list[torch.Tensor]:
    """The output, and the gradients of x and of every half."""
    attached.fast(model, fast)
    x = x.clone().requires_grad_()
    with context():
        y = model(x)
    y.float().square().sum().backward()
    halves = [p.grad for p in model.parameters() if p.requires_grad]
    for p in model.parameters():
        p.grad = None
    return [y.detach(), x.grad, *halves]


def assert_as_exact(
    values: list[torch.Tensor], plain: list[torch.Tensor], truth: list[torch.Tensor], bound: float | None
) -> None:
    """Compare with float64. The relative error is at most `bound`; None: twice that of the plain update plus 1e-3."""
    for one, other, true in zip(values, plain, truth, strict=True):
        assert one.dtype == other.dtype
        error, plain_error = ((value.double() - true).abs().max() / true.abs().max() for value in (one, other))
        assert error <= (2 * plain_error + 1e-3 if bound is None else bound)


def used(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The linears that take the fast way, as they do."""
    taken: list[nn.Module] = []
    updated = fused.updated
    monkeypatch.setattr(fused, "updated", lambda linear, output: taken.append(linear) or updated(linear, output))
    return taken
