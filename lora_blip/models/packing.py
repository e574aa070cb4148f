"""Pack the texts of one image into one row of tensors, so that a decoder computes what they share only once.

A packed row has its texts one after the other, without padding between them. If texts start with the same tokens without a
label, such as the image's placeholders and the prompt, the row has these tokens once. A token attends to its own text only: to
the shared tokens and to the earlier ones of its text. Its position is the one that it has without other texts. So loss and
gradients equal those of padded rows up to rounding, and tests compare both.

The texts of a row are a tree in preorder. The tokens that may attend to a token are those from its place up to the `end` of its
subtree. So one number for each token gives the mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_blip.models.token_rows import IGNORE, Labels, PaddedRows, TokenRows, labels_of, mask_of, moved, pad

PADDING = -1  # the text number of padding in a packed row
LONGEST = 256  # tokens of a row to which another text may be added: attention grows with the square of the length


@dataclass(frozen=True)
class EncoderRows:
    """The input of an encoder, one row for each question about an image."""

    ids: Tensor  # (rows, tokens), padded
    mask: Tensor  # (rows, tokens) 1 for tokens and 0 for padding
    is_full: bool  # True: there is no padding
    image: Tensor | None = None  # (rows,) the image of each row; None: row i reads image i


@dataclass(frozen=True)
class PackedRows:
    """The texts of a batch, with one row or a few for each image, or for each question that an encoder reads."""

    ids: Tensor  # (rows, tokens) the decoder's input
    positions: Tensor  # (rows, tokens) the position of each token in its text
    text: Tensor  # (rows, tokens) the number of each token's text, or PADDING; of a shared token, the first of its texts
    end: Tensor  # (rows, tokens) the tokens at [place, end) may attend to the token at this place
    labels: Labels
    tokens: TokenRows  # the same texts before packing
    source: Tensor | None = None  # (rows,) the image that each row reads, or the row of the encoder; None: row i reads i
    encoder: EncoderRows | None = None  # None without an encoder

    def to(self, device: torch.device) -> "PackedRows":
        return moved(self, device)

    def padded(self) -> PaddedRows:
        """Return the same texts with one row for each, on the same device."""
        return self.tokens.pad().to(self.ids.device)

    def label_ids(self) -> list[list[int]]:
        """Return the labels of each text."""
        owner = self.text.flatten()[self.labels.positions]
        return [self.labels.targets[owner == number].tolist() for number in range(len(self.tokens.targets))]

    def visible(self) -> Tensor:
        """Return (rows, 1, tokens, tokens), True if the first token may attend to the second one."""
        place = torch.arange(self.end.shape[1], device=self.end.device)
        return ((place <= place[:, None]) & (place[:, None] < self.end[:, None]))[:, None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask (rows, 1, tokens, tokens) to add to the scores: 0 for visible tokens, else the minimum."""
        hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.end.device)
        return hidden.masked_fill(self.visible(), 0)


@dataclass
class RowBuilder:
    """A packed row, built text by text."""

    source: int  # what the row reads
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)  # the places of the tokens of the last text

    def add(self, tokens: TokenRows, number: int, shared: int) -> None:
        """Add a text whose first `shared` tokens are those of the last text."""
        ids, targets = decoder_inputs(tokens)[number], tokens.targets[number]
        new = range(len(self.ids), len(self.ids) + len(ids) - shared)
        self.path[shared:] = new
        self.ids += ids[shared:]
        self.positions += range(shared, len(ids))
        self.text += [number] * len(new)
        self.targets += targets[shared:]
        self.end += [0] * len(new)
        for place in self.path:
            self.end[place] = len(self.ids)


def decoder_inputs(tokens: TokenRows) -> list[list[int]]:
    return tokens.inputs if tokens.decoder_inputs is None else tokens.decoder_inputs


def rows_of(tokens: TokenRows, source: Sequence[int], longest: int = LONGEST, share: bool = True) -> list[RowBuilder]:
    """Return the packed rows. Texts with one source are in one row, or in several of at most `longest` tokens if possible.

    source: what each text reads. share: have equal tokens at the start of texts once.
    """
    starts = [without_label(tokens, number) if share else [] for number in range(len(source))]
    rows: list[RowBuilder] = []
    before = 0  # the text before, in the order of the rows
    for number in sorted(range(len(source)), key=lambda each: (source[each], starts[each])):
        same = bool(rows) and rows[-1].source == source[number]
        shared = common(starts[before], starts[number]) if same else 0
        if not same or len(rows[-1].ids) + len(tokens.targets[number]) - shared > longest:
            rows.append(RowBuilder(source[number]))
            shared = 0
        rows[-1].add(tokens, number, shared)
        before = number
    return rows


def without_label(tokens: TokenRows, number: int) -> list[int]:
    """Return the tokens of a text before its first label. Texts can share them."""
    targets = tokens.targets[number]
    return decoder_inputs(tokens)[number][: next((place for place, target in enumerate(targets) if target != IGNORE), None)]


def common(one: list[int], other: list[int]) -> int:
    """Return the number of equal tokens at the start of two lists."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def saves_tokens(rows: list[RowBuilder], tokens: TokenRows) -> bool:
    """Return True if the packed rows have fewer tokens than the padded ones. In both, padding counts."""
    lengths = [len(row.ids) for row in rows], [len(targets) for targets in tokens.targets]
    packed, padded = (len(each) * max(each) for each in lengths)
    return packed < padded


def as_tensors(rows: list[RowBuilder], tokens: TokenRows, encoder: EncoderRows | None = None) -> PackedRows:
    """Return the rows as tensors."""
    text, targets = pad([row.text for row in rows], PADDING), pad([row.targets for row in rows], IGNORE)
    source = [row.source for row in rows]
    return PackedRows(
        pad([row.ids for row in rows], tokens.pad_id),
        pad([row.positions for row in rows], 0),
        text,
        pad([row.end for row in rows], text.shape[1]),
        labels_of(targets, text, tokens.weights),
        tokens,
        index_tensor(source),
        encoder,
    )


def encoder_rows(inputs: list[list[int]], pad_id: int, image: Sequence[int]) -> EncoderRows:
    """Return the encoder's input as tensors. image: the image of each row."""
    return EncoderRows(pad(inputs, pad_id), mask_of(inputs), len(set(map(len, inputs))) < 2, index_tensor(image))


def index_tensor(index: Sequence[int]) -> Tensor | None:
    """Return the indices for `take_rows`. None: they are 0, 1, 2, …"""
    return None if list(index) == list(range(len(index))) else torch.tensor(index)


TextRows = PaddedRows | PackedRows  # the tensors of a batch of texts
