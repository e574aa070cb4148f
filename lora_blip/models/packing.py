"""The texts of one picture in one row, so that a decoder reads the picture once for all of them, and no padding between.

Each text sees itself alone: the mask is block-causal and positions begin anew. Loss and gradients are those of rows
apart, which `Language.logits` computes and the tests compare with.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_blip.models.token_rows import IGNORE, Rows, pad

PADDING = -1  # the text that padding belongs to


@dataclass(frozen=True)
class Packed:
    """A row a picture, and which of its positions predict a label."""

    ids: Tensor  # (pictures, tokens)
    positions: Tensor  # (pictures, tokens) of each token in its own text
    text: Tensor  # (pictures, tokens) which text a token belongs to, PADDING
    label_positions: Tensor  # (labels,) among the tokens of all pictures, one after another
    targets: Tensor  # (labels,)
    weights: Tensor | None  # (labels,) what each counts; None: 1

    def to(self, device: torch.device) -> "Packed":
        moved = {key: value.to(device, non_blocking=True) for key, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(pictures, 1, tokens, tokens), to add to the scores: 0 where a token may look, the least number elsewhere."""
        same = self.text[:, :, None] == self.text[:, None, :]
        count = self.text.shape[1]
        earlier = torch.ones(count, count, dtype=torch.bool, device=same.device).tril()
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=same.device)
        return hidden.masked_fill(same & earlier, 0)[:, None]


def pack(ids: Tensor, rows: Rows, picture: list[int]) -> Packed:
    """`ids` (rows, tokens) are what a decoder reads of `rows`, whose row i is about picture `picture[i]`."""
    width = (rows.attention_mask if rows.decoder_input_ids is None else rows.targets != IGNORE).sum(1).tolist()
    own: list[list[int]] = [[] for _ in range(max(picture) + 1)]
    for row, number in enumerate(picture):
        own[number].append(row)
    tokens, targets = ids.tolist(), rows.targets.tolist()
    packed = pad([[t for row in some for t in tokens[row][: width[row]]] for some in own], 0)
    positions = pad([[p for row in some for p in range(width[row])] for some in own], 0)
    text = pad([[row for row in some for _ in range(width[row])] for some in own], PADDING)
    wanted = pad([[t for row in some for t in targets[row][: width[row]]] for some in own], IGNORE).flatten()
    label_positions = (wanted != IGNORE).nonzero().flatten()
    weights = None if rows.weights is None else rows.weights[text.flatten()[label_positions]]
    return Packed(packed, positions, text, label_positions, wanted[label_positions], weights)


def unpacked(rows: Rows) -> Packed:
    """The rows as they are, and where their labels stand: for models whose rows are not put together."""
    wanted = rows.targets.flatten()
    label_positions = (wanted != IGNORE).nonzero().flatten()
    row = label_positions // rows.targets.shape[1]
    none = torch.empty(0, dtype=torch.long)
    return Packed(
        none, none, none, label_positions, wanted[label_positions], None if rows.weights is None else rows.weights[row]
    )
