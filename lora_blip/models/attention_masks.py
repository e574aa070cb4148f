"""Masks for the attention of transformers, made without reading a value from the device.

From a mask of 2 dimensions, transformers computes one of 4 dimensions. It first reads from the GPU whether the mask hides
anything, and each such read waits for the GPU. Here the caller knows this from the lengths of the rows. The results have equal
bits. With an attention other than "sdpa" and "eager", the mask of 2 dimensions is passed on, and transformers reads it.
"""

from typing import Any

import torch
from torch import Tensor

ATTENTIONS = ("sdpa", "eager")  # whose masks have 4 dimensions: bool in sdpa, and 0 or the minimum in eager


def causal_arguments(config: Any, mask: Tensor, is_full: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments `attention_mask` and `position_ids` of an OPT decoder.

    mask: (rows, tokens), 1 for tokens and 0 for padding. is_full: True if it hides nothing. dtype: that of the embeddings.
    """
    if is_full:
        return {"attention_mask": None}  # the causal mask alone
    if config._attn_implementation not in ATTENTIONS:
        return {"attention_mask": mask}
    earlier = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    positions = mask.cumsum(1) * mask - 1  # as OPT counts them; its table has a row for −1
    return {"attention_mask": scores_mask(config, mask[:, None, None].bool() & earlier, dtype), "position_ids": positions}


def bidirectional_mask(config: Any, mask: Tensor, is_full: bool, queries: int, dtype: torch.dtype) -> Tensor | None:
    """Return the mask (rows, 1, queries, keys) for attention in both directions. None: it hides nothing.

    mask: (rows, keys), 1 for keys and 0 for padding. is_full: True if it hides nothing.
    """
    if is_full:
        return None
    if config._attn_implementation not in ATTENTIONS:
        return mask
    return scores_mask(config, mask[:, None, None].bool().expand(-1, -1, queries, -1), dtype)


def scores_mask(config: Any, visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of bools (rows, 1, queries, keys) as the attention of `config` needs it."""
    if config._attn_implementation == "sdpa":
        return visible
    return torch.where(visible, torch.zeros((), dtype=dtype, device=visible.device), torch.finfo(dtype).min)
