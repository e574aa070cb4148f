"""Scaled dot product attention, by the faster of two computations."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_blip.kernels.paths import row


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √d + mask) v, (rows, heads, tokens, d), for k and v (rows, heads, keys, d).

    PyTorch's fused kernel keeps no scores. Separate operations are used if they are faster: in 16 bits on many CPUs (see
    paths.json). There, the fused kernel takes up to 2.3 times as long.
    """
    if mask is not None and mask.dtype != q.dtype:  # float32's minimum is −inf in 16 bits
        mask = mask.clamp(min=torch.finfo(q.dtype).min).to(q.dtype)
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if is_16bit_on_cpu(q) and scores < row().fused_16bit:
        return separate(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


def separate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the same as `attend`, by separate operations. q, k and v have 16 bits and are on the CPU."""
    with torch.autocast("cpu", enabled=False):
        scores = k.contiguous() @ (q * q.shape[-1] ** -0.5).transpose(-1, -2)  # avoids a transposed copy of a long matrix
        scores = scores.transpose(-1, -2)
        return (scores if mask is None else scores + mask).softmax(-1) @ v.contiguous()


def is_16bit_on_cpu(tensor: Tensor) -> bool:
    """Return True for a tensor for which the limits of a 16-bit attention hold."""
    return tensor.device.type == "cpu" and tensor.element_size() == 2
