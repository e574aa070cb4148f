"""A linear with a weight of 8 or 4 bits equals an nn.Linear with the dequantized weight: outputs, gradients, every mode."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_blip.kernels.plain import plain
from lora_blip.lora import injection
from lora_blip.lora.sites import Site

bitsandbytes = pytest.importorskip("bitsandbytes", reason='bitsandbytes is not installed: pip install "lora_blip[quantized]"')
quantized = pytest.importorskip("lora_blip.kernels.quantized")

SHAPES = [(32, 32), (96, 48), (33, 64), (3, 5), (64, 7), (30, 100), (128, 128)]  # the middle of them are no whole blocks


def linear(kind: str, out_features: int = 48, in_features: int = 32, nested: bool = False) -> Any:
    """Return a frozen linear in int8, nf4 or fp4, with a bias."""
    torch.manual_seed(out_features + in_features)
    weight, bias = torch.randn(out_features, in_features), torch.randn(out_features)
    if kind == "int8":
        made = bitsandbytes.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False, threshold=6.0)
        made.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    else:
        made = bitsandbytes.nn.Linear4bit(in_features, out_features, quant_type=kind)
        made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=nested).to(
            "cpu"
        )
    made.bias = nn.Parameter(bias, requires_grad=False)
    made.__class__ = quantized.KINDS[type(made)]
    return made.requires_grad_(False)


def twin(kind: Any) -> nn.Linear:
    """Return an nn.Linear with the dequantized weight of a quantized one."""
    other = nn.Linear(kind.in_features, kind.out_features)
    other.weight.data, other.bias.data = quantized.dequantized(kind), kind.bias.data.clone()
    return other.requires_grad_(False)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_four_bits_are_dequantized_by_their_formula(kind, nested, shape):
    """W = code[q] · absmax of its block, in float64, also if the rows are no whole blocks. The plain path has the same bits."""
    made = linear(kind, *shape, nested)
    state, stored = made.weight.quant_state, made.weight.detach().numpy().astype(np.uint8).ravel()
    q = np.stack([stored >> 4, stored & 15], 1).ravel()[: shape[0] * shape[1]]
    absmax = state.absmax.double().numpy()
    if nested:
        inner = state.state2
        blocks = np.arange(len(absmax)) // inner.blocksize
        absmax = inner.code.double().numpy()[state.absmax.numpy()] * inner.absmax.double().numpy()[blocks]
        absmax = absmax + state.offset.double().item()
    truth = state.code.double().numpy()[q] * absmax[np.arange(len(q)) // state.blocksize]
    actual = quantized.dequantized(made)
    assert np.abs(actual.double().numpy().ravel() - truth).max() <= 1e-6 * np.abs(truth).max()
    with plain():
        assert torch.equal(quantized.dequantized(made), actual)


def test_eight_bits_are_dequantized_by_their_formula():
    """W = q · scale / 127. It differs from the weight by at most half a step of its row, and the rounding to fp16."""
    made = linear("int8")
    torch.manual_seed(48 + 32)
    weight = torch.randn(48, 32)
    truth = made.weight.detach().double() * quantized.int8_scale(made).double()[:, None] / 127
    assert (quantized.dequantized(made) - truth).abs().max() < 1e-6
    assert ((truth - weight).abs() <= 0.57 / 127 * weight.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_outputs_and_gradients_equal_those_of_the_dequantized_linear(kind, autocast):
    """They are equal within rounding, for x and for both halves of an adapter, in float32 and under autocast in bfloat16."""
    own = nn.Sequential(linear(kind))
    other = nn.Sequential(twin(own[0]))
    results = []
    for model in (own, other):
        torch.manual_seed(3)
        loras = injection.inject(model, [Site("0", 4, 8.0)])
        loras["0"].B.data.normal_()
        x = torch.randn(2, 5, 32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        (y.float() ** 2).sum().backward()
        results.append([y.float(), x.grad, loras["0"].A.grad, loras["0"].B.grad])
    bound = 2e-2 if autocast else 1e-5
    for one, expected in zip(*results, strict=True):
        assert (one - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("needs_dx", [False, True])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_trained_bias_of_a_quantized_linear_has_a_gradient(kind, needs_dx):
    own, results = linear(kind), []
    for each in (own, twin(own)):
        each.bias.requires_grad_()
        torch.manual_seed(3)
        x = torch.randn(2, 5, 32, requires_grad=needs_dx)
        (each(x) ** 2).sum().backward()
        results.append([each.bias.grad, *([x.grad] if needs_dx else [])])
    for one, expected in zip(*results, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_output_depends_neither_on_the_other_rows_nor_on_the_mode(kind):
    """An extreme input in another row changes nothing. Training after a prediction computes what it computed before."""
    made = linear(kind, 64, 128)
    x, extreme = torch.randn(1, 128), torch.zeros(1, 128)
    extreme[0, 3] = 50.0
    before = made.train()(x.requires_grad_())
    with torch.no_grad():
        together = made.eval()(torch.cat([x, extreme]))[:1]
    torch.testing.assert_close(together, before, rtol=0, atol=1e-5)
    after = made.train()(x)
    assert after.requires_grad and torch.equal(after, before)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_backward_pass_keeps_no_dequantized_weight(kind):
    """Autograd saves no tensor for x Wᵀ + b."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(kind)(torch.randn(3, 32).requires_grad_())
    assert saved == []


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_copy_computes_the_same_bits(kind):
    made, x = linear(kind), torch.randn(3, 32)
    assert torch.equal(copy.deepcopy(made)(x), made(x))
