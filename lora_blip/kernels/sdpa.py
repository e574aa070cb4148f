"""Attention of some queries to some keys, by the faster of two ways."""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + mask) v: q (rows, heads, tokens, d), k and v (rows, heads, keys, d) → (rows, heads, tokens, d).

    By PyTorch's fused kernel, which keeps no scores; or by hand, where that is the faster way.
    """
    if mask is not None and mask.dtype != q.dtype:  # float32's smallest number is no number in 16 bits
        mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    if not by_hand(q):
        return F.scaled_dot_product_attention(q, k, v, mask)
    with torch.autocast("cpu", enabled=False):
        scores = k.contiguous() @ (q * q.shape[-1] ** -0.5).transpose(-1, -2)  # so that no long matrix need be turned about
        scores = scores.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1) @ v.contiguous()


def by_hand(q: Tensor) -> bool:
    """In 16 bits on a CPU the fused kernel takes twice as long, and its backward pass up to six times."""
    return q.device.type == "cpu" and q.element_size() == 2
