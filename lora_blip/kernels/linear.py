"""Matrix products by the fastest kernel for float32 on a CPU.

PyTorch computes float32 products by MKL. On processors that are not from Intel, MKL uses only half of AVX-512. oneDNN uses all
of it; PyTorch calls oneDNN for convolutions and 16-bit products only. Both libraries sum in float32, in different orders.
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

from lora_blip.kernels import paths
from lora_blip.kernels.plain import is_plain

PLAIN_TENSORS = (nn.Parameter, Tensor)  # no subclasses: they may store or compute their values in another way
GELU_INPUT = "gelu_input"  # attribute of the output of a GELU: the input of the GELU, which autograd keeps anyway
ROWS_OF_WEIGHT = 32  # reading W counts as much as this number of rows of x: oneDNN gains more if x has few rows
NARROW = 16  # a product with such a short side is usually one with A or B
LARGE = 2**18  # values of a weight, from which a compiled graph calls `product_operator`: a call takes about 20 µs more


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b without a graph. x: (…, in). weight: (out, in), which may be a transposed view. bias: (out,)."""
    if torch.compiler.is_compiling():
        return product_operator(x, weight, bias) if is_operator_faster(x, weight) else F.linear(x, weight, bias)
    if is_faster(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def is_faster(x: Tensor, weight: Tensor) -> bool:
    """Return True if oneDNN's kernel is faster for this product."""
    size, (features, width) = x.numel(), weight.shape
    limits = paths.Current.row or paths.row()
    if features <= NARROW or width <= NARROW or size <= NARROW * width:
        if size * features < limits.onednn_narrow:
            return False  # checked first, because most products of a small model are small
    elif (size + ROWS_OF_WEIGHT * width) * features < limits.onednn:
        return False
    return x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu and has_kernel()


@torch.library.custom_op("lora_blip::product", mutates_args=())
def product_operator(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `product`, as one operator of a compiled graph. It chooses the kernel in each call: a graph has no fixed rows."""
    return product(x, weight, bias)


@product_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def is_operator_faster(x: Tensor, weight: Tensor) -> bool:
    """Return True if a compiled graph uses `product_operator` for this weight. This does not depend on the rows of x.

    An exported graph has only PyTorch's operators, so that other programs can read it.
    """
    limits = paths.Current.row
    if limits is None or torch.compiler.is_exporting() or limits.onednn >= paths.NEVER or weight.numel() < LARGE:
        return False
    return x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu and kernel_in_graphs()


@torch.compiler.assume_constant_result
def kernel_in_graphs() -> bool:
    """Return `has_kernel`. torch.compile calls this function, and does not trace it.

    Call it once before the trace, because the kernel cannot be tested inside one.
    """
    return has_kernel()


@cache
def has_kernel() -> bool:
    """Return True if oneDNN's kernel exists, computes the right result, and can use AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        with default_modes():
            x, weight = (torch.linspace(*ends, dtype=torch.float32, device="cpu") for ends in ((-1, 1, 35), (1, -2, 21)))
            x, weight, bias = x.view(5, 7), weight.view(7, 3), torch.ones(3, dtype=torch.float32, device="cpu")
            result = torch.ops.mkldnn._linear_pointwise(x, weight.t(), bias, "none", [], "")
            return torch.allclose(result, x @ weight + 1, rtol=1e-5, atol=1e-5)
    except Exception:  # the kernel does not exist, or nothing can be computed now
        return False


@contextmanager
def default_modes() -> Iterator[None]:
    """Turn off autocast, inference mode and gradients inside the block, whatever the caller has set."""
    with torch.autocast("cpu", enabled=False), torch.inference_mode(False), torch.no_grad():
        yield


def as_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype of autocast if autocast is on, else x itself. A linear casts its input in the same way."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def is_frozen(linear: Any) -> bool:
    """Return True if W and b are plain tensors that are not trained. A subclass, such as torchao's, has its own product."""
    weight, bias = linear.weight, linear.bias
    if type(weight) not in PLAIN_TENSORS or weight.requires_grad:
        return False
    return bias is None or (type(bias) in PLAIN_TENSORS and not bias.requires_grad)


def can_bypass(linear: Any, own_hooks: int = 0) -> bool:
    """Return True if W and b are frozen, and the module has only our hooks: `own_hooks` pre-hooks and as many hooks."""
    return is_frozen(linear) and not has_other_hooks(linear, own_hooks)


def has_other_hooks(linear: Any, own_hooks: int = 0) -> bool:
    """Return True if a module has another `forward`, or more hooks than ours: `own_hooks` pre-hooks and as many hooks."""
    hooks = linear._forward_pre_hooks, linear._forward_hooks, _global_forward_pre_hooks, _global_forward_hooks
    others = linear._backward_hooks or linear._backward_pre_hooks or "forward" in vars(linear)
    return bool(others) or tuple(map(len, hooks)) != (own_hooks, own_hooks, 0, 0)


def in_transform() -> bool:
    """Return True inside torch.func or forward-mode differentiation, which do not support this package's autograd functions."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class QuickLinear(nn.Linear):
    """An nn.Linear that uses `product` if its weight is frozen."""

    WRITTEN_FOR = ("(self, input)",)

    def forward(self, input: Tensor) -> Tensor:
        is_compiling = torch.compiler.is_compiling()
        chosen = (is_operator_faster if is_compiling else is_faster)(input, self.weight)
        if not chosen or is_plain() or not self._plain_backward(input):
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            return FrozenProduct.apply(input, self.weight, self.bias)
        return product(input, self.weight, self.bias)

    def _plain_backward(self, x: Tensor) -> bool:
        """Return True if W and b are frozen, and neither autocast nor torch.func is active."""
        return is_frozen(self) and not in_transform() and not torch.is_autocast_enabled(x.device.type)


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ + b, with a gradient for x only. The gradient can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        multiply = FrozenProduct.apply if torch.is_grad_enabled() else product  # enabled: for a second derivative
        return multiply(dy, weight.t()), None, None


PLAIN_LINEARS = (nn.Linear, QuickLinear)
PLAIN_FORWARDS = (nn.Linear.forward, QuickLinear.forward)
