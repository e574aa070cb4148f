"""Products by oneDNN are PyTorch's own within float32's rounding, and where there is no such kernel, PyTorch's own."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lora_blip.doctor import precisions
from lora_blip.kernels import linear as products
from lora_blip.kernels import switch
from lora_blip.kernels.linear import FrozenProduct, QuickLinear, has_kernel, product


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """However small: the kernel is taken for small ones too."""
    monkeypatch.setattr(products, "LARGE", 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (2, 3), (0,), (2, 3, 4)])
def test_a_product_is_that_of_float64(shape, transposed):
    """Relative to the largest value within 1e-6, for any number of rows, none too, and for a view as weight."""
    torch.manual_seed(0)
    x, bias = torch.randn(*shape, 33), torch.randn(17)
    weight = torch.randn(33, 17).t() if transposed else torch.randn(17, 33)
    truth = x.double() @ weight.double().t() + bias.double()
    found = product(x, weight, bias)
    assert found.shape == truth.shape and found.dtype == torch.float32
    assert ((found - truth).abs() <= 1e-6 * truth.abs().max()).all() if x.numel() else True


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(6, 5).requires_grad_(False)


def test_a_frozen_linear_gives_its_input_a_gradient():
    """By finite differences in float64; in float32 as autograd's, to 1e-6."""
    plain = linear()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: FrozenProduct.apply(x, plain.weight.double(), plain.bias.double()), (x,))
    found = []
    for on in (False, True):
        model = nn.Sequential(copy.deepcopy(plain))
        switch.fast(model, on)
        assert (type(model[0]) is QuickLinear) is on
        y = torch.ones(2, 6).requires_grad_()
        model(y).square().sum().backward()
        found.append([model(y).detach(), y.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_weight_that_learns_still_does():
    """A linear whose weight is trained goes PyTorch's way, by which it gets its gradient."""
    model = nn.Sequential(nn.Linear(6, 5))
    switch.fast(model)
    model(torch.randn(2, 6)).sum().backward()
    assert model[0].weight.grad is not None and model[0].bias.grad is not None


def test_a_bias_that_learns_beside_a_frozen_weight_does_too():
    model = nn.Sequential(linear())
    model[0].bias.requires_grad_()
    switch.fast(model)
    model(torch.randn(2, 6)).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.full((5,), 2.0))


def test_derivatives_of_other_kinds_are_pytorch_s():
    """Forward mode, torch.func's transforms, and a gradient of a gradient: as without the class."""
    x, tangent = torch.randn(3, 6), torch.randn(3, 6)
    found = []
    for on in (False, True):
        model = nn.Sequential(linear(), nn.Tanh(), linear_back())
        switch.fast(model, on)
        forward = torch.func.jvp(model, (x,), (tangent,))
        each = torch.func.vmap(torch.func.grad(lambda row, model=model: model(row).sum()))(x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        found.append([*forward, each, first.detach(), second])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def linear_back() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(5, 6).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast_go_pytorch_s_way(dtype, monkeypatch):
    """To the bit: the kernel is for float32 alone."""
    plain, x = linear(), torch.randn(4, 6)
    monkeypatch.setattr(products, "product", lambda *_: pytest.fail("taken"))
    model = nn.Sequential(copy.deepcopy(plain))
    switch.fast(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


def test_without_the_kernel_it_is_pytorch_s_own(monkeypatch):
    monkeypatch.setattr(products, "has_kernel", lambda: False)
    plain, x = linear(), torch.randn(4, 6)
    model = nn.Sequential(copy.deepcopy(plain))
    switch.fast(model)
    assert torch.equal(product(x, plain.weight, plain.bias), plain(x)) and torch.equal(model(x), plain(x))


def test_a_wrong_or_missing_kernel_is_not_used(monkeypatch):
    """What is private in a library may change: it is tried on numbers first."""

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
def test_the_probe_says_the_same_in_every_mode_of_its_caller(mode, monkeypatch):
    """It runs in the first product that is large enough, which may be in an autocast block: it computes outside of it."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    has_kernel.cache_clear()
    expected = has_kernel()
    assert expected  # oneDNN computes it right on every CPU
    has_kernel.cache_clear()
    with MODES[mode]():
        assert has_kernel() == expected
    monkeypatch.undo()
    has_kernel.cache_clear()


@pytest.mark.parametrize("mode", MODES)
def test_the_doctor_says_the_same_in_every_mode_of_its_caller(mode):
    expected = precisions(torch.device("cpu"))
    with MODES[mode]():
        assert precisions(torch.device("cpu")) == expected


def test_training_in_bf16_over_float32_weights_probes_the_kernel(monkeypatch):
    """A linear's first large product under autocast is on a CPU with AVX-512 where the kernel is tried."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(products, "LARGE", 1)
    has_kernel.cache_clear()
    model = nn.Sequential(linear())
    switch.fast(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 6)).dtype == torch.bfloat16
    monkeypatch.undo()
    has_kernel.cache_clear()
