"""Prompts and texts → rows of token ids, for each kind of language model, with targets that count answers only.

`targets[t]` is the id that the model's logits at position t should give; IGNORE everywhere else: on
padding (by the mask, never by id), on the prompt, on image placeholders.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

from lora_blip import lora
from lora_blip.models import Backbone, ModelError
from lora_blip.tasks.losses import IGNORE

Adapters = list[str | None] | None  # the adapter of each row, None for the base; no list: all that are on


@dataclass(frozen=True)
class Rows:
    """One batch of text. Encoder-decoders read `input_ids` and predict after `decoder_input_ids`."""

    input_ids: Tensor  # (rows, tokens)
    attention_mask: Tensor  # (rows, tokens), 1 on what is there and 0 on padding
    targets: Tensor  # (rows, logits)
    decoder_input_ids: Tensor | None = None  # (rows, logits)
    image: Tensor | None = None  # (rows,) which image each row is about; None: row i is about image i
    weights: Tensor | None = None  # (rows,) what each row's loss counts; None: 1

    def to(self, device: torch.device) -> "Rows":
        moved = {key: value.to(device, non_blocking=True) for key, value in vars(self).items() if value is not None}
        return replace(self, **moved)

    def about(self, image: list[int], weights: list[float]) -> "Rows":
        """The same rows, with the image and the weight of each."""
        plain = image == list(range(len(image)))
        return replace(
            self,
            image=None if plain else torch.tensor(image),
            weights=None if all(w == 1 for w in weights) else torch.tensor(weights, dtype=torch.float32),
        )

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


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def by_length(rows: list[list[int]]) -> Iterator[list[int]]:
    """Indices of the rows of one length after another: a decoder continues such rows together without padding."""
    for length in sorted({len(row) for row in rows}):
        yield [index for index, row in enumerate(rows) if len(row) == length]


class Language:
    """How one kind of language model reads a prompt and a text, is run, and generates.

    `see` runs the vision side once an image, `logits` runs the texts over what was seen: together they
    are the model's whole forward, bit for bit, and an image with five texts is looked at once.
    """

    model: Any
    tokenizer: Any
    pad_id: int
    end: int  # the token that ends every text
    longest: int  # tokens of a row, the image left out

    def start(self, prompt: str) -> list[int]:
        """What the model has read before the first token of its text."""
        raise NotImplementedError

    def rows(self, prompts: list[str], texts: list[str]) -> Rows:
        raise NotImplementedError

    def see(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, H, W) → what the language side reads of each image (images, states, width)."""
        raise NotImplementedError

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        """Logits (rows, tokens, vocabulary) of rows over `seen` (rows, states, width)."""
        raise NotImplementedError

    def generate(self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, **settings: Any) -> list[str]:
        """One text an image, after its prompt; the prompt is not in it. `adapters` names each row's own."""
        starts, said = [self.start(prompt) for prompt in prompts], [""] * len(prompts)
        for group in by_length(starts):
            ids = torch.tensor([starts[index] for index in group], device=pixel_values.device)
            with lora.chosen(self.model, adapters and [adapters[index] for index in group]):
                made = self.continued(pixel_values[group], ids, settings)
            for index, text in zip(group, decode(self.tokenizer, made), strict=True):
                said[index] = text
        return said

    def continued(self, pixel_values: Tensor, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        """The ids that follow `ids` (rows, tokens), the same length in every row."""
        raise NotImplementedError

    def room(self, prompt: str) -> int:
        """Tokens for a text after a prompt, beside the first and the last one."""
        return self.longest - len(plain_ids(self.tokenizer, prompt)) - 2

    def text_ids(self, prompt: str, text: str) -> list[int]:
        """A byte-level BPE tells a word after a space from one at the start; word pieces do not."""
        return plain_ids(self.tokenizer, f" {text}" if prompt else text)


class DecoderLanguage(Language):
    """What BLIP and OPT share: one row holds a start that is silent, the text and the end, and predicts its next token."""

    def rows(self, prompts: list[str], texts: list[str]) -> Rows:
        starts = [self.start(prompt) for prompt in prompts]
        texts_ids = [self.text_ids(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        ids = [[*start, *text, self.end] for start, text in zip(starts, texts_ids, strict=True)]
        return Rows(pad(ids, self.pad_id), mask_of(ids), shifted_targets(ids, [len(start) for start in starts]))


class BlipLanguage(DecoderLanguage):
    """BLIP's text decoder: [DEC] prompt text [SEP]."""

    def __init__(self, backbone: Backbone) -> None:
        self.model, self.tokenizer = backbone.model, backbone.tokenizer
        text = backbone.model.config.text_config
        self.bos, self.end, self.pad_id = text.bos_token_id, text.sep_token_id, text.pad_token_id
        self.longest = text.max_position_embeddings

    def start(self, prompt: str) -> list[int]:
        return [self.bos, *plain_ids(self.tokenizer, prompt)]

    def see(self, pixel_values: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixel_values).last_hidden_state

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        return self.model.text_decoder(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, encoder_hidden_states=seen, use_cache=False
        ).logits

    def continued(self, pixel_values: Tensor, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        ids = torch.cat([ids, ids[:, :1]], dim=1)  # generate() drops the last token of ids and mask
        made = self.model.generate(pixel_values=pixel_values, input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return made[:, ids.shape[1] - 1 :]


class BlipVqaLanguage(BlipLanguage):
    """BLIP for questions: an encoder reads [CLS] question [SEP] over the image, a decoder answers [DEC] answer [SEP].

    transformers feeds its labels to the decoder unshifted and attends to the padding of ragged
    questions; here the decoder's input and the targets are apart, and padding is masked in both parts.
    """

    def start(self, prompt: str) -> list[int]:
        return [self.tokenizer.cls_token_id, *plain_ids(self.tokenizer, prompt), self.tokenizer.sep_token_id]

    def rows(self, prompts: list[str], texts: list[str]) -> Rows:
        ids = [self.start(prompt) for prompt in prompts]
        answers = [[*plain_ids(self.tokenizer, text), self.end] for text in texts]
        decoder = pad([[self.bos, *answer[:-1]] for answer in answers], self.pad_id)
        return Rows(pad(ids, self.pad_id), mask_of(ids), pad(answers, IGNORE), decoder)

    def room(self, prompt: str) -> int:
        asked = super().room(prompt)
        return self.longest - 2 if asked >= 0 else asked  # question and answer have positions of their own

    def read(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The question, read over the image: (rows, tokens, width)."""
        return self.model.text_encoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        # an answer's padding stands behind it, where a causal decoder never looks
        return self.model.text_decoder(
            input_ids=rows.decoder_input_ids, encoder_hidden_states=self.read(seen, rows.input_ids, rows.attention_mask),
            encoder_attention_mask=rows.attention_mask, use_cache=False,
        ).logits  # fmt: skip

    def continued(self, pixel_values: Tensor, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        mask = torch.ones_like(ids)
        first = torch.full((len(ids), 1), self.bos, device=ids.device)
        made = self.model.text_decoder.generate(
            input_ids=first, encoder_hidden_states=self.read(self.see(pixel_values), ids, mask),
            encoder_attention_mask=mask, eos_token_id=self.end, pad_token_id=self.pad_id, **settings,
        )  # fmt: skip
        return made[:, 1:]


class Blip2Language(Language):
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

    def see(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output

    def logits(self, seen: Tensor, rows: Rows) -> Tensor:
        image = BaseModelOutputWithVisionQformerOutputs(pooler_output=seen)
        extra = {} if rows.decoder_input_ids is None else {"decoder_input_ids": rows.decoder_input_ids}
        return self.model(
            pixel_values=None, mm_encoder_outputs={"image": image}, input_ids=rows.input_ids,
            attention_mask=rows.attention_mask, use_cache=False, **extra,
        ).logits  # fmt: skip

    def continued(self, pixel_values: Tensor, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        made = self.model.generate(
            pixel_values=pixel_values, input_ids=ids, attention_mask=torch.ones_like(ids),
            eos_token_id=self.end, pad_token_id=self.pad_id, **settings,
        )  # fmt: skip
        echoed = made.shape[1] >= ids.shape[1] and bool((made[:1, : ids.shape[1]] == ids[:1]).all())
        return made[:, ids.shape[1] :] if echoed else made


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

    def continued(self, pixel_values: Tensor, ids: Tensor, settings: dict[str, Any]) -> Tensor:
        return super().continued(pixel_values, ids, settings | {"decoder_start_token_id": self.first})

    def start(self, prompt: str) -> list[int]:
        return [*self.image, *plain_ids(self.tokenizer, prompt), self.end]

    def rows(self, prompts: list[str], texts: list[str]) -> Rows:
        ids = [self.start(prompt) for prompt in prompts]
        answers = [[*plain_ids(self.tokenizer, text), self.end] for text in texts]
        decoder = pad([[self.first, *answer[:-1]] for answer in answers], self.pad_id)
        return Rows(pad(ids, self.pad_id), mask_of(ids), pad(answers, IGNORE), decoder)


def language_of(backbone: Backbone) -> Language:
    if backbone.architecture == "BlipForQuestionAnswering":
        return BlipVqaLanguage(backbone)
    if backbone.family == "blip":
        return BlipLanguage(backbone)
    return OptLanguage(backbone) if backbone.model.config.use_decoder_only_language_model else T5Language(backbone)


def decode(tokenizer: Any, ids: Tensor) -> list[str]:
    return [" ".join(text.split()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
