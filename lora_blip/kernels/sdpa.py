"""Scaled dot product attention, by the faster of two computations."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_blip.kernels.paths import row


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √d + mask) v, (rows, heads, tokens, d), for k and v (rows, heads, keys, d).

    PyTorch's fused kernel keeps no scores. Separate operations are used if they are faster.
    """
    if mask is not None and mask.dtype != q.dtype:  # float32's minimum is −inf in 16 bits
        mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    if not prefers_separate(q):
        return F.scaled_dot_product_attention(q, k, v, mask)
    return separate(q, k, v, mask)


def separate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the same as `attend`, by separate operations. q, k and v have 16 bits and are on the CPU."""
    with torch.autocast("cpu", enabled=False):
        scores = k.contiguous() @ (q * q.shape[-1] ** -0.5).transpose(-1, -2)  # avoids a transposed copy of a long matrix
        scores = scores.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1) @ v.contiguous()


def prefers_separate(q: Tensor) -> bool:
    """Return True if separate operations are faster than PyTorch's fused kernel: in 16 bits on many CPUs (see paths.json).

    There, the fused kernel takes twice as long, and its backward pass up to six times as long.
    """
    return q.device.type == "cpu" and q.element_size() == 2 and row().separate_16bit
