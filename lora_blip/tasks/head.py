"""Cross-entropy through a frozen head, a function of its own: no logits are kept, and their gradient is taken at once.

With z = W h + b, p = softmax(z) and target t, −log pₜ has the gradient Wᵀ (p − onehot(t)) in h, which needs neither z
nor W later on. The plain way, `losses.token_loss` of the head's output, is the oracle of the tests.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_blip.fused import PLAIN, alone
from lora_blip.products import product


def head_loss(states: Tensor, head: Any, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ wᵢ · −log p(targetᵢ), float32. states (labels, width) that the frozen linear `head` reads, targets (labels,)."""
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
    with torch.autocast(kind, enabled=False):
        return FrozenHead.apply(states.to(dtype), head.weight, head.bias, targets, weights)


def passable(head: Any) -> bool:
    """Whether a head is W h + b, frozen, and nothing else: no hook on it, of an adapter or of others."""
    return type(head) in PLAIN and alone(head)


class FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None
    ) -> Tensor:
        weight = weight.to(states.dtype)
        logits = product(states, weight, None if bias is None else bias.to(states.dtype)).float()
        wanted = logits.gather(1, targets[:, None]).squeeze(1)
        total = logits.logsumexp(1)
        each = total - wanted
        if ctx.needs_input_grad[0]:
            p = logits.sub_(total[:, None]).exp_()
            p[torch.arange(len(targets), device=targets.device), targets] -= 1
            if weights is not None:
                p *= weights[:, None]
            ctx.save_for_backward(product(p.to(states.dtype), weight.t()))
        return (each if weights is None else each * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> Any:
        (d_states,) = ctx.saved_tensors
        return (d_states * d_loss).to(d_states.dtype), None, None, None, None
