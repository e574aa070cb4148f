"""Rows of token ids with the targets of their labels.

`targets[t]` is the id that the logits at position t should predict. It is IGNORE at positions without a label: padding (by the
mask, never by id), the prompt, and image placeholders.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
STRUCTURAL = ("bos", "eos", "sep", "pad", "cls", "mask")
PLACE_HOLDER = re.compile(r"\[(?:DEC|ENC)\]|<image>|<extra_id_\d+>")  # BLIP's, BLIP-2's and T5's


@dataclass(frozen=True)
class Rows:
    """A batch of tokenized texts. An encoder-decoder reads `input_ids`, one row for each image, and `decoder_input_ids`."""

    input_ids: Tensor  # (rows, tokens); for an encoder-decoder (images, tokens)
    attention_mask: Tensor  # the same shape, 1 for tokens and 0 for padding
    targets: Tensor  # (rows, logits)
    decoder_input_ids: Tensor | None = None  # (rows, logits)
    image: Tensor | None = None  # (rows,) the image of each row; None: row i has image i
    weights: Tensor | None = None  # (rows,) the weight of each row's loss; None: 1

    def to(self, device: torch.device) -> "Rows":
        moved = {key: value.to(device, non_blocking=True) for key, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def per_row(self, values: Tensor) -> Tensor:
        """Return values of images (images, …) as values of rows (rows, …)."""
        return values if self.image is None else values[self.image]

    def with_weights(self, weights: list[float]) -> "Rows":
        """Return the same rows with weights."""
        plain = all(weight == 1 for weight in weights)
        return self if plain else replace(self, weights=torch.tensor(weights, dtype=torch.float32))

    @property
    def label_tokens(self) -> float:
        """Return Σ over the rows of weight × label tokens, the divisor of the summed loss."""
        counts = (self.targets != IGNORE).sum(1)
        return float(counts.sum() if self.weights is None else (counts * self.weights).sum())


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Pad rows at the end: return (rows, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def mask_of(rows: list[list[int]]) -> Tensor:
    """Return the mask of padded rows, (rows, longest): 1 for tokens, 0 for padding."""
    return pad([[1] * len(row) for row in rows], 0)


def shifted_targets(rows: list[list[int]], prompt_lengths: list[int]) -> Tensor:
    """Return the next-token targets of a decoder: position t predicts token t + 1, if that is after the prompt."""
    targets = []
    for row, start in zip(rows, prompt_lengths, strict=True):
        labels = [IGNORE] * start + row[start:]
        targets.append([*labels[1:], IGNORE])
    return pad(targets, IGNORE)


def index_of(image: list[int] | None) -> Tensor | None:
    """Return `Rows.image` as a tensor (rows,); None if row i has image i."""
    return None if image is None or image == list(range(len(image))) else torch.tensor(image)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens. They are cached, because every epoch has the same texts."""
    return list(_ids(tokenizer, text))


@lru_cache(maxsize=2**16)
def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def many_ids(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
    """Return {text: its `plain_ids`}, tokenized together."""
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False).input_ids
    return dict(zip(texts, ids, strict=True))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that the model uses as structure: start, end, padding, masks and placeholders.

    A token that a user added is a word, even with `special_tokens=True`. BERT's [UNK] replaces a word, so it is not among
    these; OPT's is its end token under another name.
    """
    named = {tokenizer.special_tokens_map.get(f"{name}_token") for name in STRUCTURAL} - {None}
    ids = set(tokenizer.convert_tokens_to_ids(sorted(map(str, named))))
    return ids | {id for id, token in tokenizer.added_tokens_decoder.items() if PLACE_HOLDER.fullmatch(str(token))}


def by_length(rows: list[list[int]]) -> Iterator[list[int]]:
    """Yield the indices of the rows of each length. A decoder continues rows of one length together without padding."""
    for length in sorted({len(row) for row in rows}):
        yield [index for index, row in enumerate(rows) if len(row) == length]
