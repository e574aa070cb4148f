"""Attention of BLIP's ViT that keeps no scores: 577 × 577 numbers a head are most of what a step remembers.

transformers computes it by hand for BLIP, and stores every score three times for the backward pass. Here it is
PyTorch's `scaled_dot_product_attention`, and on a CPU in 16 bits, where its backward pass is slow, `ByHeads`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention


class VitAttention(nn.Module):
    """What the attentions of both ViTs share, over the same weights; the probabilities, their second output, are None."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """hidden_states (images, states, width) → the same shape."""
        model: Any = self
        if self.training and self.drops:  # never in a backbone that is loaded here
            return super().forward(hidden_states, **kwargs)
        qkv = model.qkv(hidden_states)  # (images, states, 3 · width)
        by_heads = qkv.device.type == "cpu" and qkv.element_size() == 2 and not torch.compiler.is_compiling()
        context = ByHeads.apply(qkv, model.num_heads) if by_heads else fused(qkv, model.num_heads)
        return model.projection(context), None

    @property
    def drops(self) -> bool:
        """Whether probabilities are dropped in training."""
        raise NotImplementedError


class BlipVitAttention(VitAttention, BlipAttention):
    @property
    def drops(self) -> bool:
        return self.dropout.p > 0


class Blip2VitAttention(VitAttention, Blip2Attention):
    @property
    def drops(self) -> bool:
        return self.attention_dropout > 0


def fused(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √d) v of each head: (images, states, 3 · width) → (images, states, width)."""
    q, k, v = apart(qkv, heads).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def apart(qkv: Tensor, heads: int) -> Tensor:
    """(images, states, 3 · width) → a view (3, images, heads, states, width / heads)."""
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


class ByHeads(torch.autograd.Function):
    """The same, as many heads at a time as there are threads, so that what one step makes is in the cache for the next.

    Keeps the probabilities, once, in 16 bits.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        (q, k, v), context = scaled(qkv, heads), qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)
        out = context.unflatten(-1, (heads, -1)).transpose(1, 2)  # (images, heads, states, d)
        kept = q.new_empty(*q.shape[:3], q.shape[2]) if ctx.needs_input_grad[0] else None
        with torch.autocast("cpu", enabled=False):
            for part in parts(q):
                p = torch.softmax(q[part] @ k[part].transpose(1, 2), -1, out=None if kept is None else kept[part])
                out[part] = p @ v[part]
        if kept is not None:
            ctx.save_for_backward(qkv, kept)
            ctx.heads = heads
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_context: Tensor) -> tuple[Tensor, None]:
        qkv, kept = ctx.saved_tensors
        q, k, v = scaled(qkv, ctx.heads)
        d_out = d_context.unflatten(-1, (ctx.heads, -1)).transpose(1, 2).contiguous()
        d_qkv = torch.empty_like(qkv)
        dq, dk, dv = apart(d_qkv, ctx.heads).unbind(0)
        for part in parts(q):
            p = kept[part]
            dv[part] = (d_out[part].transpose(1, 2) @ p).transpose(1, 2)  # so that the small factor is the one turned
            ds = torch._softmax_backward_data(d_out[part] @ v[part].transpose(1, 2), p, -1, p.dtype)
            dk[part] = (q[part].transpose(1, 2) @ ds).transpose(1, 2)
            dq[part] = ds @ k[part]
        dq *= q.shape[-1] ** -0.5
        return d_qkv, None


def scaled(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q / √d, k and v, each (images, heads, states, d) and contiguous."""
    q, k, v = apart(qkv, heads).unbind(0)
    return (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous(), v.contiguous()


def parts(q: Tensor) -> list[tuple[int, slice]]:
    """(image, heads) of one part after another."""
    images, heads = q.shape[:2]
    size = min(heads, torch.get_num_threads())
    return [(image, slice(first, first + size)) for image in range(images) for first in range(0, heads, size)]
