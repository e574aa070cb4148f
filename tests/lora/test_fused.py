"""The fused update equals `layer.lora_hook` in values and gradients. It is not used if results could differ."""

import copy
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_blip.errors import LoRAError
from lora_blip.kernels import switch
from lora_blip.kernels.linear import PLAIN_LINEARS
from lora_blip.lora import attached, fused, injection, merging
from lora_blip.lora.fused import FrozenLinear
from lora_blip.lora.routing import use_adapters
from lora_blip.lora.sites import Site
from tests.support.models import WHOLE, batch_of, inject, twenty_steps
from tests.support.networks import assert_as_exact, gradients, network, used


def test_gradients_of_the_fused_update_equal_finite_differences():
    """`gradcheck` in float64 for x, A and B of two blocks of rows. The plain update agrees within 1e-12."""
    model = network(torch.float64)
    for x in attached.adapters(model).values():
        x.double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    halves = [half for lora_ in model[0].lora.values() for half in (lora_.A, lora_.B)]
    reach = [(4.0, slice(0, 4)), (4 / 3, slice(8, 12))]

    def run(x: torch.Tensor, *halves: torch.Tensor) -> torch.Tensor:
        cast = x.detach()
        output = nn.functional.linear(cast, model[0].weight, model[0].bias)
        return FrozenLinear.apply(x, cast, cast, output, model[0].weight, reach, *halves)

    assert torch.autograd.gradcheck(run, (x, *halves))
    for one, other in zip(gradients(model, x.detach(), True), gradients(model, x.detach(), False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_fused_update_equals_the_plain_update_in_every_precision(precision, monkeypatch):
    """In fp32 the error against float64 is at most 1e-6; in 16 bits it is at most twice that of the plain update plus 1e-3."""
    fused_linears = used(monkeypatch)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    context = (lambda: torch.autocast("cpu", dtype)) if dtype else nullcontext
    model, x = network(), torch.randn(4, 7, 6)
    exact = copy.deepcopy(model).double()
    truth = gradients(exact, x.double(), fast=False)
    assert not fused_linears
    fast, plain = (gradients(model, x, way, context) for way in (True, False))
    assert fused_linears == [model[0], model[2]]
    assert_as_exact(fast, plain, truth, None if dtype else 1e-6)


@pytest.mark.parametrize("kind", ["blip", "opt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vqa", "t5"))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_with_the_fused_update_equal_twenty_plain_steps(kind, precision, make):
    """The losses of 20 AdamW steps with every part adapted differ by at most 1e-5 in fp32 and 2 % in bf16."""
    from lora_blip.tasks.caption import CaptionTask
    from lora_blip.tasks.vqa import VqaTask
    from tests.support.questions import batch_of as questions_of

    losses = []
    for fast in (True, False):
        backbone = make(kind)
        adapters = inject(backbone, WHOLE[kind], trained=False)
        attached.fast(backbone.model, fast)
        task = VqaTask(backbone) if kind == "vqa" else CaptionTask(backbone)
        batch = questions_of(task) if kind == "vqa" else batch_of(task)
        losses.append(twenty_steps(adapters, lambda task=task, batch=batch: task.loss(batch) / batch.count, precision))
    assert losses[0][-1] < 0.97 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-2)


def test_the_fused_update_is_not_used_if_results_could_differ(monkeypatch):
    """The fused update is not used with dropout, adapters by row, merged or 16-bit weights, or without gradients."""
    fused_linears, x = used(monkeypatch), torch.randn(2, 6, requires_grad=True)
    model = network(dropout=0.5).train()
    model(x)
    assert not fused_linears
    model.eval()(x)
    assert len(fused_linears) == 2
    fused_linears.clear()
    model = network()
    with torch.no_grad():
        model(x)
    with use_adapters(model, ["default", None]):
        model(x)
    merged = network()
    merging.merge(merged)
    merged(x)
    half = network(torch.bfloat16)
    half(x.bfloat16())
    assert not fused_linears


HOOKS = {  # hooks of an adapter, which act only if the adapter is called
    "a hook": lambda lora: lora.register_forward_hook(lambda _module, _args, update: 2 * update),
    "a pre-hook": lambda lora: lora.register_forward_pre_hook(doubled),
    "a backward hook": lambda lora: lora.register_full_backward_hook(lambda _m, dx, _dy: (2 * dx[0],)),
    "a backward pre-hook": lambda lora: lora.register_full_backward_pre_hook(lambda _m, dy: (2 * dy[0],)),
    "a replaced forward": lambda lora: setattr(lora, "forward", lambda x: 2 * x @ lora.A.T @ lora.B.T),
}


@pytest.mark.parametrize("change", HOOKS)
def test_hooks_of_an_adapter_act_in_training(change, monkeypatch):
    """The first linear calls its adapter, also without the limit of small linears. The other linear uses the fused update."""
    fused_linears, model = used(monkeypatch), network(sites=[Site("0", 2, 8.0), Site("2", 2, 2.0)])
    x = torch.randn(4, 6)
    before = gradients(model, x, False)
    for lora in attached.adapters(model).values():
        if lora.site.module == "0":
            HOOKS[change](lora)
    fused_linears.clear()
    fused, plain = gradients(model, x, True), gradients(model, x, False)
    assert len(fused_linears) == 1
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert any(not torch.equal(one, other) for one, other in zip(before, plain, strict=True))


def doubled(_linear: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (2 * args[0],)


CHANGES = {  # changes of a linear that the fused update must respect
    "weight": lambda linear: linear.weight.requires_grad_(),
    "bias": lambda linear: linear.bias.requires_grad_(),
    "a pre-hook": lambda linear: linear.register_forward_pre_hook(doubled),
    "a hook": lambda linear: linear.register_forward_hook(lambda _m, _a, y: 2 * y),
    "a hook before": lambda linear: linear.register_forward_hook(lambda _m, _a, y: 2 * y, prepend=True),
    "a backward hook": lambda linear: linear.register_full_backward_hook(lambda _m, dx, _dy: (2 * dx[0],)),
    "a replaced forward": lambda linear: setattr(linear, "forward", lambda x: 2 * nn.functional.linear(x, linear.weight)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_linear_gives_the_results_of_the_plain_update(change):
    """With hooks or a trained base, outputs and gradients equal those of the plain update."""
    model, x = network(), torch.randn(4, 6)
    CHANGES[change](model[0])
    for one, other in zip(gradients(model, x, True), gradients(model, x, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_output_of_a_linear_may_be_changed_in_place(monkeypatch):
    """With an in-place ReLU after the linear, outputs and gradients equal those of the plain update."""
    fused_linears = used(monkeypatch)
    model, x = nn.Sequential(network(), nn.ReLU(inplace=True)), torch.randn(4, 6)
    for one, other in zip(gradients(model, x, True), gradients(model, x, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(fused_linears) == 2


def test_a_vector_without_a_batch_is_updated_too():
    model, x = network(), torch.randn(6)
    for one, other in zip(gradients(model, x, True), gradients(model, x, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_threads_may_share_a_model():
    """Each thread stores its own input between pre-hook and hook. Here both threads are between the hooks at the same time."""
    model, barrier = network(), threading.Barrier(2, timeout=20)
    inputs = torch.randn(2, 3, 6)
    alone = [model(x.requires_grad_()).detach() for x in inputs]
    real = model[0].forward
    model[0].__class__ = type("Meeting", (nn.Linear,), {"forward": lambda _self, x: (barrier.wait(), real(x))[1]})
    with patched_plain(type(model[0])), ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda x: model(x.requires_grad_()).detach(), inputs))
    assert all(map(torch.equal, outputs, alone))


@contextmanager
def patched_plain(kind: type[nn.Linear]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "PLAIN_LINEARS", (*PLAIN_LINEARS, kind))
        yield


def test_an_error_between_the_hooks_leaves_no_pending_input(monkeypatch):
    """After an error in a linear, its stored input does not change the next forward, and a copy does not contain it."""
    model = network()
    monkeypatch.setitem(model[0]._parameters, "bias", nn.Parameter(torch.zeros(7), requires_grad=False))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 6, requires_grad=True))
    assert model[0].lora.pending.x is not None
    assert copy.deepcopy(model[0].lora).pending.x is None
    torch.save(model, io.BytesIO())
    monkeypatch.undo()
    with torch.no_grad():
        x = torch.randn(2, 6)
        once = model(x)
        attached.fast(model, False)
        assert torch.equal(model(x), once)


def test_checkpointing_gives_the_same_bits(monkeypatch):
    """Outputs and gradients with non-reentrant activation checkpointing equal those without it, bit for bit."""
    fused_linears, model, x = used(monkeypatch), network(), torch.randn(3, 6)
    plain = gradients(model, x, fast=True)
    inside = nn.Sequential(model)
    inside.forward = lambda x: checkpoint(model, x, use_reentrant=False)  # type: ignore[method-assign]
    assert all(map(torch.equal, gradients(inside, x, fast=True), plain)) and len(fused_linears) == 6


def test_a_backward_pass_inside_autocast_equals_one_outside():
    """After a forward in fp32, the gradients are those in fp32, bit for bit."""
    model, results = network(), []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        y = model(x)
        with context:
            y.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad(set_to_none=True)
    assert len(results[0]) == 7 and all(map(torch.equal, *results))


def test_per_sample_gradients_by_torch_func_equal_separate_gradients():
    """vmap(grad) over the adapters gives the gradients of each sample alone."""
    model, x = network(), torch.randn(4, 6)
    halves = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(halves: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, halves, (row[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(halves, x)
    for number, row in enumerate(x):
        one = gradients(model, row[None], fast=True)[2:]
        for (name, each), other in zip(per_sample.items(), one, strict=True):
            torch.testing.assert_close(each[number], other, msg=name)


def test_an_activation_whose_input_a_hook_changes_is_not_recomputed(make):
    """A pre-hook halves the input of GELU. The gradient of A of fc2 is that of the real input of fc2."""
    backbone, results = make("blip"), []
    switch.fast(backbone.model)
    layer = backbone.model.vision_model.encoder.layers[0].mlp
    layer.activation_fn.register_forward_pre_hook(lambda _module, args: (args[0] / 2,))
    adapter = inject(backbone, "vit.mlp")["vision_model.encoder.layers.0.mlp.fc2"]
    for fast in (True, False):
        attached.fast(backbone.model, fast)
        layer(torch.linspace(-3, 3, 4 * layer.fc1.in_features).view(1, 4, -1)).square().sum().backward()
        results.append(adapter.A.grad)
        adapter.A.grad = None
    torch.testing.assert_close(*results)


def test_eject_removes_both_hooks():
    model = network()
    injection.eject(model)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.slow
def test_compiled_layers_train_like_eager_layers(monkeypatch):
    """torch.compile traces the plain hook without a graph break. Outputs and gradients agree within 1e-5."""
    fused_linears, model, x = used(monkeypatch), network(), torch.randn(3, 6)
    plain = gradients(model, x, fast=False)
    compiled = torch.compile(model, fullgraph=True)
    for one, other in zip(gradients(compiled, x, fast=True), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not fused_linears


def test_inject_into_a_compiled_model_is_refused():
    """`inject` raises LoRAError, because a compiled model silently ignores hooks that are added later."""
    whole, inner, by_forward = (nn.Sequential(nn.Linear(6, 12)) for _ in range(3))
    inner[0].compile()
    by_forward.forward = torch.compile(by_forward.forward)
    for compiled in (torch.compile(whole), inner, by_forward):
        path = "_orig_mod.0" if hasattr(compiled, "_orig_mod") else "0"
        with pytest.raises(LoRAError, match=r"torch\.compile"):
            injection.inject(compiled, [Site(path)])
    plain = nn.Sequential(nn.Linear(6, 12))
    plain.forward = torch.compiler.disable(plain.forward)  # type: ignore[method-assign]
    assert injection.inject(plain, [Site("0")])
