"""Predictions from Python: captions, answers and rankings of images, a batch at a time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.errors import ConfigError
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.prediction import Prediction
from lora_blip.inference.predictor import Predictor
from lora_blip.tasks.base import PredictionTask


def captions(
    task: PredictionTask, images: Iterable[str | Path], batch_size: int = 16, precision: str = "fp32"
) -> Iterator[Prediction]:
    """Captions in the order of `images`, a batch at a time; an image that cannot be read is reported and left out.

    Raises ConfigError for a task that does not caption.
    """
    if task.name != "caption":
        raise ConfigError(f"captions() of a task {task.name!r}; call answers() for questions, rankings() to rank texts")
    yield from (p for _, p in predictions(Runner(task, batch_size, precision), map(example_of, images)))


def answers(
    task: PredictionTask, questions: Iterable[tuple[str | Path, str]], batch_size: int = 16, precision: str = "fp32"
) -> Iterator[Prediction]:
    """Answers to (image, question) pairs, in their order. Raises ConfigError for a task that does not answer."""
    if not task.takes_question:
        raise ConfigError(f"answers() of a task {task.name!r}; call captions(), or rankings() to rank texts")
    examples = (example_of(image, question) for image, question in questions)
    yield from (p for _, p in predictions(Runner(task, batch_size, precision), examples))


def rankings(
    task: PredictionTask, images: Iterable[str | Path], texts: list[str], question: str = "", precision: str = "fp32"
) -> Iterator[Prediction]:
    """Yield for each image all texts, ordered by how well they fit, with probabilities that sum to 1."""
    examples = (example_of(image, question) for image in images)
    yield from (p for _, p in predictions(Runner(task, precision=precision), examples, texts))


def mixed(
    tasks: Mapping[str, PredictionTask],
    requests: Iterable[tuple[str | Path, str, str]],
    batch_size: int = 16,
    precision: str = "fp32",
) -> Iterator[Prediction]:
    """Yield the predictions for requests (image, adapter, question or ""), in order. A batch may have rows of several adapters.

    tasks: {adapter: its caption or vqa task}, on one backbone; "" is the base. Each text equals the one that its adapter gives
    alone. Raise ConfigError if the tasks cannot share a batch, or if a request names another adapter.
    """
    first: Any = next(iter(tasks.values()))
    for name, task in tasks.items():
        if task.backbone is not first.backbone or not task.writes_text or task.generation != first.generation:
            raise ConfigError(f"{name!r} and {next(iter(tasks))!r} need one backbone, texts to say, and one `task.generation`")

    def example(request: tuple[str | Path, str, str]) -> Example:
        image, name, question = request
        if name not in tasks:
            raise ConfigError(f"a request names the adapter {name!r}; there is a task for {', '.join(map(repr, tasks))}")
        return replace(example_of(image, question), group=name)

    def say(task: Any, pictures: Tensor, some: list[Example]) -> list[str]:
        prompts = [cast(Any, tasks[e.group]).prompt_of(e) for e in some]
        texts: list[str] = task.language.generate(pictures, prompts, [e.group or None for e in some], **asdict(task.generation))
        return texts

    for found, text in Runner(first, batch_size, precision).run(map(example, requests), say):
        yield Prediction(found.image, text, found.question)


def predictions(
    runner: Runner, examples: Iterable[Example], texts: list[str] | None = None
) -> Iterator[tuple[Example, Prediction]]:
    """Each example with what the task says of it, or with the texts ranked where there are some."""
    return runner.run(examples, Predictor(texts or []))
