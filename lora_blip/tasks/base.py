"""The base class of the tasks: inputs, labels, loss, prediction and scores over one backbone."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_blip.data.example import Example
from lora_blip.data.loader import CachedStates, HostBatch
from lora_blip.errors import ConfigError
from lora_blip.metrics.exact import exact_match
from lora_blip.models.loading import Backbone
from lora_blip.models.token_bounds import TokenBounds
from lora_blip.models.token_rows import many_ids, plain_ids, special_ids
from lora_blip.models.unknown_tokens import REMEDY, UnknownTokens
from lora_blip.runtime.untrusted import quoted

ONLY_UNKNOWN = f"has only tokens that this model's tokenizer does not know; {REMEDY}"


@dataclass(frozen=True)
class Generation:
    """How texts are generated. An adapter file contains the settings that the adapter was validated with."""

    max_new_tokens: int = 40
    num_beams: int = 1
    do_sample: bool = False


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the model's device, made by `Task.batch` from a `HostBatch`."""

    examples: list[Example]
    pixel_values: Tensor  # (images without cached states, 3, H, W)
    rows: Any  # the tokenized texts, in the form that the task uses
    count: float  # the summed loss is divided by the total of a step; a number of Python, so nothing waits for the device
    image_index: Tensor | None = None  # (examples,) the image of each example; None: example i has image i
    cached_states: CachedStates | None = None  # of images that are not in pixel_values
    packed: Any = None  # the same texts in the form that trains fastest; None: use `rows`

    @property
    def images(self) -> int:
        return len(self.pixel_values) + (len(self.cached_states.indices) if self.cached_states else 0)

    def per_example(self, values: Tensor) -> Tensor:
        """Return values of images (images, …) as values of examples (examples, …)."""
        return values if self.image_index is None else values[self.image_index]


