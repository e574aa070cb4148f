"""What `lora.add_update` does, faster: one autograd function for a frozen linear and all the adapters on it.

    forward     h = s · x Aᵀ             y = x Wᵀ + b + h Bᵀ, into the output itself
    backward    g = s · dy B             dx = dy W + g A          dA = gᵀ x          dB = dyᵀ h

Autograd's own way keeps x twice under autocast, the update before and after it is scaled, and adds the two halves of
dx in a pass of their own. Here a pre-hook hands the linear x without its graph, cast once, so that nothing of the
frozen product is recorded; what is kept is x and the rank-r h. `lora.add_update` is the oracle of the tests, and goes
its own way wherever this one would not be the same: with dropout, rows of their own, quantised or merged weights, in
torch.func's transforms, and under torch.compile, which fuses by itself. A gradient of a gradient is not to be had
here; `lora.fast(model, False)` gives it.
"""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from lora_blip.errors import LoRAError
from lora_blip.kernels.plain import is_plain
from lora_blip.products import QuickLinear, as_autocast, frozen, product, transformed

PLAIN = (nn.Linear, QuickLinear)
SMALL = 2**20  # bytes of an activation that is kept rather than computed again
MADE_OF = "made_of"  # attribute of an activation: what gelu was given, which is kept in any case


class Entered(threading.local):
    """The input of a linear between its pre-hook and its hook, of each thread; a copy of the module starts with none."""

    x: Tensor | None = None  # with its graph
    cast: Tensor | None = None  # the same as the linear read it: without a graph, in autocast's dtype

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Entered, ()


def hand_over(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]] | None:
    """The forward pre-hook: hand the linear x without its graph, where `updated` will see to the gradients."""
    updates = linear.lora
    updates.entered.x = None  # of a forward that an error broke off
    if not (torch.is_grad_enabled() and updates.choice.fast and updates.choice.everyone) or torch.compiler.is_compiling():
        return None
    if is_plain():
        return None
    if type(linear) not in PLAIN or updates.merged or len(args) != 1 or kwargs or not alone(linear, own=1):
        return None  # own: this hook and add_update
    if any(lora.dropout and lora.training for lora in updates.values()) or transformed():
        return None
    x = args[0]
    if not torch.is_autocast_enabled(x.device.type) and not x.dtype == linear.weight.dtype == torch.float32:
        return None  # 16-bit weights without autocast: A and B stay float32
    updates.entered.x, updates.entered.cast = x, as_autocast(x.detach())
    return (updates.entered.cast,), kwargs


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the tensor that a linear was called with, by position or by a keyword of any name."""
    if args:
        return args[0]
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    if len(tensors) != 1:
        raise LoRAError(f"a linear with adapters was called with {', '.join(kwargs)}; give its input by position")
    return tensors[0]


def alone(linear: Any, own: int = 0) -> bool:
    """Whether W and b are frozen, and nobody but so many hooks of ours sees what goes in and out: the graph may pass it by."""
    hooks = linear._forward_pre_hooks, linear._forward_hooks, _global_forward_pre_hooks, _global_forward_hooks
    others = linear._backward_hooks or linear._backward_pre_hooks or "forward" in vars(linear)
    return frozen(linear) and not others and tuple(map(len, hooks)) == (own, own, 0, 0)


def updated(linear: Any, output: Tensor) -> Tensor:
    """What the linear returned, with Σ (alpha / r) · B A x added in place, and gradients for x, A and B."""
    updates = linear.lora
    x, cast = updates.entered.x, updates.entered.cast
    updates.entered.x = updates.entered.cast = None
    each = list(updates.values())
    reach = [(lora.scale, lora.padding[0], output.shape[-1] - lora.padding[1]) for lora in each]
    halves = [half for lora in each for half in (lora.A, lora.B)]
    before = getattr(x, MADE_OF, None)
    kept = cast if before is None or before.dtype != cast.dtype or cast.nbytes < SMALL else before.detach()
    return FrozenLinear.apply(x, cast, kept, output, linear.weight, reach, *halves)


class FrozenLinear(torch.autograd.Function):
    """Gradients of a linear whose W is frozen, and of its adapters (s, first row, last row) with halves A, B, A, B …"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cast: Tensor, before: Tensor, output: Tensor, weight: Tensor, reach: Any, *halves: Tensor
    ) -> Tensor:
        """cast: x as the linear read it; before: what it is the gelu of, or itself."""
        flat, y = cast.reshape(-1, cast.shape[-1]), output.view(-1, output.shape[-1])
        kept = []
        for (scale, start, stop), a, b in zip(reach, halves[::2], halves[1::2], strict=True):
            a, b = a.to(flat.dtype), b.to(flat.dtype)
            h = product(flat, a)
            h *= scale
            part = y[:, start:stop]
            if y.is_mps and part.shape != y.shape:  # older macOS writes addmm_'s sum into a copy of a strided part
                part += h @ b.t()
            else:
                part.addmm_(h, b.t())
            kept += [a, b, h]
        ctx.save_for_backward(before, weight, *kept)
        ctx.reach, ctx.gelu = reach, before is not cast
        ctx.like, ctx.halves = (x.shape, x.dtype), [half.dtype for half in halves]
        return output.data  # the same numbers, and no view of them, which nobody might change in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        with torch.autocast(dy.device.type, enabled=False):  # which the caller may have on here, and had not in the forward
            return FrozenLinear.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Any:
        x, weight, *kept = ctx.saved_tensors
        flat = (nn.functional.gelu(x) if ctx.gelu else x).reshape(-1, x.shape[-1])
        dtype = flat.dtype
        dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
        dx = product(dy, weight.to(dtype).t()) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor] = []
        for (scale, start, stop), a, b, h in zip(ctx.reach, kept[::3], kept[1::3], kept[2::3], strict=True):
            part = dy[:, start:stop]
            # gᵀ and dBᵀ, so that a long matrix is read in the order in which it lies: up to 9 times as fast
            gt = product(b.t(), part)
            gt *= scale
            if dx is not None:
                dx.addmm_(gt.t(), a)
            gradients += [product(gt, flat.t()), product(h.t(), part.t()).t()]
        gradients = [found.to(half) for found, half in zip(gradients, ctx.halves, strict=True)]
        shape, kind = ctx.like
        return (None if dx is None else dx.view(shape).to(kind)), None, None, None, None, None, *gradients
