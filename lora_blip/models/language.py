"""The language side of a model: tokenize prompts and texts, compute logits given image features, and generate texts."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lora_blip.errors import ConfigError
from lora_blip.lora.layer import AdapterStack
from lora_blip.lora.routing import use_adapters
from lora_blip.models.distinct_images import distinct
from lora_blip.models.generated_ids import mean_probabilities
from lora_blip.models.generation import reads_prompt
from lora_blip.models.library import call
from lora_blip.models.packing import TextRows
from lora_blip.models.sampling import RowSampling, image_keys
from lora_blip.models.token_rows import (
    PaddedRows,
    TokenRows,
    by_length,
    mask_of,
    next_tokens,
    pad,
    plain_ids,
    special_ids,
)

Adapters = list[str | None] | None  # a list: the adapter of each row, where None is the base. No list: all active adapters
Named = dict[str, Any]  # arguments by name
Scored = tuple[str, float]  # a generated text and its score
WITH_LOGITS: Named = {"return_dict_in_generate": True, "output_logits": True}  # settings of transformers' `generate`
TrainedRows = TypeVar("TrainedRows", bound=TextRows)  # the form in which a language model trains fastest


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
    pads_left = False  # True if padding of a shorter prompt comes before it in generation
    reads_encoder_ids = False  # True if the options `generation.READ_ENCODER` act on the ids of the prompt

    @property
    @abstractmethod
    def generator(self) -> Any:
        """Return the module whose `generate` writes the texts."""

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
    def arrange(self, tokens: TokenRows, image: Sequence[int], packs: bool = True) -> TrainedRows:
        """Return the texts in the form that trains fastest, for `label_states`.

        image: the image of each example. packs: if false, BLIP-2 does not pack texts.
        """

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

    @abstractmethod
    def generation_groups(self, prompts: list[str], starts: list[list[int]], settings: Named) -> Iterable[list[int]]:
        """Return the indices of the prompts that are generated together, given their tokens."""

    @abstractmethod
    def generate_ids(self, features: Tensor, ids: Tensor, mask: Tensor, settings: Named) -> Any:
        """Return the generated ids that follow `ids` (rows, tokens) over the features (rows, states, width).

        With WITH_LOGITS in the settings, return transformers' dict of results, in which `sequences` are these ids.
        """

    @torch.no_grad()
    def generate(
        self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[str]:
        """Return a generated text for each image (rows, 3, H, W) and prompt, without the prompt.

        adapters: the adapter of each row. A text ends at its end token, and at the latest after `max_new_tokens`
        or at the model's last position.
        settings: other options of transformers' `generate`, and the `seed` of random draws. If there are several
        texts for a row (`num_return_sequences`), return the first.
        """
        images = image_keys(pixel_values) if settings.get("do_sample") else None
        features = self.encode_unique_images(pixel_values, adapters)
        return self.generate_from_features(features, prompts, adapters, max_new_tokens, images, **settings)

    @torch.no_grad()
    def generate_from_features(
        self, features: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40,
        images: Sequence[str] | None = None, **settings: Any,
    ) -> list[str]:  # fmt: skip
        """Return what `generate` does, given the features of each row (rows, states, width).

        images: a name of the image of each row. Random draws depend on it. Sampling needs it.
        A text without its end token is a CutText. Raise ConfigError if the model has no room for a text after a prompt.
        """
        return [texts[0][0] for texts in self._generate(features, prompts, adapters, max_new_tokens, images, settings)]

    @torch.no_grad()
    def generate_scored(
        self, pixel_values: Tensor, prompts: list[str], adapters: Adapters = None, max_new_tokens: int = 40, **settings: Any
    ) -> list[list[Scored]]:
        """Return the texts of each row with their scores. There are `num_return_sequences` texts, or one.

        A score is from 0 to 1: the geometric mean of the probabilities of the text's tokens, before penalties, temperature and
        other options change them. The end token counts as a token. A beam search returns its best beam first. Sampled texts are
        sorted by score.
        The logits of all steps are kept until the batch is finished.
        """
        images = image_keys(pixel_values) if settings.get("do_sample") else None
        features = self.encode_unique_images(pixel_values, adapters)
        return self._generate(features, prompts, adapters, max_new_tokens, images, settings | WITH_LOGITS)

    def _generate(
        self, features: Tensor, prompts: list[str], adapters: Adapters, max_new_tokens: int, images: Sequence[str] | None,
        settings: Named,
    ) -> list[list[Scored]]:  # fmt: skip
        """Return the generated texts of each row with their scores, which are NaN if WITH_LOGITS is not in the settings."""
        starts, results = [self.prompt_ids(prompt) for prompt in prompts], [list[Scored]() for _ in prompts]
        seed, settings = settings.get("seed", 0), {name: value for name, value in settings.items() if name != "seed"}
        beams, copies = (settings.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        settings |= WITH_LOGITS if copies > 1 else {}
        if settings.get("do_sample") and images is None:
            raise ValueError("random draws depend on the image of each row; pass `images`")
        for group in self.generation_groups(prompts, starts, settings | {"max_new_tokens": max_new_tokens}):
            prompt_rows, device = [starts[index] for index in group], features.device
            ids = pad(prompt_rows, self.pad_id, self.pads_left).to(device)
            mask = mask_of(prompt_rows, self.pads_left).to(device)
            most = min(max_new_tokens, *(self.room(prompts[index]) + 1 for index in group))
            if most < 1:
                longest = max((prompts[i] for i in group), key=len)
                raise ConfigError(f"a prompt has too many tokens for this model: {longest!r}; shorten it")
            active = adapters and [adapters[index] for index in group]
            keys = [(images[index], prompts[index]) for index in group] if images else []
            draws = RowSampling(seed, keys, 1 if beams > 1 else copies) if settings.get("do_sample") else nullcontext()
            with use_adapters(self.model, active, max(beams, copies)), draws:
                output = self.generate_ids(features[group], ids, mask, settings | {"max_new_tokens": most})
            new, scores = output, [math.nan] * len(output if isinstance(output, Tensor) else output.sequences)
            if not isinstance(output, Tensor):
                new, scores = output.sequences, mean_probabilities(output, self.end_id).tolist()
            for row, (text, tokens, score) in enumerate(zip(self.texts_of(new), new.tolist(), scores, strict=True)):
                text = " ".join(text.split())
                results[group[row // copies]].append((text if self.end_id in tokens else CutText(text), score))
        return [sorted(texts, key=lambda each: -each[1]) for texts in results] if copies > 1 and beams == 1 else results

    def texts_of(self, ids: Tensor) -> list[str]:
        """Return the texts of ids (rows, tokens), without structural and unknown tokens. Tokens that a user added are kept."""
        visible = [[id for id in row if id not in self.hidden_ids] for row in ids.tolist()]
        return self.tokenizer.batch_decode(visible, skip_special_tokens=False)

    @cached_property
    def structural_ids(self) -> set[Any]:
        """Return the ids that no text may contain."""
        ids: set[Any] = {getattr(self, "start_id", None), *getattr(self, "image_ids", [])[:1]}
        return special_ids(self.tokenizer) | (ids - {None})

    @cached_property
    def hidden_ids(self) -> set[Any]:
        return self.structural_ids | {self.tokenizer.unk_token_id}


def rows_are_named(model: nn.Module) -> bool:
    """Return True inside a block of `use_adapters` that names the adapter of each row. Then no row may be left out."""
    return any(isinstance(module, AdapterStack) and module.routing.active.count for module in model.modules())


class DecoderLanguage(Language[TrainedRows]):
    """The base of BLIP and OPT: a row is the prompt, the text and the end token. Only text and end are labels."""

    pads_left = True

    def tokenize(self, prompts: list[str], texts: list[str], example: list[int] | None = None) -> TokenRows:
        starts = [self.prompt_ids(prompt) for prompt in prompts]
        numbers = example or list(range(len(texts)))
        ids = [[*starts[i], *self.text_ids(prompts[i], text), self.end_id] for i, text in zip(numbers, texts, strict=True)]
        targets = [next_tokens(row, len(starts[i])) for i, row in zip(numbers, ids, strict=True)]
        return TokenRows(ids, targets, numbers, self.pad_id)

    def generation_groups(self, prompts: list[str], starts: list[list[int]], settings: Named) -> Iterable[list[int]]:
        """Put prompts of different lengths into one group if possible, with padding before the shorter ones.

        The padding changes no text: it is masked, and transformers counts positions from the first token after it. But the
        options in READ_PROMPT would read the padding as a part of the prompt. With these options, each group has prompts of one
        length. Prompts that leave room for less than `max_new_tokens` are also grouped by length: a group shares one limit.
        """
        if reads_prompt(settings, self.generator.generation_config):
            return by_length(starts)
        roomy = [index for index, prompt in enumerate(prompts) if self.room(prompt) + 1 >= settings["max_new_tokens"]]
        others = sorted(set(range(len(prompts))) - set(roomy))
        return filter(None, [roomy, *([others[n] for n in group] for group in by_length([starts[index] for index in others]))])

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
        rest = super().room_after(tokens)
        return self.max_tokens - 2 if rest >= 0 else rest  # the text has its own positions, in the decoder

    def generation_groups(self, prompts: list[str], starts: list[list[int]], settings: Named) -> Iterable[list[int]]:  # noqa: ARG002
        return [list(range(len(starts)))]  # an encoder masks the padding of shorter prompts
