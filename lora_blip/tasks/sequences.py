"""Texts → rows of token ids, for each kind of language model, with targets that count answers only.

`targets[t]` is the id that the model's logits at position t should give; IGNORE everywhere else: on
padding (by the mask, never by id), on the prompt, on image placeholders.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_blip.models import Backbone, ModelError

IGNORE = -100


@dataclass(frozen=True)
class Rows:
    """One batch of text. Encoder-decoders read `input_ids` and predict after `decoder_input_ids`."""

    input_ids: Tensor  # (rows, tokens)
    attention_mask: Tensor  # (rows, tokens), 1 on what is there and 0 on padding
    targets: Tensor  # (rows, logits)
    decoder_input_ids: Tensor | None = None  # (rows, logits)

    def to(self, device: torch.device) -> "Rows":
        decoder = None if self.decoder_input_ids is None else self.decoder_input_ids.to(device)
        return Rows(self.input_ids.to(device), self.attention_mask.to(device), self.targets.to(device), decoder)

    @property
    def label_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


class Language(Protocol):
    """How one kind of language model reads a prompt and a text, is run, and generates."""

    longest: int  # tokens of a row, the image left out

    def rows(self, prompt: str, texts: list[str]) -> Rows: ...

    def logits(self, pixel_values: Tensor, rows: Rows) -> Tensor: ...

    def generate(self, pixel_values: Tensor, prompt: str, **settings: Any) -> list[str]: ...


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Ragged rows → (rows, longest), filled at the end."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def shifted_targets(rows: list[list[int]], silent: list[int]) -> Tensor:
    """Next-token targets of a decoder: position t predicts token t + 1, if that is past the silent start."""
    targets = []
    for row, start in zip(rows, silent, strict=True):
        labels = [IGNORE] * start + row[start:]
        targets.append([*labels[1:], IGNORE])
    return pad(targets, IGNORE)


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


class DecoderLanguage:
    """What BLIP and OPT share: one row holds a start that is silent, the text and the end, and predicts its next token."""

    model: Any
    tokenizer: Any
    pad_id: int
    end: int

    def start(self, prompt: str) -> list[int]:
        raise NotImplementedError

    def rows(self, prompt: str, texts: list[str]) -> Rows:
        start = self.start(prompt)
        spaced = [f" {text}" if prompt else text for text in texts]  # a BPE tells the two apart, word pieces do not
        ids = [[*start, *plain_ids(self.tokenizer, text), self.end] for text in spaced]
        mask = pad([[1] * len(row) for row in ids], 0)
        return Rows(pad(ids, self.pad_id), mask, shifted_targets(ids, [len(start)] * len(ids)))

    def logits(self, pixel_values: Tensor, rows: Rows) -> Tensor:
        """(rows, tokens, vocabulary)."""
        return self.model(
            pixel_values=pixel_values, input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False
        ).logits


class BlipLanguage(DecoderLanguage):
    """BLIP's text decoder: [DEC] prompt text [SEP]."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        text = backbone.model.config.text_config
        self.bos, self.end, self.pad_id = text.bos_token_id, text.sep_token_id, text.pad_token_id
        self.longest = text.max_position_embeddings

    def start(self, prompt: str) -> list[int]:
        return [self.bos, *plain_ids(self.tokenizer, prompt)]

    def generate(self, pixel_values: Tensor, prompt: str, **settings: Any) -> list[str]:
        start = self.start(prompt)
        ids = torch.tensor([[*start, self.end]], device=pixel_values.device).repeat(len(pixel_values), 1)
        mask = torch.ones_like(ids)  # generate() drops the last token of both
        made = self.model.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=mask, **settings)
        return decode(self.tokenizer, made[:, len(start) :])


class Blip2Language:
    """What BLIP-2's two kinds of language model share: the image stands first, as placeholders."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        config, language = backbone.model.config, backbone.model.language_model
        self.image = [config.image_token_index] * config.num_query_tokens
        self.pad_id = config.text_config.pad_token_id
        end = language.generation_config.eos_token_id or config.text_config.eos_token_id
        self.end = end[0] if isinstance(end, list) else end
        self.longest = getattr(config.text_config, "max_position_embeddings", 512) - len(self.image)
        if config.image_token_index >= backbone.model.get_input_embeddings().num_embeddings:
            raise ModelError(f"{backbone.name!r}: image_token_index {config.image_token_index} is past the embeddings")

    def generate(self, pixel_values: Tensor, prompt: str, **settings: Any) -> list[str]:
        ids = torch.tensor([self.start(prompt)], device=pixel_values.device).repeat(len(pixel_values), 1)
        made = self.model.generate(
            pixel_values=pixel_values, input_ids=ids, attention_mask=torch.ones_like(ids),
            eos_token_id=self.end, pad_token_id=self.pad_id, **settings,
        )  # fmt: skip
        echoed = made.shape[1] >= ids.shape[1] and bool((made[:1, : ids.shape[1]] == ids[:1]).all())
        return decode(self.tokenizer, made[:, ids.shape[1] :] if echoed else made)

    def start(self, prompt: str) -> list[int]:
        raise NotImplementedError


class OptLanguage(DecoderLanguage, Blip2Language):
    """BLIP-2 with a decoder (OPT): <image>… </s> prompt text end."""

    def start(self, prompt: str) -> list[int]:
        return [*self.image, self.model.config.text_config.bos_token_id, *plain_ids(self.tokenizer, prompt)]


class T5Language(Blip2Language):
    """BLIP-2 with an encoder-decoder (Flan-T5): it reads <image>… prompt </s> and writes text </s>."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        first = getattr(backbone.model.config.text_config, "decoder_start_token_id", None)
        self.first: int = self.pad_id if first is None else first  # T5 starts from its padding

    def generate(self, pixel_values: Tensor, prompt: str, **settings: Any) -> list[str]:
        return super().generate(pixel_values, prompt, decoder_start_token_id=self.first, **settings)

    def start(self, prompt: str) -> list[int]:
        return [*self.image, *plain_ids(self.tokenizer, prompt), self.end]

    def rows(self, prompt: str, texts: list[str]) -> Rows:
        ids = [self.start(prompt) for _ in texts]
        answers = [[*plain_ids(self.tokenizer, text), self.end] for text in texts]
        decoder = pad([[self.first, *answer[:-1]] for answer in answers], self.pad_id)
        return Rows(pad(ids, self.pad_id), pad([[1] * len(r) for r in ids], 0), pad(answers, IGNORE), decoder)

    def logits(self, pixel_values: Tensor, rows: Rows) -> Tensor:
        """(rows, answer tokens, vocabulary)."""
        return self.model(
            pixel_values=pixel_values, input_ids=rows.input_ids, attention_mask=rows.attention_mask,
            decoder_input_ids=rows.decoder_input_ids, use_cache=False,
        ).logits  # fmt: skip


def language_of(backbone: Backbone) -> Language:
    if backbone.family == "blip":
        return BlipLanguage(backbone)
    return OptLanguage(backbone) if backbone.model.config.use_decoder_only_language_model else T5Language(backbone)


def decode(tokenizer: Any, ids: Tensor) -> list[str]:
    return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
