"""Products of the oneDNN kernel equal those of PyTorch within float32 rounding. Without the kernel, PyTorch computes them."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_blip.doctor import precisions
from lora_blip.kernels import linear as products
from lora_blip.kernels import paths, switch
from lora_blip.kernels.linear import FrozenProduct, QuickLinear, has_kernel, product


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Use the kernel for small products too."""
    monkeypatch.setattr(paths.Current, "row", replace(paths.row(), onednn=0, onednn_narrow=0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,), (2, 3, 4)])
def test_a_product_equals_that_in_float64(shape, transposed):
    """The error is at most 1e-6 of the largest value, for any number of rows, also zero, and for a transposed weight."""
    torch.manual_seed(0)
    x, bias = torch.randn(*shape, 33), torch.randn(17)
    weight = torch.randn(33, 17).t() if transposed else torch.randn(17, 33)
    truth = x.double() @ weight.double().t() + bias.double()
    actual = product(x, weight, bias)
    assert actual.shape == truth.shape and actual.dtype == torch.float32
    assert ((actual - truth).abs() <= 1e-6 * truth.abs().max()).all() if x.numel() else True


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 5).requires_grad_(False)


def test_the_gradient_of_the_input_of_a_frozen_linear_is_correct():
    """It equals finite differences in float64, and that of autograd in float32 within 1e-6."""
    plain = linear()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: FrozenProduct.apply(x, plain.weight.double(), plain.bias.double()), (x,))
    results = []
    for on in (False, True):
        model = nn.Sequential(copy.deepcopy(plain))
        switch.fast(model, on)
        assert (type(model[0]) is QuickLinear) is on
        y = torch.ones(2, 6).requires_grad_()
        model(y).square().sum().backward()
        results.append([model(y).detach(), y.grad])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_trainable_weight_gets_a_gradient():
    """A linear with a trainable weight uses the forward of PyTorch."""
    model = nn.Sequential(nn.Linear(6, 5))
    switch.fast(model)
    model(torch.randn(2, 6)).sum().backward()
    assert model[0].weight.grad is not None and model[0].bias.grad is not None


def test_a_trainable_bias_with_a_frozen_weight_gets_a_gradient():
    model = nn.Sequential(linear())
    model[0].bias.requires_grad_()
    switch.fast(model)
    model(torch.randn(2, 6)).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.full((5,), 2.0))


def test_other_derivatives_equal_those_of_pytorch():
    """Forward mode, torch.func transforms and second derivatives are equal with and without QuickLinear."""
    x, tangent = torch.randn(3, 6), torch.randn(3, 6)
    derivatives = []
    for on in (False, True):
        model = nn.Sequential(linear(), nn.Tanh(), linear_back())
        switch.fast(model, on)
        forward = torch.func.jvp(model, (x,), (tangent,))
        each = torch.func.vmap(torch.func.grad(lambda row, model=model: model(row).sum()))(x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        derivatives.append([*forward, each, first.detach(), second])
    for one, other in zip(*derivatives, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def linear_back() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(5, 6).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_use_pytorch(dtype, monkeypatch):
    """The kernel is used only in float32, so the outputs equal those of PyTorch bit for bit."""
    plain, x = linear(), torch.randn(4, 6)
    monkeypatch.setattr(products, "product", lambda *_: pytest.fail("the kernel was used"))
    model = nn.Sequential(copy.deepcopy(plain))
    switch.fast(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


def test_without_the_kernel_pytorch_computes_the_product(monkeypatch):
    monkeypatch.setattr(products, "has_kernel", lambda: False)
    plain, x = linear(), torch.randn(4, 6)
    model = nn.Sequential(copy.deepcopy(plain))
    switch.fast(model)
    assert torch.equal(product(x, plain.weight, plain.bias), plain(x)) and torch.equal(model(x), plain(x))


def test_a_wrong_or_missing_kernel_is_not_used(monkeypatch):
    """The private operator of PyTorch is checked on an example first, because it may change."""

    class Gone:
        @staticmethod
        def _linear_pointwise(*_: object) -> torch.Tensor:
            raise RuntimeError("no such operator")

    class Wrong:
        @staticmethod
        def _linear_pointwise(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
            return x @ weight.t()  # the bias is missing

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for other in (Gone, Wrong):
        monkeypatch.setattr(torch.ops, "mkldnn", other)
        has_kernel.cache_clear()
        assert not has_kernel()
    monkeypatch.undo()
    has_kernel.cache_clear()


@contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "another device": lambda: torch.device("meta"),
    "float64": float64,
}


@pytest.mark.parametrize("mode", MODES)
def test_the_probe_of_the_kernel_does_not_depend_on_the_mode_of_the_caller(mode, monkeypatch):
    """The probe runs in the first large product, which may be inside autocast. Its result is the same in every mode."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    has_kernel.cache_clear()
    expected = has_kernel()
    assert expected  # oneDNN is correct on every CPU
    has_kernel.cache_clear()
    with MODES[mode]():
        assert has_kernel() == expected
    monkeypatch.undo()
    has_kernel.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_the_doctor_reports_the_same_precisions_in_every_mode_of_the_caller(mode):
    expected = precisions(torch.device("cpu"))
    with MODES[mode]():
        assert precisions(torch.device("cpu")) == expected


def test_the_first_product_may_be_under_autocast(monkeypatch):
    """The first large product of a float32 linear under autocast probes the kernel on AVX-512, and its output is bf16."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    has_kernel.cache_clear()
    model = nn.Sequential(linear())
    switch.fast(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 6)).dtype == torch.bfloat16
    monkeypatch.undo()
    has_kernel.cache_clear()


def test_an_exported_graph_has_only_operators_of_pytorch(monkeypatch):
    """Another program, such as an ONNX runtime, does not know `lora_blip::product`."""
    monkeypatch.setattr(products, "LARGE", 0)
    exported = torch.export.export(nn.Sequential(QuickLinear(6, 5).requires_grad_(False)), (torch.randn(3, 6),))
    assert [str(node.target) for node in exported.graph.nodes if node.op == "call_function"] == ["aten.linear.default"]
