"""Captioning: an image in, a text out, with or without a prompt before it."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.errors import ConfigError
from lora_blip.metrics.captions import COCO, caption_scores
from lora_blip.metrics.exact import exact_match
from lora_blip.models.loading import Backbone
from lora_blip.tasks.base import Generation
from lora_blip.tasks.text_task import TextTask

COCO_KEYS = {name.lower().replace("-", "_"): name for name in COCO}  # "bleu_4": "BLEU-4"


class CaptionTask(TextTask):
    """`prompt` ("a picture of") comes before every caption; lines are {"image": …, "text": …}.

    A line with a "prompt" of its own has that one instead.
    """

    name = "caption"
    architectures = ("BlipForConditionalGeneration", "Blip2ForConditionalGeneration")
    example_checkpoint = "Salesforce/blip-image-captioning-base"
    score_names = ("exact_match", *COCO_KEYS)

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.require_room(self.prompt)
        self.faults: dict[str, str] = {}  # prompts of lines → why they cannot be used, or ""
        self.rooms: dict[str, int] = {}  # prompts → tokens for a caption after them

    def prompt_of(self, example: Example) -> str:
        return example.prompt or self.prompt

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        return [(example.text, 1.0)]

    def check(self, example: Example) -> str:
        if not example.text:
            return "no text: captioning needs one"
        return self.check_prompt(example) or self.text_problem(example.text, self.room(self.prompt_of(example)))

    def room(self, prompt: str) -> int:
        """Tokens for a caption after a prompt."""
        if prompt not in self.rooms:
            self.rooms[prompt] = self.language.room(prompt)
        return self.rooms[prompt]

    def check_prompt(self, example: Example) -> str:
        """Why a line's own prompt cannot be used, or ""."""
        if example.prompt not in self.faults:
            self.faults[example.prompt] = self.prompt_fault(example.prompt) if example.prompt else ""
        return self.faults[example.prompt]

    def subject(self, example: Example) -> Path | tuple[Path, str]:
        """An image, or one of its prompts: each prompt has a caption of its own."""
        return (example.image, example.prompt) if example.prompt else example.image

    def likelihood(self, tokens: Tensor) -> Tensor:
        """The mean over a text's tokens, so that long captions are not punished for their length."""
        return tokens.nanmean(1)

    def scores(self, predictions: dict[Any, Any], examples: list[Example], wanted: str = "") -> dict[str, float]:
        """Exact match with any text of the image; the captioning metrics when one of them is wanted."""
        texts: dict[Any, list[str]] = {subject: [] for subject in predictions}
        for example in examples:
            texts[self.subject(example)].append(example.text)
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
