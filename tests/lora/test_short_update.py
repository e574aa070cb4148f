"""The short update of small linears equals `layer.lora_hook`, with fewer operations. It is not used if results could differ."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from lora_blip.kernels import paths
from lora_blip.kernels.plain import plain
from lora_blip.lora import attached, fused, injection, merging
from lora_blip.lora.routing import checkpoint_context, use_adapters
from lora_blip.lora.sites import Site
from tests.support.models import WHOLE, batch_of, inject, twenty_steps
from tests.support.networks import assert_as_exact, gradients, network

WHOLES = [Site("0", 3, 8.0), Site("2", 4, 2.0)]


@pytest.fixture(autouse=True)
def _never_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every linear too small for the fused update."""
    monkeypatch.setattr(paths.Current, "row", replace(paths.row(), fused=paths.NEVER))


def shortened(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Return a list that gets each linear whose update is short."""
    taken: list[nn.Module] = []
    update = fused.short_update
    monkeypatch.setattr(fused, "short_update", lambda linear, x, y: taken.append(linear) or update(linear, x, y))
    return taken


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "fp16"])
def test_the_short_update_equals_the_plain_update_in_every_precision(precision, monkeypatch):
    """The error is at most 1e-12 in float64, 1e-6 in fp32, and in 16 bits twice that of the plain update plus 1e-3."""
    taken = shortened(monkeypatch)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    context = (lambda: torch.autocast("cpu", dtype)) if dtype else nullcontext
    model, x = network(sites=WHOLES), torch.randn(4, 7, 6)
    exact = copy.deepcopy(model).double()
    truth = gradients(exact, x.double(), fast=False)
    if precision == "fp64":
        model, x = exact, x.double()
    assert not taken
    fast, simple = (gradients(model, x, way, context) for way in (True, False))
    assert taken == [model[0], model[2]]
    assert_as_exact(fast, simple, truth, {"fp64": 1e-12, "fp32": 1e-6}.get(precision))


def test_second_derivatives_equal_finite_differences(monkeypatch):
    """`gradcheck` and `gradgradcheck` in float64, for x, A and B."""
    taken, model = shortened(monkeypatch), network(torch.float64, [Site("0", 2, 8.0)])[:1].double()
    lora = attached.adapters(model)["0"]
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        halves = {"0.lora.default.A": a, "0.lora.default.B": b}
        return torch.func.functional_call(model, halves, (x,)).square()

    assert torch.autograd.gradcheck(run, (x, lora.A, lora.B)) and torch.autograd.gradgradcheck(run, (x, lora.A, lora.B))
    assert taken


@pytest.mark.parametrize("kind", ["blip", "opt"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_with_the_short_update_equal_twenty_plain_steps(kind, precision, make, monkeypatch):
    """The losses of 20 AdamW steps with every part adapted differ by at most 1e-5 in fp32 and 2 % in bf16."""
    from lora_blip.tasks.caption import CaptionTask

    taken, losses = shortened(monkeypatch), []
    for fast in (True, False):
        backbone = make(kind)
        adapters = inject(backbone, WHOLE[kind], trained=False)
        attached.fast(backbone.model, fast)
        task = CaptionTask(backbone)
        batch = batch_of(task)
        losses.append(twenty_steps(adapters, lambda task=task, batch=batch: task.loss(batch) / batch.count, precision))
    assert taken and losses[0][-1] < 0.97 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-2)


def test_a_step_has_fewer_operations_than_with_the_plain_update():
    """A step of ten linears with the short update has at most 95 % of the operations of the plain update."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))
    injection.inject(model, [Site(str(number), 2, 4.0) for number in range(10)])
    counts = []
    for fast in (True, False):
        attached.fast(model, fast)
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            model(torch.randn(2, 3, 8)).sum().backward()
        counts.append(sum(event.count for event in recorded.key_averages() if event.key.startswith("aten::")))
    assert counts[0] <= 0.95 * counts[1]


def _second(model: nn.Module) -> None:
    injection.inject(model, WHOLES, name="second")


def _hooked(model: nn.Module) -> None:
    for lora in attached.adapters(model).values():
        lora.register_forward_hook(lambda _module, _args, update: 2 * update)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "blocks of rows": (
        lambda: network(sites=[Site("0", 2, 8.0, "q", (0, 4)), Site("2", 2, 2.0, "k", (1, 4))]),
        lambda _: None,
        lambda _: nullcontext(),
    ),
    "dropout": (lambda: network(sites=WHOLES, dropout=0.5).train(), lambda _: None, lambda _: nullcontext()),
    "two adapters": (lambda: network(sites=WHOLES), _second, lambda _: nullcontext()),
    "hooks of the adapters": (lambda: network(sites=WHOLES), _hooked, lambda _: nullcontext()),
    "merged": (lambda: network(sites=WHOLES), merging.merge, lambda _: nullcontext()),
    "off": (lambda: network(sites=WHOLES), lambda _: None, lambda _: nullcontext()),
    "adapters by row": (lambda: network(sites=WHOLES), lambda _: None, lambda model: use_adapters(model, ["default", None])),
    "the plain path": (lambda: network(sites=WHOLES), lambda _: None, lambda _: plain()),
    "16-bit weights": (lambda: network(torch.bfloat16, WHOLES), lambda _: None, lambda _: nullcontext()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_short_update_is_not_used_if_results_could_differ(case, monkeypatch):
    """In each case `lora_hook` runs, with the same bits as without the fast paths."""
    make, change, context = CASES[case]
    taken, model = shortened(monkeypatch), make()
    change(model)
    x = torch.randn(2, 3, 6, dtype=model[0].weight.dtype)
    outputs = []
    for fast in (case != "off", False):
        attached.fast(model, fast)
        torch.manual_seed(3)
        with context(model):
            outputs.append(model(x))
    assert not taken and torch.equal(*outputs)


@pytest.mark.parametrize("before", [False, True])
def test_checkpointed_layers_are_recomputed_by_the_short_update(before, monkeypatch):
    """Gradients with `checkpoint_context` equal those without it, bit for bit, also after a block of `use_adapters`."""
    taken, model, x = shortened(monkeypatch), network(sites=WHOLES), torch.randn(3, 6)
    if before:
        with use_adapters(model, ["default"] * 3):
            pass
    plain_gradients = gradients(model, x, fast=True)
    inside = nn.Sequential(model)
    context = partial(checkpoint_context, model)
    inside.forward = lambda x: checkpoint(model, x, use_reentrant=False, context_fn=context)  # type: ignore[method-assign]
    assert all(map(torch.equal, gradients(inside, x, fast=True), plain_gradients)) and len(taken) == 6


def test_without_gradients_and_for_a_vector_the_update_is_short_too(monkeypatch):
    """Inputs of one, two and four dimensions, and of no rows, have the shape and the values of the plain update."""
    taken, model = shortened(monkeypatch), network(sites=WHOLES).eval()
    for shape in ((6,), (5, 6), (2, 3, 1, 6), (0, 6)):
        x = torch.randn(shape)
        with torch.no_grad():
            attached.fast(model, True)
            fast = model(x)
            attached.fast(model, False)
            torch.testing.assert_close(fast, model(x), rtol=1e-5, atol=1e-5)
    assert len(taken) == 8


def test_a_float32_output_inside_autocast_stays_float32(monkeypatch):
    """A linear may turn autocast off. Then its update is added in float32, as by the plain update."""
    taken, model, x = shortened(monkeypatch), network(sites=WHOLES)[:1], torch.randn(3, 6)
    output = model[0].bias.expand(3, 12).clone()
    with torch.autocast("cpu", torch.bfloat16):
        results = [hook(model[0], (x,), {}, output) for hook in (fused.fused_hook, fused.lora_hook)]
    assert not taken and results[0].dtype == torch.float32 and torch.equal(*results)
