"""What every task is: its own inputs, labels, loss, prediction and scores, over one backbone."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_blip.config import ConfigError
from lora_blip.data.annotations import Example
from lora_blip.data.batches import Stack
from lora_blip.metrics.exact import exact_match
from lora_blip.models import Backbone
from lora_blip.tasks.rows import plain_ids, special_ids


@dataclass(frozen=True)
class Generation:
    """How a text is written; an adapter carries the settings that it was validated with."""

    max_new_tokens: int = 40
    num_beams: int = 1
    do_sample: bool = False


@dataclass(frozen=True)
class Batch:
    examples: list[Example]
    pixel_values: Tensor  # (images, 3, H, W)
    rows: Any  # the texts, as the task reads them
    count: float  # what the summed loss is divided by over a whole step; known before anything waits for the device


class Task:
    """A task over a backbone. Raises ConfigError for a prompt or a checkpoint that it cannot use."""

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]  # the checkpoints that can do it
    such_as: ClassVar[str]  # one of them
    score_names: ClassVar[tuple[str, ...]]  # what `scores` can give, more is better; the first picks the best adapter
    prompt: str
    generation: Generation

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        self.backbone, self.prompt, self.generation = backbone, prompt.strip(), generation or Generation()
        if backbone.architecture not in self.architectures:
            raise ConfigError(
                f"task = {self.name!r}: {backbone.name!r} is a {backbone.architecture}; "
                f"give a checkpoint of {' or '.join(self.architectures)}, such as {self.such_as}"
            )
        image = getattr(backbone.model.config, "image_token_index", None)
        self.special_ids = special_ids(backbone.tokenizer) | ({image} - {None})

    def require_score(self, name: str) -> None:
        """ConfigError if validation gives no score of that name."""
        if name not in ("auto", "loss", *self.score_names):
            raise ConfigError(f"best_by = {name!r}: {self.name} has auto, loss, {', '.join(self.score_names)}")

    # ---- training

    def know(self, examples: list[Example]) -> None:
        """All lines of the data, before any of them is learned from."""

    def check(self, example: Example) -> str:
        """Why a line cannot be learned from, or ""."""
        raise NotImplementedError

    def unusable(self, text: str, room: int) -> str:
        """Why a text cannot be learned or matched where there is room for so many tokens, or ""."""
        tokenizer = self.backbone.tokenizer
        ids = plain_ids(tokenizer, text)
        if not set(ids) - {tokenizer.unk_token_id}:
            return f"the text {text!r} is only unknown tokens for this model's tokenizer"
        if len(ids) > room:
            return f"the text has {len(ids)} tokens, and the model has room for {room}"
        return self.special(text, ids)

    def special(self, text: str, ids: list[int]) -> str:
        """Why a text with a special token in it, <image> or [SEP], cannot be used, or ""."""
        found = [i for i in ids if i in self.special_ids]
        tokens = self.backbone.tokenizer.convert_ids_to_tokens(found[:1])
        return f"{text!r} holds {tokens[0]!r}, which means something else here" if found else ""

    def batch(self, stack: Stack) -> Batch:
        """Examples and their pictures → tensors on the model's device."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss, float32: divide by `batch.count` over the whole step."""
        raise NotImplementedError

    def logits(self, batch: Batch) -> Tensor:
        """All that the batch makes the model say, in one tensor: for the proofs before the first step."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """What is trained beside the adapters."""
        return []

    def wrong_labels(self, batch: Batch) -> str:
        """Why the labels of a batch are not its examples' own, or ""."""
        raise NotImplementedError

    def label_table(self, batch: Batch) -> str:
        """What the model reads and what it must say, for the user to look at."""
        raise NotImplementedError

    # ---- prediction

    def subject(self, example: Example) -> Any:
        """What one prediction is about: examples of one subject share it."""
        raise NotImplementedError

    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[Any]:
        """One prediction an example. `adapters` names the adapter of each row, None for the base."""
        raise NotImplementedError

    def read(self, texts: list[str]) -> Any:
        """Texts as `rank` takes them: what of them needs no image is computed once. Read again when adapters change."""
        return texts

    def rank(self, pixel_values: Tensor, examples: list[Example], texts: Any) -> Tensor:
        """How well each text fits each image, as a distribution: (images, texts), float32, every row sums to 1.

        texts: a list of them, or what `read` made of it.
        """
        raise NotImplementedError

    def scores(self, predictions: dict[Any, Any], examples: list[Example], wanted: str = "") -> dict[str, float]:
        """Figures by name, from subject → prediction; `wanted` names one that is not computed each time."""
        raise NotImplementedError

    def correctness(self, text: str, examples: list[Example]) -> float:
        """How right one text is, 0 to 1, for a subject with these lines: 1 if it is one of theirs."""
        return exact_match([text], [[example.text for example in examples]])

    def move(self, device: torch.device) -> None:
        """Go on computing on another device, in fp32."""
        self.backbone.model.to(device).float()
        self.backbone.device = device
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)

    # ---- what an adapter file says of its task

    def metadata(self) -> dict[str, Any]:
        raise NotImplementedError

    def recall(self, about: dict[str, Any]) -> None:
        """Take up what `metadata` kept beside the prompt and the generation."""
