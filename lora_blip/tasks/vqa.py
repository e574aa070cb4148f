"""Visual question answering: generate an answer for an image and a question."""

from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.errors import ConfigError
from lora_blip.metrics.vqa import accuracy, vqa_accuracy
from lora_blip.models.blip import BlipVqaLanguage
from lora_blip.models.loading import Backbone
from lora_blip.models.text_check import ONLY_UNKNOWN, UNBOUNDED
from lora_blip.runtime.untrusted import quoted
from lora_blip.tasks.base import Generation
from lora_blip.tasks.text_task import TextTask

TEMPLATE = "Question: {question} Answer:"  # the prompt of BLIP-2's authors (Li et al. 2023, arXiv:2301.12597, section 4.1)
NO_QUESTION = 'no question: the task is vqa, and needs lines {"image": …, "question": …, "answers": […]}; '
FOR_CAPTIONS = 'for captions, set TASK = "caption" (--task caption)'
OTHER_CHECKPOINT = "this checkpoint only answers questions; for captions: --model Salesforce/blip-image-captioning-base"


class VqaTask(TextTask):
    """Lines are {"image": …, "question": …, "answers": […]}. Only the answer is in the loss.

    A BlipForQuestionAnswering reads the question with its encoder. A captioning model reads it in the prompt: `prompt` is a
    template that contains {question}. If a line has several answers, the weight of each is its share of the votes, as in BLIP's
    code (Li et al. 2022, arXiv:2201.12086).
    """

    name = "vqa"
    takes_question = True
    correctness_name = "VQA accuracy"
    architectures = ("BlipForQuestionAnswering", "BlipForConditionalGeneration", "Blip2ForConditionalGeneration")
    example_checkpoint = "Salesforce/blip-vqa-base"
    score_names = ("vqa_accuracy",)

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.prompt = self.prompt or ("{question}" if isinstance(self.language, BlipVqaLanguage) else TEMPLATE)
        if self.prompt.count("{question}") != 1:
            raise ConfigError(
                f"prompt = {self.prompt!r}: a template for questions contains {{question}} once, such as {TEMPLATE!r}"
            )
        self.require_room(self.prompt.replace("{question}", ""))

    def prompt_of(self, example: Example) -> str:
        """Return the template of the line, or of the task if the line has none, with the question in it."""
        return (example.prompt or self.prompt).replace("{question}", example.question)

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        votes = Counter(example.answers)
        return [(answer, count / len(example.answers)) for answer, count in votes.items()]

    def check(self, example: Example) -> str:
        if not example.question:
            return NO_QUESTION + (OTHER_CHECKPOINT if isinstance(self.language, BlipVqaLanguage) else FOR_CAPTIONS)
        if not example.answers:
            return 'no answer: expected the key "answers", such as "answers": ["red"], or its name: --answer-key COLUMN'
        if problem := self.check_prompt(example):
            return problem
        if self._surely_fits(example):
            return ""
        room = self.room(example)
        answers = (self.checker.problem(answer, room) for answer in dict.fromkeys(example.answers))
        return self.check_question(example) or next(filter(None, answers), "")

    def texts_to_check(self, example: Example) -> tuple[str, ...]:
        return (example.question, self.prompt_of(example), *example.answers)

    def room(self, example: Example) -> int:
        """Return the number of tokens that an answer to the example's question may have."""
        return self.language.room_after(len(self.checker.ids(self.prompt_of(example))))

    def _surely_fits(self, example: Example) -> bool:
        """Return True if upper bounds show, without tokenizing, that the rest of `check` finds no problem."""
        bounds, prompt, room = self.checker.bounds, self.prompt_of(example), self.language.room_after
        longest = bounds.upper_bound_of_longest((prompt, *example.answers))
        if longest != UNBOUNDED and room(longest) >= longest:
            return True
        needed = bounds.upper_bound_of_longest(example.answers)
        if needed == UNBOUNDED:
            return False
        # the prompt contains the question
        return room(bounds.upper_bound(prompt)) >= needed or room(bounds.upper_bound(prompt, 0)) >= needed

    def check_question(self, example: Example) -> str:
        """Return why a question cannot be used, or ""."""
        if problem := self.check_prompt(example):
            return problem
        if self.room(example) < 1:
            return f"the question has too many tokens for this model: {example.question[:60]!r}; shorten it"
        ids = self.checker.ids(example.question)
        if problem := self.checker.special_token_problem(example.question, ids):
            return problem
        return f"the question {quoted(example.question)} {ONLY_UNKNOWN}" if self.checker.unknown.only_unknown(ids) else ""

    def all_texts(self, example: Example) -> tuple[str, ...]:
        return (example.question, *example.answers)

    def check_prompt(self, example: Example) -> str:
        """Return why the template of a line cannot be used, or ""."""
        if not example.prompt:
            return ""
        if example.prompt.count("{question}") != 1:
            return f"the prompt {quoted(example.prompt)} does not contain {{question}} exactly once; add it"
        return self.checker.special_token_problem(example.prompt, self.checker.ids(example.prompt.replace("{question}", "")))

    def subject(self, example: Example) -> tuple[Path | str, ...]:
        """Return the image, the question, and the question_id and template of the line if it has them."""
        extra = (str(example.question_id), example.prompt)
        return (example.image, example.question, *extra) if any(extra) else (example.image, example.question)

    def likelihood(self, tokens: Tensor) -> Tensor:
        """Return log p(answer), the sum over its tokens. So a ranking gives the probability of each answer, given the list."""
        return tokens.nansum(1)

    def scores(self, predictions: dict[Any, Any], examples: list[Example], extra: str = "") -> dict[str, float]:  # noqa: ARG002
        """Return the official VQA accuracy."""
        lines: dict[Any, list[Example]] = {}
        for example in examples:
            lines.setdefault(self.subject(example), []).append(example)
        references = [every_answer(lines[subject]) for subject in predictions]
        return {"vqa_accuracy": vqa_accuracy(list(predictions.values()), references)}

    def correctness(self, text: str, examples: list[Example]) -> float:
        return accuracy(text, every_answer(examples))


def every_answer(lines: list[Example]) -> list[str]:
    """Return the answers to one question, which may be on several lines."""
    return [answer for line in lines for answer in line.answers]
