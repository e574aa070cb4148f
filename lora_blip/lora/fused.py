"""The update of `layer.lora_hook`, with less memory: one autograd function for a frozen linear and its adapters.

    forward     h = s · x Aᵀ             y = x Wᵀ + b + h Bᵀ, written into the output
    backward    g = s · dy B             dx = dy W + g A          dA = gᵀ x          dB = dyᵀ h

Here s = alpha / r, and dy is the gradient of y.

Without this function, autograd keeps a 16-bit copy of W for each linear under autocast, and it adds the two terms of dx in an
extra pass over memory. Here, a pre-hook gives the linear x without its graph, so that autograd does not record the frozen
product. These tensors are kept: x (or the input of a large GELU that computes x), h = A x (r columns) and, under autocast,
16-bit copies of A and B.

Tests compare the results with those of `lora_hook`. This function is not used for a small linear on a CPU, because it is slower
there. It is also not used if gradients are off, or if its result could differ:

- there is dropout, or not every adapter acts on every row;
- a weight is quantized or merged, or the linear has other hooks;
- a base in 16 bits is trained without autocast, or the input of the linear is given by keyword;
- the adapter has hooks, or `lora_hook` adds something else for it, after an edit (`is_product`);
- the call is inside a transform of torch.func, or under torch.compile, which fuses kernels itself.

In some of these cases `short_update` runs (see `is_short`), for example for a small linear with one adapter. It has fewer
operations than `lora_hook`, and autograd records them. In all other cases `lora_hook` itself runs.

The fused update has no second derivatives: to compute them, call `attached.fast(model, False)`.
"""

import threading
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora_blip.kernels import paths
from lora_blip.kernels.linear import GELU_INPUT, PLAIN_LINEARS, as_autocast, can_bypass, in_transform, product
from lora_blip.kernels.plain import is_plain
from lora_blip.lora.layer import AdapterStack, lora_hook
from lora_blip.lora.sites import Site


class PendingInput(threading.local):
    """The input of a linear, from its pre-hook to its hook. Each thread has its own, and a copied module starts without one."""

    x: Tensor | None = None  # with its autograd graph
    cast: Tensor | None = None  # the same without a graph, in the dtype of autocast: the input of the linear

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return PendingInput, ()


def fused_pre_hook(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor], dict[str, Any]] | None:
    """Give the linear x without its graph if `updated` can compute the gradients (a forward pre-hook with keywords)."""
    stack, routing = linear.lora, linear.lora.routing
    stack.pending.x = None  # a forward that ended with an error may have left it
    if not (torch.is_grad_enabled() and routing.fast) or type(linear) not in PLAIN_LINEARS or len(args) != 1 or kwargs:
        return None
    x = args[0]
    if torch.compiler.is_compiling() or (x.is_cpu and x.numel() * linear.out_features < paths.row().fused):
        return None  # small: the Python code of `updated` would take longer than the passes over memory that it saves
    if is_plain() or (routing.used and not routing.all_act_on_all_rows):
        return None
    if stack.merged or not can_bypass(linear, own_hooks=1):  # one pre-hook and one hook: ours
        return None
    if any(not is_product(lora) or (lora.dropout and lora.training) or is_changed(lora) for lora in stack.values()):
        return None
    if in_transform():
        return None
    if not torch.is_autocast_enabled(x.device.type) and not x.dtype == linear.weight.dtype == torch.float32:
        return None  # for 16-bit weights without autocast, `lora_hook` computes the update in float32
    stack.pending.x, stack.pending.cast = x, as_autocast(x.detach())
    return (stack.pending.cast,), kwargs


