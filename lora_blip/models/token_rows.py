"""Token ids of texts: one ragged row for each text, which is then padded, or packed with others, into tensors.

An example is one image with one or more texts, such as the answers to its question. `TokenRows` are the ragged rows.
`pad` makes one tensor row for each text. `packing` puts the texts of one image into one row.

`targets[t]` is the id that the logits at position t should predict. It is IGNORE at positions without a label: the prompt,
image placeholders and padding. The length of a row decides what is padding, never an id.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_blip.runtime.row_selection import select_rows
from lora_blip.runtime.untrusted import HALF_PAIR

IGNORE = -100  # a target without a label, as in PyTorch
STRUCTURAL = ("bos", "eos", "sep", "pad", "cls", "mask")
PLACEHOLDER = re.compile(r"\[(?:DEC|ENC)\]|<image>|<extra_id_\d+>")  # BLIP's, BLIP-2's and T5's
Tensors = TypeVar("Tensors")


@dataclass(frozen=True)
class TokenRows:
    """The tokenized texts of a batch, as lists without padding."""

    inputs: list[list[int]]  # one for each text; in an encoder-decoder the encoder's input, one for each example
    targets: list[list[int]]  # one for each text, as long as the decoder's input
    example: list[int]  # the example of each text
    pad_id: int
    decoder_inputs: list[list[int]] | None = None  # of an encoder-decoder, one for each text
    weights: list[float] | None = None  # the weight of each text's loss; None: 1

    @property
    def label_tokens(self) -> float:
        """Return Σ over the texts of weight × label tokens, the divisor of the summed loss."""
        counts = torch.tensor([sum(target != IGNORE for target in row) for row in self.targets])
        return float(counts.sum() if self.weights is None else (counts * weight_tensor(self.weights)).sum())

    def pad(self, with_labels: bool = False) -> "PaddedRows":
        """Return the rows padded at the end. with_labels: also compute `labels`."""
        targets, decoder = pad(self.targets, IGNORE), self.decoder_inputs
        text = torch.arange(len(targets))[:, None].expand(targets.shape)
        return PaddedRows(
            pad(self.inputs, self.pad_id),
            mask_of(self.inputs),
            targets,
            None if decoder is None else pad(decoder, self.pad_id),
            None if self.example == list(range(len(targets))) else torch.tensor(self.example),
            None if self.weights is None else weight_tensor(self.weights),
            labels_of(targets, text, self.weights) if with_labels else None,
            len(set(map(len, self.inputs))) < 2,
        )


@dataclass(frozen=True)
class Labels:
    """The labels of a batch without the positions that have none."""

    positions: Tensor  # (labels,) positions in the flattened (rows · tokens,)
    targets: Tensor  # (labels,)
    weights: Tensor | None  # (labels,) the weight of each label; None: 1


@dataclass(frozen=True)
class PaddedRows:
    """One row of tensors for each text. An encoder-decoder has `input_ids` for each example."""

    input_ids: Tensor  # (texts, tokens); in an encoder-decoder (examples, tokens)
    attention_mask: Tensor  # the same shape, 1 for tokens and 0 for padding
    targets: Tensor  # (texts, tokens of the decoder)
    decoder_input_ids: Tensor | None = None  # (texts, tokens of the decoder)
    example: Tensor | None = None  # (texts,) the example of each text; None: text i has example i
    weights: Tensor | None = None  # (texts,) the weight of each text's loss; None: 1
    labels: Labels | None = None  # None: the loss is computed from all logits
    is_full: bool = False  # True: input_ids has no padding. It is known here, so no caller reads the mask from a GPU

    def to(self, device: torch.device) -> "PaddedRows":
        return moved(self, device)

    def padded(self) -> "PaddedRows":
        """Return the rows themselves. `PackedRows` has the same method."""
        return self

    def label_ids(self) -> list[list[int]]:
        """Return the labels of each text."""
        return [row[row != IGNORE].tolist() for row in self.targets]

    def per_text(self, values: Tensor) -> Tensor:
        """Return values of examples (examples, …) as values of texts (texts, …)."""
        return take_rows(values, self.example)


def moved(rows: Tensors, device: torch.device) -> Tensors:
    """Return the same dataclass with its tensors, and those of the dataclasses in it, on a device."""
    fields: dict[str, Any] = {}
    for key, value in vars(rows).items():
        if isinstance(value, Tensor):
            fields[key] = value.to(device, non_blocking=True)
        elif is_dataclass(value):
            fields[key] = moved(value, device)
    return replace(rows, **fields)  # type: ignore[type-var]


def labels_of(targets: Tensor, text: Tensor, weights: list[float] | None) -> Labels:
    """Return the labels among `targets` (rows, tokens).

    text: (rows, tokens), the number of each token's text. weights: the weight of each text.
    """
    positions = (targets != IGNORE).flatten().nonzero().flatten()
    per_label = None if weights is None else weight_tensor(weights)[text.flatten()[positions]]
    return Labels(positions, targets.flatten()[positions], per_label)


def take_rows(values: Tensor, index: Tensor | None) -> Tensor:
    """Return values[index]; None: all values, in their order."""
    return values if index is None else select_rows(values, index)


def weight_tensor(weights: list[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32)


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    """Pad rows at the end, or at the start if `left`: return (rows, longest)."""
    longest = max(map(len, rows))
    padding = [[value] * (longest - len(row)) for row in rows]
    padded = [more + row if left else row + more for row, more in zip(rows, padding, strict=True)]
    return torch.tensor(padded, dtype=torch.long)


def mask_of(rows: list[list[int]], left: bool = False) -> Tensor:
    """Return the mask of rows that `pad` pads, (rows, longest): 1 for tokens, 0 for padding."""
    return pad([[1] * len(row) for row in rows], 0, left)


def next_tokens(row: list[int], start: int) -> list[int]:
    """Return the targets of a decoder's row: position t predicts token t + 1; IGNORE for tokens before `start`."""
    return [*([IGNORE] * start + row[start:])[1:], IGNORE]