class Task:
    """A task over a backbone. Raise ConfigError for a prompt or a checkpoint that it cannot use."""

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]  # the checkpoints that it supports
    example_checkpoint: ClassVar[str]  # one of them, for messages
    takes_question: ClassVar[bool] = False  # an example has a question, and its prediction is an answer
    writes_text: ClassVar[bool] = True  # a prediction is a generated text
    needs_negatives: ClassVar[bool] = False  # the loss compares the lines of a batch, so each image has one line in it
    score_names: ClassVar[tuple[str, ...]]  # what `scores` can return, higher is better; the first selects the best adapter
    prompt: str
    generation: Generation

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        self.backbone, self.prompt, self.generation = backbone, prompt.strip(), generation or Generation()
        self.prefix: Any = None  # a `frozen_prefix.Prefix` if the states before the first adapter are cached
        if backbone.architecture not in self.architectures:
            raise ConfigError(
                f"task = {self.name!r}: {backbone.name!r} is a {backbone.architecture}; "
                f"give a checkpoint of {' or '.join(self.architectures)}, such as {self.example_checkpoint}"
            )
        image = getattr(backbone.model.config, "image_token_index", None)
        self.special_ids: set[Any] = special_ids(backbone.tokenizer) | ({image} - {None})
        self.prompt_warning = ""
        self.pretokenized: dict[str, list[int]] = {}  # text → its tokens, for the texts that are checked next
        self.known_lengths: dict[str, int] = {}  # text → its number of tokens, until `fit_generation` has used it

    def require_score(self, name: str) -> None:
        """Raise ConfigError if validation computes no score of this name."""
        if name not in ("auto", "loss", *self.score_names):
            raise ConfigError(f"best_by = {name!r}: {self.name} has auto, loss, {', '.join(self.score_names)}")

    # ---- training

    def prepare_data(self, examples: list[Example]) -> None:
        """Collect what the loss needs to know about all lines of the data. Called before the first batch."""

    def trim(self, example: Example) -> Example:
        """Return the example without a prompt at the start of its texts; the same object if there is none."""
        return example

    def check(self, example: Example) -> str:
        """Return why a line cannot be used for training, or ""."""
        raise NotImplementedError

    def pretokenize(self, examples: list[Example]) -> None:
        """Tokenize together the texts that `check` needs for these lines. This takes half the time and changes no result."""
        lines, longest = [self.texts_to_check(example) for example in examples], self.bounds.longest_word
        if longest:
            lines = [texts for texts in lines if not (joined := "".join(texts)).isascii() or len(joined) > longest]
        doubtful = sorted({text for texts in lines for text in texts if text and not self.bounds.has_no_unknown(text)})
        self.pretokenized = many_ids(self.backbone.tokenizer, doubtful) if doubtful else {}
        self.unknown_tokens.note(self.pretokenized)
        self.known_lengths |= {text: len(ids) for text, ids in self.pretokenized.items()}

    def all_texts(self, example: Example) -> tuple[str, ...]:
        """Return the texts of a line."""
        return (example.text,)

    def unknown_report(self, examples: list[Example]) -> str:
        """Return the share of unknown tokens in the prompt and in the lines given to `pretokenize`, with examples, or ""."""
        lines = ((example.line, self.all_texts(example)) for example in examples)
        return "\n".join(filter(None, [self.prompt_warning, self.unknown_tokens.report(lines)]))

    def texts_to_check(self, example: Example) -> tuple[str, ...]:
        """Return the texts that `check` may tokenize."""
        return (example.text,)

    @cached_property
    def bounds(self) -> TokenBounds:
        return TokenBounds(self.backbone.tokenizer, self.special_ids)

    @cached_property
    def unknown_tokens(self) -> UnknownTokens:
        return UnknownTokens(self.backbone.tokenizer, self.special_ids)

    def token_ids(self, text: str) -> list[int]:
        return self.pretokenized.get(text) or plain_ids(self.backbone.tokenizer, text)

    def text_problem(self, text: str, room: int) -> str:
        """Return why a text cannot be used if the model has room for `room` tokens, or ""."""
        if self.bounds.at_most(text, room) <= room:
            return ""
        ids = self.token_ids(text)
        if self.unknown_tokens.nothing_left(ids):
            return f"the text {quoted(text)} {ONLY_UNKNOWN}"
        if len(ids) > room:
            return f"the text has {len(ids)} tokens, and the model has room for {room}"
        return self.special_token_problem(text, ids)

    def special_token_problem(self, text: str, ids: list[int]) -> str:
        """Return why a text with a special token, such as <image> or [SEP], cannot be used, or ""."""
        special = [i for i in ids if i in self.special_ids]
        tokens = self.backbone.tokenizer.convert_ids_to_tokens(special[:1])
        return f"{text!r} contains {tokens[0]!r}, which the model uses as a special token; remove it" if special else ""

    def batch(self, host_batch: HostBatch) -> DeviceBatch:
        """Return the batch with its texts tokenized, on the model's device."""
        raise NotImplementedError

    def encode_batch(self, batch: DeviceBatch) -> Tensor:
        """Return the features of each image of a batch, as `encode_images` does, from cached states if there are any."""
        if batch.cached_states and self.prefix:
            return self.prefix.encode_images(batch.pixel_values, batch.cached_states)
        return self.encode_images(batch.pixel_values)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the features (images, states, width) of images (images, 3, H, W): the input of the text side."""
        raise NotImplementedError

    def project_vision(self, states: Tensor) -> Tensor:
        """Return the features that `encode_images` computes from the ViT's output (images, tokens, width)."""
        raise NotImplementedError

    def image_tensors(self, host_batch: HostBatch) -> dict[str, Any]:
        """Return the arguments of DeviceBatch that describe the images, on the model's device."""
        device, cached = self.backbone.device, host_batch.cached_states
        return {
            "pixel_values": host_batch.pixel_values.to(device, non_blocking=True),
            "image_index": None if host_batch.image_index is None else torch.tensor(host_batch.image_index, device=device),
            "cached_states": cached and cached._replace(states=cached.states.to(device, non_blocking=True)),
        }

    def loss(self, batch: DeviceBatch, features: Tensor | None = None) -> Tensor:
        """Return the summed loss, float32. The caller divides it by the sum of `batch.count` over the step.

        features: those of the batch's images, if they are computed already.
        """
        raise NotImplementedError

    def repeatable_loss(self, batch: DeviceBatch) -> Tensor:
        """Return `loss` without random draws and without choices that depend on rounding, to compare two computations."""
        return self.loss(batch)

    def logits(self, batch: DeviceBatch) -> Tensor:
        """Return all logits of the batch in one tensor, for the checks before the first step."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained in addition to the adapters."""
        return []

    def wrong_labels(self, batch: DeviceBatch) -> str:
        """Return why the labels of a batch do not match its examples, or ""."""
        raise NotImplementedError

    def label_table(self, batch: DeviceBatch) -> str:
        """Return the input tokens and the labels of the first rows, for the user to read."""
        raise NotImplementedError

    # ---- prediction

    def subject(self, example: Example) -> Any:
        """Return the key of an example's prediction. Examples with the same subject share one prediction."""
        raise NotImplementedError

    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[Any]:
        """Return a prediction for each example. `adapters` names the adapter of each row, None for the base."""
        raise NotImplementedError

    def predict_scored(
        self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None
    ) -> list[tuple[str, float]]:
        """Return generated texts, each with its score from 0 to 1, of a task that writes text."""
        raise NotImplementedError

    def predict_from_features(self, features: Tensor, examples: list[Example]) -> list[Any]:
        """Return what `predict` does, given the features of each example's image (examples, states, width)."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str]) -> Any:
        """Return the texts for `rank`, with the part that needs no image computed. It is outdated if adapters change."""
        return texts

    def rank(self, pixel_values: Tensor, examples: list[Example], texts: Any) -> Tensor:
        """Return how well each text fits each image, (images, texts), float32. Every row is a distribution.

        texts: a list, or the result of `encode_texts`.
        """
        raise NotImplementedError

    def scores(self, predictions: dict[Any, Any], examples: list[Example], extra: str = "") -> dict[str, float]:
        """Return scores by name, from subject → prediction. `extra` names one that is not computed by default."""
        raise NotImplementedError

    def correctness(self, text: str, examples: list[Example]) -> float:
        """Return the score of one text, 0 to 1, for a subject with these lines. 1: it is equal to one of their texts."""
        return exact_match([text], [[example.text for example in examples]])

    def move(self, device: torch.device) -> None:
        """Move the model to another device, in fp32."""
        self.backbone.model.to(device).float()
        self.backbone.device = device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    # ---- the task's entry in an adapter file

    def metadata(self) -> dict[str, Any]:
        raise NotImplementedError

    def load_metadata(self, metadata: dict[str, Any]) -> None:
        """Restore what `metadata` contains in addition to the prompt and the generation settings."""
