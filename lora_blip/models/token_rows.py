"""Rows of token ids, with targets that count answers only.

`targets[t]` is the id that the model's logits at position t should give; IGNORE everywhere else: on
padding (by the mask, never by id), on the prompt, on image placeholders.
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
    """One batch of texts. Encoder-decoders read `input_ids`, one for each image, and predict after `decoder_input_ids`."""

    input_ids: Tensor  # (rows, tokens); of an encoder-decoder (images, tokens)
    attention_mask: Tensor  # of the same shape, 1 on what is there and 0 on padding
    targets: Tensor  # (rows, logits)
    decoder_input_ids: Tensor | None = None  # (rows, logits)
    image: Tensor | None = None  # (rows,) which image each row is about; None: row i is about image i
    weights: Tensor | None = None  # (rows,) what each row's loss counts; None: 1

    def to(self, device: torch.device) -> "Rows":
        moved = {key: value.to(device, non_blocking=True) for key, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def per_row(self, of_images: Tensor) -> Tensor:
        """(images, …) → (rows, …): what belongs to the image of each row."""
        return of_images if self.image is None else of_images[self.image]

    def with_weights(self, weights: list[float]) -> "Rows":
        """The same rows, with the weight of each."""
        plain = all(weight == 1 for weight in weights)
        return self if plain else replace(self, weights=torch.tensor(weights, dtype=torch.float32))

    @property
    def label_tokens(self) -> float:
        """Σ over the rows of weight × label tokens: what the summed loss is divided by."""
        counts = (self.targets != IGNORE).sum(1)
        return float(counts.sum() if self.weights is None else (counts * self.weights).sum())


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Ragged rows → (rows, longest), filled at the end."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def mask_of(rows: list[list[int]]) -> Tensor:
    """1 on what is there, 0 on padding: (rows, longest)."""
    return pad([[1] * len(row) for row in rows], 0)


def shifted_targets(rows: list[list[int]], silent: list[int]) -> Tensor:
    """Next-token targets of a decoder: position t predicts token t + 1, if that is past the silent start."""
    targets = []
    for row, start in zip(rows, silent, strict=True):
        labels = [IGNORE] * start + row[start:]
        targets.append([*labels[1:], IGNORE])
    return pad(targets, IGNORE)


def index_of(image: list[int] | None) -> Tensor | None:
    """(rows,) of `Rows.image`; None where each row has an image of its own, in order."""
    return None if image is None or image == list(range(len(image))) else torch.tensor(image)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text and no others. The same texts come in every epoch, and a call takes as long as small matrices."""
    return list(_ids(tokenizer, text))


@lru_cache(maxsize=2**16)
def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def many_ids(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
    """`plain_ids` of each of some texts."""
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False).input_ids
    return dict(zip(texts, ids, strict=True))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that the model uses as structure: start, end, padding, masks and place holders.

    A token that a user added is a word, even with `special_tokens=True`. BERT's [UNK] replaces a word, so it is not among
    these; OPT's is its end token under another name.
    """
    named = {tokenizer.special_tokens_map.get(f"{name}_token") for name in STRUCTURAL} - {None}
    ids = set(tokenizer.convert_tokens_to_ids(sorted(map(str, named))))
    return ids | {id for id, token in tokenizer.added_tokens_decoder.items() if PLACE_HOLDER.fullmatch(str(token))}


def by_length(rows: list[list[int]]) -> Iterator[list[int]]:
    """Indices of the rows of one length after another: a decoder continues such rows together without padding."""
    for length in sorted({len(row) for row in rows}):
        yield [index for index, row in enumerate(rows) if len(row) == length]
