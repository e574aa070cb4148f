"""The interface of a task: which examples it accepts, how it is trained, and what it predicts.

`Task` has two halves. Training calls `TrainingTask`, prediction calls `PredictionTask`; both share `BaseTask`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # comes with torch

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.errors import ConfigError
from lora_blip.metrics.exact import exact_match
from lora_blip.models.generation import without_effect
from lora_blip.models.loading import Backbone
from lora_blip.models.text_check import TextChecker
from lora_blip.runtime.settings import Options
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.accents import lost_accents

Rows = TypeVar("Rows", default=Any)  # the tokenized texts of a batch


@dataclass(frozen=True)
class Generation:
    """How texts are generated. An adapter file contains the settings that the adapter was validated with, but not the seed."""

    max_new_tokens: int = 40
    num_beams: int = 1
    do_sample: bool = False
    options: Options = Options()  # other fields of transformers' GenerationConfig
    seed: int = 0  # of random draws

    @classmethod
    def of(cls, values: Mapping[str, Any], seed: int = 0) -> "Generation":
        """Return the Generation for a dict that `stored` returned. An option that is None counts as missing."""
        given = {name: value for name, value in values.items() if value is not None}
        named = {name: given.pop(name) for name in ("max_new_tokens", "num_beams", "do_sample") if name in given}
        return cls(**named, options=Options(given), seed=seed)

    def stored(self) -> dict[str, Any]:
        """Return the settings for an adapter file."""
        return {
            "max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "do_sample": self.do_sample, **self.options
        }  # fmt: skip

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `Language.generate`, without options that have no effect."""
        ignored = without_effect(Options(self.stored())) if self.options else {}
        return {name: value for name, value in self.stored().items() if name not in ignored} | {"seed": self.seed}

    @property
    def texts(self) -> int:
        """Return the number of texts for each image."""
        return int(self.options.get("num_return_sequences", 1))


class ImageEncoder(Protocol):
    """The part of a model that encodes images: a `Language` or a `Matcher`."""

    model: Any

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Return the features (images, states, width) of images (images, 3, H, W): the input of the text side."""

    def project_vision(self, states: Tensor) -> Tensor:
        """Return the features that `encode_images` computes from the ViT's output (images, tokens, width)."""


