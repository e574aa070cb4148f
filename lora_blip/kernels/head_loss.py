"""Cross-entropy through a frozen head. The gradient is computed in the forward, so no logits are kept.

With z = W h + b, p = softmax(z) and target t, the gradient of −log pₜ with respect to h is Wᵀ (p − onehot(t)). It is computed
at once, so the backward pass needs neither z nor W. Tests compare this with `losses.token_loss` of the head's output.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_blip.kernels.linear import PLAIN_LINEARS, can_bypass, product

# the largest sum of absolute values of a row after `to_fp16_range`. If |W| < 32, products are then below 2¹⁵, and fp16 ends at
# 2¹⁶. A value of 2⁻³⁴ of the sum is still not 0: the smallest number of fp16 is 2⁻²⁴.
LARGE = 2.0**10


def head_loss(states: Tensor, head: Any, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ wᵢ · −log p(targetᵢ), float32. states: (labels, width), the input of `head`. targets: (labels,)."""
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        return FrozenHead.apply(states.to(dtype), head.weight, head.bias, targets, weights)


def is_plain_head(head: Any) -> bool:
    """Return True if a head is a frozen linear W h + b without hooks, such as those of adapters."""
    return type(head) in PLAIN_LINEARS and can_bypass(head)


class FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        weight = weight.to(states.dtype)
        logits = product(states, weight, None if bias is None else bias.to(states.dtype)).float()
        target_logits = logits.gather(1, targets[:, None]).squeeze(1)
        total = logits.logsumexp(1)
        losses = total - target_logits
        if ctx.needs_input_grad[0]:
            p = logits.sub_(total[:, None]).exp_()
            p[torch.arange(len(targets), device=targets.device), targets] -= 1
            if weights is not None:
                p *= weights[:, None]
            factors = to_fp16_range(p) if states.dtype == torch.float16 else None
            ctx.save_for_backward(product(p.to(states.dtype), weight.t()), factors)
        return (losses if weights is None else losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        """Multiply by d_loss before rounding to fp16, because d_loss contains the loss scale of a GradScaler."""
        d_states, factors = ctx.saved_tensors
        scale = d_loss if factors is None else (d_loss * factors)[:, None]
        wide = torch.promote_types(d_states.dtype, torch.float32)
        return (d_states.to(wide) * scale).to(d_states.dtype), None, None, None, None


def to_fp16_range(p: Tensor) -> Tensor:
    """Scale the rows of p (labels, vocabulary) in place. Return the factors (labels,) that undo it.

    The absolute values of a row then sum to at most LARGE, so a product with W is at most LARGE · max |W|. The factors are
    powers of two, so no digit is lost.
    """
    exponents = p.norm(1, dim=1).clamp(min=2.0**-100).log2().ceil() - math.log2(LARGE)
    p *= torch.exp2(-exponents)[:, None]
    return torch.exp2(exponents)
