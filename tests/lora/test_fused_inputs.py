"""Conditions for the use of the fused update, tested one at a time, and the tensors that it reads and saves."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules

from lora_blip.kernels import paths
from lora_blip.kernels.linear import GELU_INPUT
from lora_blip.lora import attached, fused
from lora_blip.lora.sites import Site
from tests.support.networks import gradients, network, used

GLOBAL = {
    "pre-hook": lambda linear: modules.register_module_forward_pre_hook(
        lambda each, args: (2 * args[0],) if each is linear else None
    ),
    "hook": lambda linear: modules.register_module_forward_hook(lambda each, _args, y: 2 * y if each is linear else None),
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_the_fused_update_is_not_used_with_a_global_hook(kind, monkeypatch):
    """A hook on all modules may change inputs and outputs, so the plain update is used until the hook is removed."""
    fused_linears, x = used(monkeypatch), torch.randn(4, 6)
    model = network()
    handle = GLOBAL[kind](model[0])
    try:
        for one, other in zip(gradients(model, x, True), gradients(model, x, False), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert not fused_linears
    finally:
        handle.remove()
    gradients(model, x, True)
    assert len(fused_linears) == 2


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_of_gelu_is_saved_only_in_the_dtype_of_the_product(autocast, dtype, monkeypatch):
    """The gradient of A is that of the input of the linear, whatever the dtype of the input of GELU."""
    monkeypatch.setattr(paths.Current, "row", replace(paths.row(), gelu_bytes=0))
    model = network(sites=[Site("2", 4, 2.0)])
    linear = model[2]
    gradients = []
    for fast in (True, False):
        attached.fast(model, fast)
        gelu_input = torch.linspace(-3, 3, 48).reshape(4, 12).to(dtype)
        gelu_output = nn.functional.gelu(gelu_input.float()).requires_grad_()
        setattr(gelu_output, GELU_INPUT, gelu_input)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            linear(gelu_output).float().square().sum().backward()
        adapter = attached.adapters(model)["2"]
        gradients.append([gelu_output.grad, adapter.A.grad.clone(), adapter.B.grad.clone()])
        adapter.A.grad = adapter.B.grad = None
    for one, other in zip(*gradients, strict=True):
        bound = 3e-2 * float(other.abs().max()) if autocast else 1e-5
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


def test_the_frozen_product_records_no_graph(monkeypatch):
    """With the fused update, F.linear gets an input without a graph; with the plain update, one with a graph."""
    reads: list[bool] = []
    real = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: reads.append(x.requires_grad) or real(x, *rest))
    model = network(sites=[Site("2", 4, 2.0)])
    for fast in (True, False):
        reads.clear()
        attached.fast(model, fast)
        model[2](torch.randn(4, 12, requires_grad=True))
        assert reads[0] is not fast


def test_the_gradient_of_an_input_that_needs_none_is_not_computed(monkeypatch):
    """The backward pass computes one product less if the input requires no gradient."""
    products: list[int] = []
    model = network(sites=[Site("2", 4, 2.0)])
    outputs = [model[2](torch.randn(4, 12, requires_grad=needed)) for needed in (True, False)]
    real = fused.product
    monkeypatch.setattr(fused, "product", lambda *args: products.append(1) or real(*args))
    counts = []
    for output in outputs:
        products.clear()
        output.sum().backward()
        counts.append(len(products))
    assert counts[0] == counts[1] + 1


def test_adapters_are_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = network(torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert {half.dtype for x in attached.adapters(model).values() for half in (x.A, x.B)} == {torch.float32}
