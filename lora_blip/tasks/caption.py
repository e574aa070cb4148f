"""Captioning: an image in, a text out, with or without a prompt before it."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_blip.config import ConfigError
from lora_blip.data.annotations import Example
from lora_blip.data.batches import Stack
from lora_blip.metrics.exact import exact_match
from lora_blip.models import Backbone
from lora_blip.tasks.sequences import IGNORE, Rows, language_of, plain_ids


@dataclass(frozen=True)
class Generation:
    """How a caption is written; an adapter carries the settings that it was validated with."""

    max_new_tokens: int = 40
    num_beams: int = 1
    do_sample: bool = False


@dataclass(frozen=True)
class Batch:
    examples: list[Example]
    pixel_values: Tensor  # (images, 3, H, W)
    rows: Rows
    label_tokens: int  # counted before the rows leave the CPU, so that nothing waits for the device


@dataclass
class CaptionTask:
    """The prompt stands before every caption and is never in the loss."""

    backbone: Backbone
    prompt: str = ""
    generation: Generation = field(default_factory=Generation)

    def __post_init__(self) -> None:
        self.prompt = self.prompt.strip()
        self.language = language_of(self.backbone)
        tokenizer, config = self.backbone.tokenizer, self.backbone.model.config
        special = {*tokenizer.all_special_ids, getattr(config, "image_token_index", None)}
        self.special_ids = special - {tokenizer.unk_token_id, None}
        prompt_ids = plain_ids(tokenizer, self.prompt)
        self.room = self.language.longest - len(prompt_ids) - 2  # tokens for a text, beside the first and the last one
        if reason := self._special(self.prompt, prompt_ids):
            raise ConfigError(f"prompt = {self.prompt!r}: {reason}")
        if self.room < self.generation.max_new_tokens:
            raise ConfigError(
                f"max_new_tokens = {self.generation.max_new_tokens}: beside the prompt, the model has room for {self.room}"
            )

    def batch(self, stack: Stack) -> Batch:
        device = self.backbone.device
        rows = self.language.rows(self.prompt, [example.text for example in stack.examples])
        return Batch(stack.examples, stack.pixel_values.to(device, non_blocking=True), rows.to(device), rows.label_tokens)

    def logits(self, batch: Batch) -> Tensor:
        return self.language.logits(batch.pixel_values, batch.rows)

    def loss(self, batch: Batch) -> Tensor:
        """Summed cross-entropy over the label tokens, in float32: divide by their number over the whole step."""
        return token_loss(self.logits(batch), batch.rows.targets)

    @torch.no_grad()
    def predict(self, pixel_values: Tensor) -> list[str]:
        return self.language.generate(pixel_values, self.prompt, **asdict(self.generation))

    def score(self, predictions: list[str], references: list[list[str]]) -> float:
        return exact_match(predictions, references)

    def check_text(self, text: str) -> str:
        """Why a text cannot be learned, or ""."""
        tokenizer = self.backbone.tokenizer
        ids = plain_ids(tokenizer, text)
        if not set(ids) - {tokenizer.unk_token_id}:
            return f"the text {text!r} is only unknown tokens for this model's tokenizer"
        if len(ids) > self.room:
            return f"the text has {len(ids)} tokens, and the model has room for {self.room}"
        return self._special(text, ids)

    def _special(self, text: str, ids: list[int]) -> str:
        """Why a text with a special token in it, <image> or [SEP], cannot be used, or ""."""
        found = [i for i in ids if i in self.special_ids]
        tokens = self.backbone.tokenizer.convert_ids_to_tokens(found[:1])
        return f"{text!r} holds {tokens[0]!r}, which means something else here" if found else ""

    def metadata(self) -> dict[str, Any]:
        """What an adapter file says of its task."""
        return {"name": "caption", "prompt": self.prompt, "generation": asdict(self.generation)}


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log p(target) over the positions that count; logits (rows, tokens, vocabulary), targets (rows, tokens)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
