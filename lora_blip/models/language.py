"""The language side of a model: tokenize prompts and texts, compute logits given image features, and generate texts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lora_blip.errors import ConfigError
from lora_blip.lora.layer import AdapterStack
from lora_blip.lora.routing import use_adapters
from lora_blip.models.distinct_images import distinct
from lora_blip.models.library import call
from lora_blip.models.token_rows import (
    PackedRows,
    PaddedRows,
    TokenRows,
    by_length,
    mask_of,
    next_tokens,
    pad,
    plain_ids,
    special_ids,
)

Adapters = list[str | None] | None  # the adapter of each row, None for the base; no list: all active adapters
Named = dict[str, Any]  # arguments by name
SCORED: Named = {"return_dict_in_generate": True, "output_logits": True}  # settings of transformers' `generate`
TrainedRows = TypeVar("TrainedRows", bound=PaddedRows | PackedRows)  # the form in which a language model trains fastest


class CutText(str):
    """A generated text without its end token: generation stopped at MAX_NEW_TOKENS, or at the model's last position."""

    __slots__ = ()


class Language(ABC, Generic[TrainedRows]):
    """The base of the language models, one subclass for each kind.

    `encode_images` computes the features of images, and `logits` the logits of texts given these features. Together they are
    the model's forward. An image with five texts is encoded once.
    """

    model: Any
    tokenizer: Any
    pad_id: int
    start_id: int  # the token that a decoder starts from
    end_id: int  # the token that ends every text
    max_tokens: int  # the largest number of tokens in a row, without those of the image

    @abstractmethod
    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the tokens that come before the first token of the text."""

    @abstractmethod
    def tokenize(self, prompts: list[str], texts: list[str], example: list[int] | None = None) -> TokenRows:
        """Return the tokens of each text.

        prompts: one for each example. example: the example of each text; None: text i has prompt i.
        """

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the features (images, states, width) of images (images, 3, H, W): the input of the language side."""
        return self.project_vision(call(self.model.vision_model, pixel_values=pixel_values).last_hidden_state)

    @abstractmethod
    def project_vision(self, states: Tensor) -> Tensor:
        """Return the features that `encode_images` computes from the ViT's output (images, tokens, width)."""

    @abstractmethod
    def logits(self, features: Tensor, rows: PaddedRows) -> Tensor:
        """Return the logits (texts, tokens, vocabulary), given the features of each example (examples, states, width)."""

    @property
    @abstractmethod
    def head(self) -> nn.Linear:
        """Return the layer that computes logits from the states of the text."""

    @abstractmethod
    def arrange(self, tokens: TokenRows, image: Sequence[int]) -> TrainedRows:
        """Return the texts in the form that trains fastest, for `label_states`. image: the image of each example."""

    @abstractmethod
    def label_states(self, features: Tensor, rows: TrainedRows, image: Tensor | None) -> Tensor:
        """Return the input of `head` for each label, (labels, width), over the features of each image (images, states, width).

        image: (examples,) the image of each example; None: example i has image i.
        """

    def logits_of_one_image(self, features: Tensor, rows: PaddedRows) -> Tensor:
        """Return the logits of texts that all have the same image: features (1, states, width)."""
        return self.logits(features, rows)

    def encode_unique_images(self, pixel_values: Tensor, adapters: Adapters = None) -> Tensor:
        """Return the features of each image as `encode_images` does. Equal images with the same adapter are encoded once."""
        first, index = distinct(pixel_values, adapters)
        if len(first) == len(index) or (adapters is None and rows_are_named(self.model)):
            first = index = list(range(len(index)))
        with use_adapters(self.model, adapters and [adapters[row] for row in first]):
            return self.encode_images(pixel_values[first])[index] if first != index else self.encode_images(pixel_values)

    def room(self, prompt: str) -> int:
        """Return how many tokens a text may have after a prompt, without the start and end tokens."""
        return self.room_after(len(plain_ids(self.tokenizer, prompt)))

    def room_after(self, tokens: int) -> int:
        """Return `room` for a prompt of `tokens` tokens."""
        return self.max_tokens - tokens - 2

    def generation_groups(self, starts: list[list[int]]) -> Iterable[list[int]]:
        """Return the indices of the prompts that are generated together: those of one length, which need no padding."""
        return by_length(starts)

    @abstractmethod
    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        """Return the generated ids that follow `ids` (rows, tokens) over the features (rows, states, width).

        With SCORED in the settings, return transformers' dict of results, in which `sequences` are these ids.
        """

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """Return a generated text for each image (rows, 3, H, W) and prompt, without the prompt.

        adapters: the adapter of each row. A text ends after `max_new_tokens`, or at the model's last position.
        """
        return self.generate_from_features(
            self.encode_unique_images(pixel_values, adapters), prompts, adapters, max_new_tokens, **settings
        )

    @torch.no_grad()
    def generate_from_features(
        self, features: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """Return what `generate` does, given the features of each row (rows, states, width).

        A text without its end token is a CutText. Raise ConfigError if the model has no room for a text after a prompt.
        """
        return [text for text, _ in self._generate(features, prompts, adapters, max_new_tokens, settings)]

    @torch.no_grad()
    def generate_scored(
        self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[tuple[str, float]]:
        """Return each text of `generate` with its score from 0 to 1: the geometric mean of its tokens' probabilities.

        The end token counts as a token. The logits of all steps are kept until the batch is finished.
        """
        features = self.encode_unique_images(pixel_values, adapters)
        return self._generate(features, prompts, adapters, max_new_tokens, settings | SCORED)

    def _generate(
        self, features: Tensor, prompts: list[str], adapters: Adapters, max_new_tokens: int, settings: Named
    ) -> list[tuple[str, float]]:
        """Return the generated texts with their scores, which are NaN if SCORED is not in the settings."""
        starts, texts = [self.prompt_ids(prompt) for prompt in prompts], [("", math.nan)] * len(prompts)
        for group in self.generation_groups(starts):
            own, device = [starts[index] for index in group], features.device
            ids, mask = pad(own, self.pad_id).to(device), mask_of(own).to(device)
            most = min(max_new_tokens, *(self.room(prompts[index]) + 1 for index in group))
            if most < 1:
                longest = max((prompts[i] for i in group), key=len)
                raise ConfigError(f"a prompt has too many tokens for this model: {longest!r}; shorten it")
            active = adapters and [adapters[index] for index in group]
            with use_adapters(self.model, active, settings.get("num_beams", 1)):
                output = self.generate_ids(features[group], ids, mask, settings | {"max_new_tokens": most})
            new, scores = output, [math.nan] * len(group)
            if not isinstance(output, Tensor):
                new, scores = output.sequences, mean_probabilities(output, self.end_id).tolist()
            for index, text, row, score in zip(group, self.texts_of(new), new.tolist(), scores, strict=True):
                text = " ".join(text.split())
                texts[index] = text if self.end_id in row else CutText(text), score
        return texts

    def texts_of(self, ids: Tensor) -> list[str]:
        """Return the texts of ids (rows, tokens), without structural and unknown tokens. Tokens that a user added are kept."""
        kept = [[id for id in row if id not in self.hidden_ids] for row in ids.tolist()]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=False)

    @cached_property
    def structural_ids(self) -> set[Any]:
        """Return the ids that no text may contain."""
        ids: set[Any] = {getattr(self, "start_id", None), *getattr(self, "image_ids", [])[:1]}
        return special_ids(self.tokenizer) | (ids - {None})

    @cached_property
    def hidden_ids(self) -> set[Any]:
        return self.structural_ids | {self.tokenizer.unk_token_id}


def new_tokens(output: Any, start: int) -> Any:
    """Return the ids (rows, tokens) after the first `start`. In a dict of results, only `sequences` is changed."""
    if isinstance(output, Tensor):
        return output[:, start:]
    output.sequences = output.sequences[:, start:]
    return output


def mean_probabilities(output: Any, end_id: int) -> Tensor:
    """Return exp(mean log p) (rows,) over the generated tokens of each row, up to and with its end token.

    output: transformers' dict of results, with `output_logits`. A beam search also gives the beam of each token.
    """
    beams = getattr(output, "beam_indices", None)  # (rows, steps), -1 after the end
    steps = len(output.logits) if beams is None else int((beams >= 0).sum(1).max())
    ids = output.sequences[:, -steps:]
    rows = torch.arange(len(ids), device=ids.device)
    total, count = torch.zeros(len(ids), device=ids.device), torch.zeros(len(ids), device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(steps):
        logits = output.logits[step][rows if beams is None else beams[:, step].clamp_min(0)]  # (rows, vocabulary)
        total += logits.float().log_softmax(-1)[rows, ids[:, step]].masked_fill(ended, 0)
        count += ~ended
        ended = ended | (ids[:, step] == end_id)
    return (total / count).exp()


def rows_are_named(model: nn.Module) -> bool:
    """Return True inside a block of `use_adapters` that names the adapter of each row. Then no row may be left out."""
    return any(isinstance(module, AdapterStack) and module.routing.active.count for module in model.modules())


class DecoderLanguage(Language[TrainedRows]):
    """The base of BLIP and OPT: a row is the prompt, the text and the end token. Only text and end are labels."""

    def tokenize(self, prompts: list[str], texts: list[str], example: list[int] | None = None) -> TokenRows:
        starts = [self.prompt_ids(prompt) for prompt in prompts]
        numbers = example or list(range(len(texts)))
        ids = [[*starts[i], *self.text_ids(prompts[i], text), self.end_id] for i, text in zip(numbers, texts, strict=True)]
        targets = [next_tokens(row, len(starts[i])) for i, row in zip(numbers, ids, strict=True)]
        return TokenRows(ids, targets, numbers, self.pad_id)

    def text_ids(self, prompt: str, text: str) -> list[int]:
        """Return the tokens of a text. After a prompt it has a space before it, which matters for a byte-level BPE."""
        return plain_ids(self.tokenizer, f" {text}" if prompt else text)


class EncoderLanguage(Language[TrainedRows]):
    """The base of BLIP for questions and T5: an encoder reads the prompt, a decoder generates the text and the end token."""

    def tokenize(self, prompts: list[str], texts: list[str], example: list[int] | None = None) -> TokenRows:
        inputs = [self.prompt_ids(prompt) for prompt in prompts]
        labels = [[*plain_ids(self.tokenizer, text), self.end_id] for text in texts]
        decoder_inputs = [[self.start_id, *row[:-1]] for row in labels]
        return TokenRows(inputs, labels, example or list(range(len(texts))), self.pad_id, decoder_inputs)

    def room_after(self, tokens: int) -> int:
        left = super().room_after(tokens)
        return self.max_tokens - 2 if left >= 0 else left  # the text has its own positions, in the decoder

    def generation_groups(self, starts: list[list[int]]) -> Iterable[list[int]]:
        return [list(range(len(starts)))]  # an encoder masks the padding of shorter prompts