def token_names(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the token of each id, or its number in brackets if it has none, as BLIP's [DEC] in BERT's tokenizer."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [f"[{id_}]" if token is None else token for id_, token in zip(ids, tokens, strict=True)]


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text without special tokens. They are cached, because every epoch has the same texts."""
    return list(_ids(tokenizer, text))


@lru_cache(maxsize=2**16)
def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(_readable(text), add_special_tokens=False, verbose=False).input_ids)


def _readable(text: str) -> str:
    """Return a text that every tokenizer accepts: U+FFFD replaces half of a surrogate pair. `text_check` reports it."""
    return text if text.isascii() else HALF_PAIR.sub("\ufffd", text)


def many_ids(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
    """Return {text: its `plain_ids`}. One call of the tokenizer for all texts is faster."""
    ids = tokenizer(
        [*map(_readable, texts)], add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
        verbose=False,  # a long text has our own message
    ).input_ids  # fmt: skip
    return dict(zip(texts, ids, strict=True))


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that the model uses as structure: start, end, padding, masks and placeholders.

    A token that a user added is a word, even with `special_tokens=True`. BERT's [UNK] replaces a word, so it is not one of
    these. In OPT, one token is both the end token and the unknown token; it is in the set.
    """
    named = {tokenizer.special_tokens_map.get(f"{name}_token") for name in STRUCTURAL} - {None}
    ids = set(tokenizer.convert_tokens_to_ids(sorted(map(str, named))))
    return ids | {id for id, token in tokenizer.added_tokens_decoder.items() if PLACEHOLDER.fullmatch(str(token))}


def by_length(rows: list[list[int]]) -> Iterator[list[int]]:
    """Yield the indices of the rows of each length. A decoder continues rows of one length without padding."""
    for length in sorted({len(row) for row in rows}):
        yield [index for index, row in enumerate(rows) if len(row) == length]