def fused_hook(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Add the updates by `updated` if the pre-hook has stored the input, else by `short_update` or `lora_hook`."""
    if linear.lora.pending.x is not None:
        return updated(linear, output)
    return short_update(linear, args[0], output) if is_short(linear, args, output) else lora_hook(linear, args, kwargs, output)


def is_short(linear: Any, args: tuple[Any, ...], output: Tensor) -> bool:
    """Return True if `short_update` computes the update: one adapter, for all output features of all rows, without dropout."""
    stack, routing = linear.lora, linear.lora.routing
    if len(stack) != 1 or len(args) != 1 or stack.merged or not routing.fast or type(output) is not Tensor:
        return False
    if torch.compiler.is_compiling() or is_plain() or (routing.used and not routing.all_act_on_all_rows):
        return False
    (lora,) = stack.values()
    if not is_product(lora) or any(lora.padding) or (lora.dropout and lora.training) or is_changed(lora):
        return False
    if torch.is_autocast_enabled(output.device.type):
        return bool(output.dtype == torch.get_autocast_dtype(output.device.type))
    return bool(args[0].dtype == output.dtype == lora.A.dtype)  # else `lora_hook` computes the update in float32


def is_product(lora: Any) -> bool:
    """Return True if `lora_hook` adds s · B A x for an adapter, up to dropout, and if it has no other parameter.

    Then the fused update may replace the hook. The result is kept in the adapter: the comparison takes a few milliseconds.
    """
    kind, result = vars(lora).get("product", (None, False))
    if kind is not type(lora):
        result = _is_product(type(lora), lora.site, lora.A.shape[1], len(lora.B) + sum(lora.padding))
        lora.product = type(lora), result
    return bool(result)


def _is_product(kind: Any, site: Site, in_features: int, out_features: int) -> bool:
    """Compare the hook and its gradients with the formula, for a new adapter of a site and random A, B and x.

    An error counts as False: the hook then raises it again.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            lora = kind(site, in_features, out_features, device="meta")  # this draws no random number
            if {name for name, _ in lora.named_parameters()} != {"A", "B"}:
                return False
            lora.A, lora.B = (nn.Parameter(_random(*half.shape)) for half in (lora.A, lora.B))
            x, y, weights = _random(16, in_features).clone(), _random(16, out_features).clone(), _random(17, out_features)[:16]
            x[8:] *= 1000  # for a function that acts on large values only
            inputs = x.requires_grad_(), y.requires_grad_(), lora.A, lora.B
            formula = y + nn.functional.pad(x @ lora.A.T @ lora.B.T * lora.scale, lora.padding)
            expected = torch.autograd.grad((formula * weights).sum(), inputs)
            linear = SimpleNamespace(lora=AdapterStack())
            linear.lora["default"] = lora
            trained = lora_hook(linear, (x,), {}, y)  # a new module is in train mode
            lora.eval()
            evaluated = lora_hook(linear, (x,), {}, y)
            gradients = torch.autograd.grad((trained * weights).sum(), inputs)
            pairs = [(trained, formula), (evaluated, formula), *zip(gradients, expected, strict=True)]
            return all(torch.allclose(one, other, rtol=1e-6) for one, other in pairs)
    except Exception:
        return False


@lru_cache(64)
def _random(*shape: int) -> Tensor:
    """Return random numbers of a shape, always the same, in float64 on the CPU. Do not change them."""
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def is_changed(lora: Any) -> bool:
    """Return True if an adapter has hooks or another `forward`, for example of accelerate. They act only if it is called."""
    hooks = lora._forward_hooks or lora._forward_pre_hooks or lora._backward_hooks or lora._backward_pre_hooks
    return bool(hooks or "forward" in vars(lora))


def short_update(linear: Any, x: Tensor, output: Tensor) -> Tensor:
    """Return y + s · B A x. One operation, `addmm`, multiplies by B and s and adds y. `lora_hook` needs three for this."""
    (lora,) = linear.lora.values()
    h = as_matrix(x).mm(lora.A.t())
    return torch.addmm(as_matrix(output), h, lora.B.t(), alpha=lora.scale).view(output.shape)


def updated(linear: Any, output: Tensor) -> Tensor:
    """Add Σ (alpha / r) · B A x to the output in place, and return it with gradients for x, A and B."""
    stack = linear.lora
    x, cast = stack.pending.x, stack.pending.cast
    stack.pending.x = stack.pending.cast = None
    loras = list(stack.values())
    reach = [(lora.scale, rows_of(lora, output.shape[-1])) for lora in loras]
    halves = [half for lora in loras for half in (lora.A, lora.B)]
    before = getattr(x, GELU_INPUT, None)
    kept = cast if before is None or before.dtype != cast.dtype or cast.nbytes < paths.row().gelu_bytes else before.detach()
    result: Tensor = FrozenLinear.apply(x, cast, kept, output, linear.weight, reach, *halves)  # type: ignore[no-untyped-call]
    return result


def rows_of(lora: Any, out_features: int) -> slice | None:
    """Return the output features that an adapter changes, or None if it changes all of them."""
    start, end = lora.padding
    return slice(start, out_features - end) if start or end else None


class FrozenLinear(torch.autograd.Function):
    """A frozen linear and its adapters.

    reach: (s, rows) of each adapter: its factor, and the output features that it changes (None: all). halves: A and B of each
    adapter, one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cast: Tensor, before: Tensor, output: Tensor, weight: Tensor, reach: Any, *halves: Tensor
    ) -> Tensor:
        """Return `output` with the updates.

        cast: x in the dtype in which the linear read it. before: what is kept for the backward pass:
        `cast` or, for a large output of a GELU, the input of the GELU, from which x is computed again.
        """
        flat, y = as_matrix(cast), output if output.dim() == 2 else output.view(-1, output.shape[-1])
        kept = []
        for (scale, rows), a, b in zip(reach, halves[::2], halves[1::2], strict=True):
            if a.dtype is not flat.dtype:
                a, b = a.to(flat.dtype), b.to(flat.dtype)
            h = product(flat, a)
            h *= scale
            if rows is None:
                y.addmm_(h, b.t())
            elif y.is_mps:  # older macOS writes addmm_'s sum into a copy of a strided part
                y[:, rows] += h @ b.t()
            else:
                y[:, rows].addmm_(h, b.t())
            kept += [a, b, h]
        ctx.save_for_backward(before, weight, *kept)
        ctx.reach, ctx.gelu = reach, before is not cast
        ctx.like, ctx.dtype = (x.shape, x.dtype), halves[0].dtype
        return output.data  # not a view of the output, because autograd forbids in-place changes of such a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        if not torch.is_autocast_enabled(dy.device.type):
            return FrozenLinear.gradients(ctx, dy)
        with torch.autocast(dy.device.type, enabled=False):  # the backward pass uses the dtypes of the forward pass
            return FrozenLinear.gradients(ctx, dy)

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> Any:
        x, weight, *kept = ctx.saved_tensors
        flat = as_matrix(nn.functional.gelu(x) if ctx.gelu else x)
        dtype = flat.dtype
        dy = as_matrix(dy).to(dtype)
        dx = product(dy, weight.to(dtype).t()) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor] = []
        for (scale, rows), a, b, h in zip(ctx.reach, kept[::3], kept[1::3], kept[2::3], strict=True):
            part = dy if rows is None else dy[:, rows]
            # gᵀ and dBᵀ instead of g and dB: long matrices are read in memory order, which is up to 9 times as fast
            gt = product(b.t(), part)
            gt *= scale
            if dx is not None:
                dx.addmm_(gt.t(), a)
            # contiguous in the dtype of the parameter, so that autograd takes them as they are
            db = product(h.t(), part.t()).t().to(ctx.dtype, memory_format=torch.contiguous_format)
            gradients += [product(gt, flat.t()).to(ctx.dtype), db.contiguous()]
        shape, kind = ctx.like
        return (None if dx is None else dx.view(shape).to(kind)), None, None, None, None, None, *gradients


def as_matrix(x: Tensor) -> Tensor:
    """Return x (…, width) as a matrix (rows, width)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
