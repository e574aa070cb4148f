"""Captioning: an image in, a text out, with or without a prompt before it."""

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_blip.config import ConfigError
from lora_blip.data.annotations import Example
from lora_blip.metrics.captions import COCO, caption_scores
from lora_blip.metrics.exact import exact_match
from lora_blip.models import Backbone
from lora_blip.tasks.task import Generation
from lora_blip.tasks.text import TextTask

COCO_KEYS = {name.lower().replace("-", "_"): name for name in COCO}  # "bleu_4": "BLEU-4"


class CaptionTask(TextTask):
    """`prompt` ("a picture of") stands before every caption; lines are {"image": …, "text": …}."""

    name = "caption"
    architectures = ("BlipForConditionalGeneration", "Blip2ForConditionalGeneration")
    such_as = "Salesforce/blip-image-captioning-base"
    score_names = ("exact_match", *COCO_KEYS)

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.require_room(self.prompt)

    def prompt_of(self, example: Example) -> str:  # noqa: ARG002
        return self.prompt

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        return [(example.text, 1.0)]

    def check(self, example: Example) -> str:
        return self.unusable(example.text, self.room) if example.text else "no text: captioning needs one"

    @cached_property
    def room(self) -> int:
        """Tokens for a caption after the prompt."""
        return self.language.room(self.prompt)

    def subject(self, example: Example) -> Path:
        return example.image

    def likelihood(self, tokens: Tensor) -> Tensor:
        """The mean over a text's tokens, so that long captions are not punished for their length."""
        return tokens.nanmean(1)

    def scores(self, predictions: dict[Any, Any], examples: list[Example], wanted: str = "") -> dict[str, float]:
        """Exact match with any text of the image; the captioning metrics when one of them is wanted."""
        texts: dict[Any, list[str]] = {image: [] for image in predictions}
        for example in examples:
            texts[example.image].append(example.text)
        said, right = list(predictions.values()), list(texts.values())
        found = {"exact_match": exact_match(said, right)}
        return found | coco_score(said, right, wanted) if wanted in COCO_KEYS else found


def coco_score(said: list[str], right: list[list[str]], wanted: str) -> dict[str, float]:
    """One of the captioning metrics, by its key. Raises ConfigError, with the reason, where it cannot be had."""
    name = COCO_KEYS[wanted]
    scores = caption_scores(said, right, [name])
    value = scores.values[name]
    if value is None:
        raise ConfigError(f"{name} cannot be computed: {scores.reasons[name]}")
    return {wanted: value}
