"""Frozen linears with weights of 8 or 4 bits, as bitsandbytes stores them: y = x Wᵀ + b with the dequantized W.

    int8    W = q · scale / 127, one scale for each row                   Dettmers et al. 2022, arXiv:2208.07339
    nf4     W = code[q] · absmax, one absmax for 64 neighbours            Dettmers et al. 2023, arXiv:2305.14314

Each call dequantizes W, and the backward pass dequantizes it again, so that only q and its scales are kept.

The classes of bitsandbytes store the weights. Their `forward` is not used, for three reasons:

- In eval mode, int8 rounds the input too, so a prediction would depend on the other images of the batch.
- On a CPU with AVX512-BF16, nf4 packs the weights in eval mode and computes in bfloat16. A later training step then fails.
- On a CPU, 4 bits give wrong numbers if `in_features` is not a multiple of 64.
"""

from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lora_blip.kernels.linear import as_autocast, in_transform, product
from lora_blip.kernels.plain import is_plain

OPERATOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the operator that dequantizes 4 bits


def dequantized(linear: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return W of a linear of bitsandbytes, shape (out_features, in_features)."""
    if isinstance(linear.weight, bitsandbytes.nn.Int8Params):
        return (plain_data(linear.weight).float() * (int8_scale(linear) / 127)[:, None]).to(dtype)
    return dequantized_4bit(linear.weight, dtype)


def int8_scale(linear: Any) -> Tensor:
    """Return the largest absolute value of each row of W, shape (out_features,). bitsandbytes' own forward moves it."""
    scale: Tensor = linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB
    return scale


def dequantized_4bit(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return W of a weight in nf4 or fp4.

    The operator of bitsandbytes for the CPU needs rows that are whole blocks, so each block is given as one row.
    """
    state = weight.quant_state
    count, block = state.shape.numel(), state.blocksize
    if count % block or is_plain():
        return dequantized_plainly(weight).to(dtype)
    kind = dtype if dtype in OPERATOR_DTYPES else torch.float32
    blocks = (count // block, block)
    W: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        plain_data(weight), largest(state), block, state.quant_type, blocks, kind
    )
    return W.view(state.shape).to(dtype)


def dequantized_plainly(weight: Any) -> Tensor:
    """Return W of a weight in 4 bits by its formula, in float32: the plain path of `dequantized_4bit`."""
    state = weight.quant_state
    pairs = plain_data(weight).view(torch.uint8).flatten().int()
    q = torch.stack([pairs >> 4, pairs & 15], 1).flatten()[: state.shape.numel()]
    scales = largest(state).repeat_interleave(state.blocksize)[: len(q)]
    W: Tensor = (state.code.float()[q] * scales).view(state.shape)
    return W


def largest(state: Any) -> Tensor:
    """Return absmax, the largest absolute value of each block, (blocks,). It may itself be stored in 8 bits ("nested")."""
    absmax: Tensor = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    return absmax.float()


def plain_data(weight: Any) -> Tensor:
    """Return the stored values of a weight as a plain tensor."""
    data: Tensor = weight.detach().as_subclass(Tensor)
    return data


class FrozenQuantizedProduct(torch.autograd.Function):
    """x Wᵀ + b of a quantized linear, with a gradient for x only. There is no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Any) -> Tensor:
        ctx.linear = linear
        return quantized_product(x, linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(dy.device.type, enabled=False):  # the backward pass uses the dtype of the forward pass
            return multiply(dy, dequantized(ctx.linear, dy.dtype).t()), None


def quantized_product(x: Tensor, linear: Any) -> Tensor:
    """Return x Wᵀ + b, in the dtype of x."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return multiply(x, dequantized(linear, x.dtype), bias)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b, by PyTorch's own operator on the plain path."""
    return F.linear(x, weight, bias) if is_plain() else product(x, weight, bias)


def quantized_forward(linear: Any, x: Tensor) -> Tensor:
    """Return x Wᵀ + b in the dtype of x, or in that of autocast: what an nn.Linear with the dequantized weight returns."""
    x = as_autocast(x)
    trains_bias = torch.is_grad_enabled() and linear.bias is not None and linear.bias.requires_grad
    if not trains_bias and not (torch.is_grad_enabled() and x.requires_grad):
        return quantized_product(x, linear)
    if in_transform() or trains_bias:  # autograd records the product
        return F.linear(x, dequantized(linear, x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    y: Tensor = FrozenQuantizedProduct.apply(x, linear)
    return y


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """A linear with a weight of 8 bits, whose input is not rounded."""

    def forward(self, x: Tensor) -> Tensor:
        return quantized_forward(self, x)


class FourBitLinear(bitsandbytes.nn.Linear4bit):
    """A linear with a weight in nf4 or fp4."""

    def forward(self, x: Tensor) -> Tensor:
        return quantized_forward(self, x)


KINDS = {bitsandbytes.nn.Linear8bitLt: Int8Linear, bitsandbytes.nn.Linear4bit: FourBitLinear}
