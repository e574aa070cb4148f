"""Captioning: generate a text for an image, with or without a prompt."""

from pathlib import Path
from typing import Any

from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.errors import ConfigError
from lora_blip.metrics.captions import COCO, caption_scores
from lora_blip.metrics.exact import exact_match
from lora_blip.models.loading import Backbone
from lora_blip.runtime.progress import subphase
from lora_blip.tasks.base import Generation
from lora_blip.tasks.text_task import TextTask

IS_QUESTION = "it is a question, and the task is captioning; "
FOR_QUESTIONS = (
    'for questions, set TASK = "vqa" (--task vqa), or choose a checkpoint for questions (--model Salesforce/blip-vqa-base); '
    'if its answer is a caption, write it as "text"; in a chat, write only <image> in the turn of the user'
)
COCO_KEYS = {name.lower().replace("-", "_"): name for name in COCO}  # "bleu_4": "BLEU-4"


class CaptionTask(TextTask):
    """Lines are {"image": …, "text": …}. `prompt`, such as "a picture of", comes before every caption.

    The "prompt" of a line replaces it for that line.
    """

    name = "caption"
    architectures = ("BlipForConditionalGeneration", "Blip2ForConditionalGeneration")
    example_checkpoint = "Salesforce/blip-image-captioning-base"
    score_names = ("exact_match", *COCO_KEYS)

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.require_room(self.prompt)
        self.line_prompts: dict[str, tuple[str, int]] = {}  # prompt of a line → the result of `examine_prompt`; a cache

    def prompt_of(self, example: Example) -> str:
        return example.prompt or self.prompt

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        return [(example.text, 1.0)]

    def check(self, example: Example) -> str:
        if not example.text:
            return IS_QUESTION + FOR_QUESTIONS if example.question else 'no text: captioning needs one; add the key "text"'
        problem, room = self.line_prompts.get(example.prompt) or self.examine_prompt(example.prompt)
        return problem or self.checker.problem(example.text, room)

    def check_prompt(self, example: Example) -> str:
        """Return why the prompt of a line cannot be used, or ""."""
        return (self.line_prompts.get(example.prompt) or self.examine_prompt(example.prompt))[0]

    def examine_prompt(self, prompt: str) -> tuple[str, int]:
        """Return why the prompt of a line cannot be used, or "", and the largest number of tokens of a caption after it.

        If the line has no prompt, the task's prompt is used, which `require_room` has checked.
        """
        examined = (self.prompt_problem(prompt) if prompt else "", self.language.room(prompt or self.prompt))
        self.line_prompts[prompt] = examined
        return examined

    def subject(self, example: Example) -> Path | tuple[Path, str]:
        """Return the image, with the line's prompt if there is one: each prompt of an image has its own caption."""
        return (example.image, example.prompt) if example.prompt else example.image

    def likelihood(self, tokens: Tensor) -> Tensor:
        """Return the mean over a text's tokens, so that long captions do not have lower scores."""
        return tokens.nanmean(1)

    def scores(self, predictions: dict[Any, Any], examples: list[Example], extra: str = "") -> dict[str, float]:
        """Return the exact match with any text of the image, and `extra` if it is a captioning metric."""
        texts: dict[Any, list[str]] = {subject: [] for subject in predictions}
        for example in examples:
            texts[self.subject(example)].append(example.text)
        captions, references = list(predictions.values()), list(texts.values())
        scores = {"exact_match": exact_match(captions, references)}
        return scores | coco_score(captions, references, extra) if extra in COCO_KEYS else scores


def coco_score(captions: list[str], references: list[list[str]], key: str) -> dict[str, float]:
    """Return one of the captioning metrics. Raise ConfigError, with the reason, if it cannot be computed."""
    name = COCO_KEYS[key]
    scores = caption_scores(captions, references, [name], subphase)
    value = scores.values[name]
    if value is None:
        raise ConfigError(f"{name} cannot be computed: {scores.reasons[name]}")
    return {key: value}
