"""Pack the texts of one image into one row without padding, so that a decoder computes the keys of the image once.

Each text attends to itself only: the mask is block-causal, and positions start at 0 for each text. Loss and gradients are equal
to those of separate rows, which `Language.logits` computes; tests compare both.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_blip.models.token_rows import IGNORE, Rows, pad

PADDING = -1  # the text number of padding


@dataclass(frozen=True)
class Packed:
    """One row for each image, and the positions that predict a label."""

    ids: Tensor  # (images, tokens)
    positions: Tensor  # (images, tokens) the position of each token in its text
    text: Tensor  # (images, tokens) the number of each token's text, or PADDING
    label_positions: Tensor  # (labels,) positions in the flattened (images · tokens,)
    targets: Tensor  # (labels,)
    weights: Tensor | None  # (labels,) the weight of each label; None: 1

    def to(self, device: torch.device) -> "Packed":
        moved = {key: value.to(device, non_blocking=True) for key, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask (images, 1, tokens, tokens) to add to the scores: 0 for keys of the same text, else the minimum."""
        same = self.text[:, :, None] == self.text[:, None, :]
        count = self.text.shape[1]
        earlier = torch.ones(count, count, dtype=torch.bool, device=same.device).tril()
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=same.device)
        return hidden.masked_fill(same & earlier, 0)[:, None]


def pack(ids: Tensor, rows: Rows, picture: list[int]) -> Packed:
    """Pack `ids` (rows, tokens), the decoder's input for `rows`. Row i has the image `picture[i]`."""
    width = (rows.attention_mask if rows.decoder_input_ids is None else rows.targets != IGNORE).sum(1).tolist()
    own: list[list[int]] = [[] for _ in range(max(picture) + 1)]
    for row, number in enumerate(picture):
        own[number].append(row)
    tokens, targets = ids.tolist(), rows.targets.tolist()
    packed = pad([[t for row in some for t in tokens[row][: width[row]]] for some in own], 0)
    positions = pad([[p for row in some for p in range(width[row])] for some in own], 0)
    text = pad([[row for row in some for _ in range(width[row])] for some in own], PADDING)
    labels = pad([[t for row in some for t in targets[row][: width[row]]] for some in own], IGNORE).flatten()
    label_positions = (labels != IGNORE).nonzero().flatten()
    weights = None if rows.weights is None else rows.weights[text.flatten()[label_positions]]
    return Packed(packed, positions, text, label_positions, labels[label_positions], weights)


def unpacked(rows: Rows) -> Packed:
    """Return the rows without packing, with the positions of their labels."""
    labels = rows.targets.flatten()
    label_positions = (labels != IGNORE).nonzero().flatten()
    row = label_positions // rows.targets.shape[1]
    none = torch.empty(0, dtype=torch.long)
    return Packed(
        none, none, none, label_positions, labels[label_positions], None if rows.weights is None else rows.weights[row]
    )