class BaseTask(ABC):
    """The base of both halves. Raise ConfigError for a prompt or a checkpoint that the task cannot use."""

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]  # the checkpoints that it supports
    example_checkpoint: ClassVar[str]  # one of them, for messages
    takes_question: ClassVar[bool] = False  # True: an example has a question, and its prediction is an answer
    writes_text: ClassVar[bool] = True  # True: a prediction is a generated text
    correctness_name: ClassVar[str] = "exact match"  # what `correctness` returns
    needs_negatives: ClassVar[bool] = False  # True: the loss compares lines, so a dataset's item has one line
    score_names: ClassVar[tuple[str, ...]]  # names of `scores`; higher is better; the first selects the best adapter
    encoder: ImageEncoder
    checker: TextChecker

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        self.backbone, self.prompt, self.generation = backbone, prompt.strip(), generation or Generation()
        self.prompt_warning = ""  # about unknown tokens in the prompt
        if backbone.architecture not in self.architectures:
            raise ConfigError(
                f"task = {self.name!r}: {backbone.name!r} is a {backbone.architecture}; "
                f"give a checkpoint of {' or '.join(self.architectures)}, such as {self.example_checkpoint}"
            )

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained in addition to the adapters."""
        return []

    def move(self, device: torch.device) -> None:
        """Move the model to another device, in fp32."""
        self.backbone.model.to(device).float()
        self.backbone.device = device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    @abstractmethod
    def metadata(self) -> dict[str, Any]:
        """Return the task's entry in an adapter file."""

    def load_metadata(self, metadata: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `metadata` returned, except the prompt and the generation settings."""

    # ---- examples

    @abstractmethod
    def subject(self, example: Example) -> Any:
        """Return the key of an example's prediction. Examples with the same subject share one prediction."""

    def trim(self, example: Example) -> Example:
        """Return the example with the prompt removed from the start of its texts; the same object if no text starts with it."""
        return example

    @abstractmethod
    def check(self, example: Example) -> str:
        """Return why a line cannot be used for training, or ""."""

    def check_prompt(self, example: Example) -> str:  # noqa: ARG002
        """Return why the prompt of a line cannot be used, or ""."""
        return ""

    def all_texts(self, example: Example) -> tuple[str, ...]:
        """Return the texts of a line."""
        return (example.text,)

    def texts_to_check(self, example: Example) -> tuple[str, ...]:
        """Return the texts that `check` may tokenize."""
        return (example.text,)

    def pretokenize(self, examples: list[Example]) -> None:
        """Tokenize the texts that `check` needs for these lines, in one call. This halves the time, and is never required."""
        self.checker.pretokenize([self.texts_to_check(example) for example in examples])

    def unknown_report(self, examples: list[Example]) -> str:
        """Return the share of unknown tokens in the prompt and in lines given to `pretokenize`, with examples, or "".

        Add a line if the tokenizer removes accents.
        """
        lines = ((example.line, self.all_texts(example)) for example in examples)
        texts = (" ".join(each.answers) if each.question else each.words for each in examples)  # no question is generated
        accents = lost_accents(self.backbone.tokenizer, texts)
        return "\n".join(filter(None, [self.prompt_warning, printable(accents), self.checker.unknown.report(lines)]))


class TrainingTask(BaseTask, Generic[Rows]):
    """A batch and its loss. `Rows` is the type of the tokenized texts of a batch."""

    packs = True  # BLIP-2 may pack texts; false: a resumed run that began before it could, and must round as before

    def prepare_data(self, examples: list[Example]) -> None:
        """Collect the data that the loss needs from all lines. The caller calls it before the first batch."""

    @abstractmethod
    def batch(self, host_batch: HostBatch, prefix: Any = None) -> DeviceBatch[Rows]:
        """Return the batch with its texts tokenized, on the model's device.

        prefix: the `frozen_prefix.Prefix` that computed the cached states of the batch, if there are any.
        """

    @abstractmethod
    def loss(self, batch: DeviceBatch[Rows], features: Tensor | None = None) -> Tensor:
        """Return the summed loss, float32. The caller divides it by the sum of `batch.count` over the step.

        features: those of the batch's images (images, states, width), if they are computed already.
        """

    def compile_loss(self, **options: Any) -> bool:  # noqa: ARG002
        """Compile the loss with its backward pass. Return False if this task cannot. options: of `torch.compile`."""
        return False

    def repeatable_loss(self, batch: DeviceBatch[Rows]) -> Tensor:
        """Return `loss` without random draws and without choices that depend on rounding, to compare two computations."""
        return self.loss(batch)

    @abstractmethod
    def logits(self, batch: DeviceBatch[Rows]) -> Tensor:
        """Return all logits of the batch in one tensor, for the checks before the first step."""

    @abstractmethod
    def wrong_labels(self, batch: DeviceBatch[Rows]) -> str:
        """Return why the labels of a batch do not match its examples, or ""."""

    @abstractmethod
    def label_table(self, batch: DeviceBatch[Rows]) -> str:
        """Return the input tokens and the labels of the first rows, for the user to read."""

    def require_score(self, name: str) -> None:
        """Raise ConfigError if validation computes no score of this name."""
        if name not in ("auto", "loss", *self.score_names):
            raise ConfigError(f"best_by = {name!r}: expected one of auto, loss, {', '.join(self.score_names)}")


class PredictionTask(BaseTask):
    """Predictions and their scores."""

    @abstractmethod
    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[Any]:
        """Return a prediction for each example. `adapters` names the adapter of each row, None for the base."""

    def predict_scored(
        self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None
    ) -> list[list[tuple[Any, float]]]:
        """Return the predictions for each example with their scores from 0 to 1; NaN if the task computes none.

        The first one for each example is that of `predict`.
        """
        return [[(prediction, math.nan)] for prediction in self.predict(pixel_values, examples, adapters)]

    @abstractmethod
    def predict_from_features(self, features: Tensor, examples: list[Example]) -> list[Any]:
        """Return what `predict` does, given the features of each example's image (examples, states, width)."""

    def encode_texts(self, texts: list[str]) -> Any:
        """Return what `rank` can compute from the texts alone. It depends on the adapters: if they change, call this again."""
        return texts

    @abstractmethod
    def rank(self, pixel_values: Tensor, examples: list[Example], texts: Any) -> Tensor:
        """Return the probability of each text for each image, (images, texts), float32. Each row sums to 1.

        texts: a list, or the result of `encode_texts`.
        """

    @abstractmethod
    def output_modules(self) -> list[nn.Module]:
        """Return the modules whose outputs decide a prediction."""

    @abstractmethod
    def scores(self, predictions: dict[Any, Any], examples: list[Example], extra: str = "") -> dict[str, float]:
        """Return scores by name. predictions: {subject: prediction}. extra: a score that is not computed by default."""

    def correctness(self, text: str, examples: list[Example]) -> float:
        """Return the score of a predicted text, 0 to 1, given the lines of its subject. 1: it equals a text of a line."""
        return exact_match([text], [[example.text for example in examples]])


class Task(TrainingTask[Rows], PredictionTask):
    """A task over a backbone."""
