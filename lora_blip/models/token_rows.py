"""Token ids of texts: one ragged row for each text, which is then padded or packed into tensors.

An example is one image with one or more texts, such as the answers to its question. `TokenRows` are the ragged rows.
`pad` makes one tensor row for each text. `pack` puts the texts of one image into one row
without padding, so that a decoder computes the keys of the image once. In a packed row each text attends to itself only: the
mask is block-causal, and positions start at 0 for each text. Loss and gradients are equal to those of padded rows, and tests
compare both.

`targets[t]` is the id that the logits at position t should predict. It is IGNORE at positions without a label: the prompt,
image placeholders and padding. The length of a row decides what is padding, never an id.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

IGNORE = -100  # a target without a label, as in PyTorch
PADDING = -1  # the text number of padding in a packed row
STRUCTURAL = ("bos", "eos", "sep", "pad", "cls", "mask")
PLACEHOLDER = re.compile(r"\[(?:DEC|ENC)\]|<image>|<extra_id_\d+>")  # BLIP's, BLIP-2's and T5's


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
    is_full: bool = False  # True: input_ids has no padding. It is known here, so nobody must read the mask from a GPU

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


@dataclass(frozen=True)
class PackedRows:
    """The texts of a batch, with one row for each image, or for each question that an encoder reads."""

    ids: Tensor  # (rows, tokens) the decoder's input
    positions: Tensor  # (rows, tokens) the position of each token in its text
    text: Tensor  # (rows, tokens) the number of each token's text, or PADDING
    labels: Labels
    tokens: TokenRows  # the same texts before packing
    encoder_ids: Tensor | None = None  # (examples, tokens) the encoder's input, padded; None without an encoder
    encoder_mask: Tensor | None = None  # (examples, tokens) 1 for tokens and 0 for padding
    encoder_is_full: bool = False  # True: encoder_ids has no padding

    def to(self, device: torch.device) -> "PackedRows":
        return moved(self, device)

    def padded(self) -> PaddedRows:
        """Return the same texts with one row for each, on the same device."""
        return self.tokens.pad().to(self.ids.device)

    def label_ids(self) -> list[list[int]]:
        """Return the labels of each text."""
        owner = self.text.flatten()[self.labels.positions]
        return [self.labels.targets[owner == number].tolist() for number in range(len(self.tokens.targets))]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask (rows, 1, tokens, tokens) to add to the scores: 0 for keys of the same text, else the minimum."""
        same = self.text[:, :, None] == self.text[:, None, :]
        count = self.text.shape[1]
        earlier = torch.ones(count, count, dtype=torch.bool, device=same.device).tril()
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=same.device)
        return hidden.masked_fill(same & earlier, 0)[:, None]


def pack(tokens: TokenRows, row: list[int]) -> PackedRows:
    """Pack tokenized texts. Text i goes to the row `row[i]`. An encoder's input is padded."""
    texts_of_row: list[list[int]] = [[] for _ in range(max(row) + 1)]
    for i, number in enumerate(row):
        texts_of_row[number].append(i)
    encoder = tokens.decoder_inputs is not None
    inputs = tokens.decoder_inputs or tokens.inputs
    text = pad([[i for i in texts for _ in inputs[i]] for texts in texts_of_row], PADDING)
    targets = pad([[t for i in texts for t in tokens.targets[i]] for texts in texts_of_row], IGNORE)
    return PackedRows(
        pad([[t for i in texts for t in inputs[i]] for texts in texts_of_row], 0),
        pad([[p for i in texts for p in range(len(inputs[i]))] for texts in texts_of_row], 0),
        text,
        labels_of(targets, text, tokens.weights),
        tokens,
        pad(tokens.inputs, tokens.pad_id) if encoder else None,
        mask_of(tokens.inputs) if encoder else None,
        encoder and len(set(map(len, tokens.inputs))) < 2,
    )


TextRows = PaddedRows | PackedRows  # the tensors of a batch of texts
Tensors = TypeVar("Tensors", Labels, PaddedRows, PackedRows)


def moved(rows: Tensors, device: torch.device) -> Tensors:
    """Return the same object with its tensors on a device."""
    fields = {key: value.to(device, non_blocking=True) for key, value in vars(rows).items() if isinstance(value, Tensor)}
    labels = {key: moved(value, device) for key, value in vars(rows).items() if isinstance(value, Labels)}
    return replace(rows, **fields, **labels)  # type: ignore[arg-type]


def labels_of(targets: Tensor, text: Tensor, weights: list[float] | None) -> Labels:
    """Return the labels among `targets` (rows, tokens).

    text: (rows, tokens), the number of each token's text. weights: the weight of each text.
    """
    positions = (targets != IGNORE).flatten().nonzero().flatten()
    per_label = None if weights is None else weight_tensor(weights)[text.flatten()[positions]]
    return Labels(positions, targets.flatten()[positions], per_label)


def take_rows(values: Tensor, index: Tensor | None) -> Tensor:
    """Return values[index]; None: all values, in their order."""
    return values if index is None else values[index]


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
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def many_ids(tokenizer: Any, texts: list[str]) -> dict[str, list[int]]:
    """Return {text: its `plain_ids`}. One call of the tokenizer for all texts is faster."""
    ids = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    ).input_ids  # verbose: a long text has our own message
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
