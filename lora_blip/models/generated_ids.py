"""The ids that transformers' `generate` returns: remove the prompt, and compute the score of each text."""

from typing import Any

import torch
from torch import Tensor


def new_tokens(output: Any, start: int) -> Any:
    """Return the ids (rows, tokens) after the first `start`. In a dict of results, only `sequences` is changed."""
    if isinstance(output, Tensor):
        return output[:, start:]
    output.sequences = output.sequences[:, start:]
    return output


def mean_probabilities(output: Any, end_id: int) -> Tensor:
    """Return exp(mean log p) (rows,) over the generated tokens of each row, including its end token.

    output: transformers' dict of results, with `output_logits`. A beam search also gives the beam of each token.
    """
    beams = getattr(output, "beam_indices", None)  # (rows, steps), -1 after the end
    steps = len(output.logits) if beams is None else int((beams >= 0).sum(1).max())
    ids = output.sequences[:, -steps:]
    rows = torch.arange(len(ids), device=ids.device)
    total, count = torch.zeros(2, len(ids), dtype=torch.float32, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(steps):
        logits = output.logits[step][rows if beams is None else beams[:, step].clamp_min(0)]  # (rows, vocabulary)
        total += logits.float().log_softmax(-1)[rows, ids[:, step]].masked_fill(ended, 0)
        count += ~ended
        ended = ended | (ids[:, step] == end_id)
    return (total / count).exp()
