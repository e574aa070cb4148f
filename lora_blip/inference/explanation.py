"""Explain generated texts: the probability of each word, and where it attends in the image. Write explain.html."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from torch import Tensor

from lora_blip.config import InferConfig
from lora_blip.data.example import Example
from lora_blip.data.image_sources import open_example
from lora_blip.data.preprocessing import WHOLE, Part, pixels_of, visible_part
from lora_blip.errors import ConfigError, ImageError
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.finished import example_of_line, key_of, lines_of
from lora_blip.models.attention_maps import token_maps, word_of_tokens
from lora_blip.models.token_rows import token_names
from lora_blip.reports.explanation import ImageView, TextView, WordView, write
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.runs import EXPLAIN_NAME
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.tasks.base import PredictionTask
from lora_blip.tasks.text_task import TextTask

LIMIT = 20  # largest number of images and questions: each has a map per word, layer and model
END = "(end)"  # the end token, which has a probability but no word
FORMULAS = {
    "blip": "The map of a word is the cross-attention of the text decoder over the patches, mean over heads.",
    "vqa": "The map of a word is A · E: A is the attention of the answer decoder over the words of the question, E that of the "
    "question encoder over the patches (mean over its layers and heads). The product is an approximation.",
    "blip-2": "The map of a word is A · E: A is the attention of the language model over the query tokens, divided "
    "by its sum; E is the cross-attention of the Q-Former over the patches (mean over its layers and heads). The product is an "
    "approximation.",
}  # fmt: skip


def require_explainable(config: InferConfig, examples: Iterable[Example]) -> None:
    """Raise ConfigError if `explain` is set and there are texts to rank or more than LIMIT images.

    Every task that generates no text needs texts to rank, so no other check of the task is necessary.
    """
    if not config.explain:
        return
    if config.texts:
        raise ConfigError(
            "EXPLAIN (--explain) needs a generated text, whose words have probabilities; a ranking has none, so remove "
            "--explain, or caption the images without TEXTS (--texts)"
        )
    require_few(examples)


def require_few(examples: Iterable[Example]) -> None:
    """Raise ConfigError if there are more than LIMIT examples."""
    some = list(islice(examples, LIMIT + 1))
    if len(some) > LIMIT:
        first = quoted_for_shell(str(some[0].image))
        raise ConfigError(
            f"EXPLAIN (--explain) is for at most {LIMIT} images or questions; name fewer, such as --images {first}"
        )


def saved_texts(path: Path, key: str) -> dict[int, str]:
    """Return the texts in the lines of predictions.jsonl by `key_of`. key: "text", or "base_text" for those of the base."""
    lines = list(lines_of(path)) if path.exists() else []
    return {key_of(example_of_line(line)): str(line[key]) for line in lines if key in line}


def explained(
    runner: Runner, examples: Iterable[Example], texts: Callable[[], dict[int, str]], model: str
) -> list[dict[int, TextView]]:
    """Return a list with the result of `explain`, or an empty list if it fails. Print the reason; the run continues."""
    views = attempt(f"explanation of the {model}", lambda: explain(runner, examples, texts(), model))
    return [] if views is None else [views]


def explain(runner: Runner, examples: Iterable[Example], texts: dict[int, str], model: str) -> dict[int, TextView]:
    """Return the words of each text with probabilities and maps, by `key_of`. Leave out an example without a text.

    model: the name of the model that generated the texts, "base" or "adapter".
    """
    chosen = [example for example in examples if key_of(example) in texts]
    runner.checked = True  # the maps use the plain path, so there is nothing to compare
    results = runner.run_with_errors(chosen, partial(text_views, texts=texts, model=model))
    return {key_of(example): result for example, result in results if not isinstance(result, ImageError)}


def text_views(
    task: PredictionTask, pictures: Tensor, examples: list[Example], texts: dict[int, str], model: str
) -> list[TextView]:
    """Return the view of the text of each example. pictures: (images, 3, H, W)."""
    assert isinstance(task, TextTask)  # checked by require_explainable
    return [text_view(task, picture[None], e, texts[key_of(e)], model) for picture, e in zip(pictures, examples, strict=True)]


def text_view(task: TextTask, picture: Tensor, example: Example, text: str, model: str) -> TextView:
    """Return the words of a text, and after them the end token. The tokens of a word have a mean map and a product of p."""
    maps = token_maps(task.language, picture, task.prompt_of(example), text)
    probabilities, names = maps.probabilities.double().cpu().numpy(), token_names(task.backbone.tokenizer, maps.ids)
    attention, share = maps.attention.double().cpu().numpy(), maps.share.double().cpu().numpy()
    words = text.split()
    word_of = word_of_tokens(task.language, maps.ids[:-1], words)
    views = []
    for index, word in enumerate([*words, END]):
        own = [len(maps.ids) - 1] if index == len(words) else [n for n, number in enumerate(word_of) if number == index]
        if not own:  # the tokenizer has no token for this word
            views.append(WordView(word, None, [], None, None))
            continue
        tokens = [(names[n], float(probabilities[n])) for n in own]
        layers, parts = attention[:, own].mean(1), share[:, own].mean(1)
        views.append(WordView(word, float(np.prod([p for _, p in tokens])), tokens, layers, parts))
    return TextView(model, text, views)


def write_explanation(
    folder: Path, task: PredictionTask, examples: Iterable[Example], views: list[dict[int, TextView]], facts: dict[str, str]
) -> Path:
    """Write explain.html into the folder of the run, and return the path. views: one dict for each model, the base first."""
    images, pictures = [], {}
    for example in examples:
        texts = [of_model[key_of(example)] for of_model in views if key_of(example) in of_model]
        images.append(ImageView(example.image, example.question, example.prompt, texts, part_of(task, example)))
        pictures[example.image] = example
    kind = "vqa" if task.backbone.architecture == "BlipForQuestionAnswering" else task.backbone.family
    path = folder / EXPLAIN_NAME
    return write(path, images, facts, FORMULAS[kind], lambda image: open_example(pictures[image]))


def part_of(task: PredictionTask, example: Example) -> Part:
    """Return the part of an image that the model sees, or the whole image if it cannot be read."""
    processor = task.backbone.image_processor
    try:
        return WHOLE if pixels_of(processor).exact else visible_part(processor, *open_example(example).size)
    except ImageError:
        return WHOLE  # the page shows the reason in place of the image
