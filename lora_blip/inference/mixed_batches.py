"""Predict with several adapters in one batch. Each row uses the adapter of its request."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.errors import ConfigError
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.prediction import Prediction, generated, prediction_of
from lora_blip.tasks.base import PredictionTask


def mixed(
    tasks: Mapping[str, PredictionTask],
    requests: Iterable[tuple[str | Path, str, str]],
    batch_size: int = 16,
    precision: str = "fp32",
) -> Iterator[Prediction]:
    """Yield the predictions for requests (image, adapter, question or ""), in order. A batch can have rows of several adapters.

    tasks: {adapter: its caption or vqa task}, all on one backbone; "" is the base. Each text equals the text that its adapter
    generates alone. An image that cannot be read is reported and left out. Raise ConfigError if the tasks cannot
    share a batch, or if a request names an adapter that is not in `tasks`.
    """
    first: Any = next(iter(tasks.values()))
    for name, task in tasks.items():
        if task.backbone is not first.backbone or not task.writes_text or task.generation != first.generation:
            raise ConfigError(
                f"{name!r} and {next(iter(tasks))!r} cannot share a batch: both need the same backbone, a task that "
                "writes text, and the same `task.generation`"
            )

    def example(request: tuple[str | Path, str, str]) -> Example:
        image, name, question = request
        if name not in tasks:
            raise ConfigError(
                f"a request names the adapter {name!r}; use one of {', '.join(map(repr, tasks))}, or add its task to `tasks`"
            )
        return replace(example_of(image, question), group=name)

    def generate(task: Any, pictures: Tensor, examples: list[Example]) -> list[Prediction]:
        prompts = [cast(Any, tasks[e.group]).prompt_of(e) for e in examples]
        rows = pictures, prompts, [e.group or None for e in examples]
        if task.generation.texts > 1:
            scored = task.language.generate_scored(*rows, **task.generation.arguments())
            return [generated(e, texts) for e, texts in zip(examples, scored, strict=True)]
        texts = task.language.generate(*rows, **task.generation.arguments())
        return [prediction_of(e, text) for e, text in zip(examples, texts, strict=True)]

    for _, prediction in Runner(first, batch_size, precision).run(map(example, requests), generate):
        yield prediction
