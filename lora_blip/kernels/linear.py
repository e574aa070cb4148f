"""Matrix products in float32 on a CPU, by the kernels that are fastest there.

PyTorch gives float32 to MKL, which on other makers' processors leaves half of AVX-512 unused; oneDNN, which comes with
PyTorch as well and does its convolutions and 16-bit products, does not. Both sum in float32, in another order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lora_blip.kernels.plain import is_plain

pass

PLAIN_TENSORS = (nn.Parameter, Tensor)  # and not a subclass, which may store or compute its values in another way
GELU_INPUT = "gelu_input"  # attribute of an activation: the input of its GELU, which autograd keeps anyway
LARGE = 2**20  # multiplications from which oneDNN's kernel, which takes longer to call, is the faster one


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, without a graph: x (…, in), weight (out, in), which may be a transposed view, bias (out,)."""
    if fits(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's kernel is the faster one for this product."""
    if x.numel() * weight.shape[0] < LARGE:  # asked first: most products of a small model are small
        return False
    return x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu and has_kernel()


@cache
def has_kernel() -> bool:
    """Whether oneDNN's kernel is here, computes what it should, and has AVX-512 to do it with."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        with as_at_start():
            x, weight = (torch.linspace(*ends, dtype=torch.float32, device="cpu") for ends in ((-1, 1, 35), (1, -2, 21)))
            x, weight, bias = x.view(5, 7), weight.view(7, 3), torch.ones(3, dtype=torch.float32, device="cpu")
            found = torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
            return torch.allclose(found, x @ weight + 1, rtol=1e-5, atol=1e-5)
    except Exception:  # a torch without it, or one in which nothing can be tried now
        return False


@contextmanager
def as_at_start() -> Iterator[None]:
    """Compute on the CPU as at the start of a program, whatever modes the caller is in: no autocast and no gradients."""
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
        yield


def as_autocast(x: Tensor) -> Tensor:
    """In autocast's dtype where it is on, as every linear would cast it; else x itself."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def frozen(linear: Any) -> bool:
    """Return True if W and b are plain tensors that are not trained. Others, such as torchao's, have their own products."""
    weight, bias = linear.weight, linear.bias
    if type(weight) not in PLAIN_TENSORS or weight.requires_grad:
        return False
    return bias is None or (type(bias) in PLAIN_TENSORS and not bias.requires_grad)


def alone(linear: Any, own: int = 0) -> bool:
    """Return True if W and b are frozen and the module has only `own` hooks of ours: the graph may leave its product out."""
    hooks = linear._forward_pre_hooks, linear._forward_hooks, _global_forward_pre_hooks, _global_forward_hooks
    others = linear._backward_hooks or linear._backward_pre_hooks or "forward" in vars(linear)
    return frozen(linear) and not others and tuple(map(len, hooks)) == (own, own, 0, 0)


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which look into every operation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class QuickLinear(nn.Linear):
    """nn.Linear over the same weight, by `product` where it is frozen."""

    WRITTEN_FOR = ("(self, input)",)

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not fits(input, self.weight) or is_plain() or not self.steady(input):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            return Through.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)

    def steady(self, x: Tensor) -> bool:
        """Whether W and b are frozen, and nothing but plain backward passes is asked for: no autocast, no torch.func."""
        other = transformed() or torch.is_autocast_enabled(x.device.type)
        return frozen(self) and not other


class Through(torch.autograd.Function):
    """x Wᵀ + b with a gradient for x alone, and gradients of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        through = Through.apply if torch.is_grad_enabled() else product  # a gradient of the gradient is rarely asked for
        return through(dy, weight.t()), None, None


PLAIN_LINEARS = (nn.Linear, QuickLinear)
