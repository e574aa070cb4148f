"""Predict and score each task: scores with intervals, and the scores of each subject."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_blip.data.example import Example
from lora_blip.errors import DataError
from lora_blip.inference.batch_runner import Runner
from lora_blip.metrics import bootstrap, captions, retrieval
from lora_blip.metrics.bootstrap import Interval
from lora_blip.metrics.captions import caption_scores
from lora_blip.metrics.diversity import diversity
from lora_blip.metrics.vqa import vqa_accuracies
from lora_blip.models.matching import cosines
from lora_blip.tasks.base import Task
from lora_blip.tasks.retrieval import RERANKED, belongs
from lora_blip.tasks.vqa import every_answer

Progress = Callable[[Iterable[Any], int], Iterable[Any]]
ONE_WAY = {"image_to_text": "image→text", "text_to_image": "text→image"}


@dataclass(frozen=True)
class Column:
    """Values of some subjects, with the image of each. The bootstrap draws images."""

    values: list[float]
    images: list[Path]

    def interval(self, seed: int) -> Interval:
        """Return the interval of the mean over resampled images. Questions about one image are drawn together."""
        row_of = {image: row for row, image in enumerate(dict.fromkeys(self.images))}
        if len(row_of) == len(self.values):
            return bootstrap.of_mean(self.values, seed=seed)
        table = np.zeros((len(row_of), 2))  # sum and number of each image's values
        np.add.at(table, [row_of[image] for image in self.images], np.stack([self.values, np.ones(len(self.values))], axis=1))
        return bootstrap.of_sums(table, lambda sums: sums[..., 0] / sums[..., 1], seed=seed)

    def minus(self, other: "Column") -> "Column":
        """Return the difference for each subject."""
        return Column([a - b for a, b in zip(self.values, other.values, strict=True)], self.images)


@dataclass
class Measured:
    """The predictions and scores of one model. Lists are in the order of `subjects`."""

    subjects: list[Any]
    lines: list[list[Example]]  # the lines of each subject
    texts: list[str]  # the predictions
    points: list[float]  # the score of each, which sorts the report
    right: list[bool]
    main: str  # name of the score in `points`
    scores: dict[str, Interval | None] = field(default_factory=dict)
    each: dict[str, Column] = field(default_factory=dict)  # the scores that are means of values, for paired differences
    notes: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    coco: captions.Scores | None = None


LOWER_IS_BETTER = ("mean rank", "median rank")
MOST_GROUPS = 20  # with more, the groups are probably names of images


def measure(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> Measured:
    """Predict and score every subject of `examples`. Report images that cannot be read, and leave them out."""
    return MEASURES[runner.task.name](runner, examples, seed, progress)


def predicted(runner: Runner, examples: list[Example], progress: Progress) -> tuple[list[Any], list[list[Example]], list[str]]:
    """Return the subjects, the lines of each, and the predicted texts."""
    lines: dict[Any, list[Example]] = {}
    for example in examples:
        lines.setdefault(runner.task.subject(example), []).append(example)
    first = [some[0] for some in lines.values()]
    found = runner.run(first, lambda task, pictures, some: task.predict(pictures, some))
    said = {runner.task.subject(example): text for example, text in progress(found, len(first))}
    require_some(said, examples)
    return list(said), [lines[subject] for subject in said], list(said.values())


def require_some(found: Any, examples: list[Example]) -> None:
    """Raise DataError if no image could be read."""
    if not found:
        raise DataError(f"none of the {len({e.image for e in examples})} images can be read; see the messages above")


def measure_captions(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> Measured:
    """Return the caption scores of COCO, exact match, and the diversity of the captions."""
    subjects, lines, texts = predicted(runner, examples, progress)
    references = [[example.text for example in some] for some in lines]
    scores = caption_scores(texts, references)
    points = scores.per_image.get("CIDEr", scores.per_image["exact match"])
    right = [value == 1 for value in scores.per_image["exact match"]]
    made = Measured(subjects, lines, texts, points, right, "CIDEr" if "CIDEr" in scores.per_image else "exact match")
    intervals = captions.intervals(scores, seed)
    for name in captions.NAMES:
        value = scores.values[name]
        made.scores[name] = None if value is None else intervals.get(name, Interval(value, np.nan, np.nan))
    made.each, made.coco = {"exact match": Column(scores.per_image["exact match"], [image_of(s) for s in subjects])}, scores
    made.notes |= scores.reasons
    if scores.tokenizer:
        made.facts["tokenizer of the scores"] = scores.tokenizer
    return varied(made, references)


def measure_answers(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> Measured:
    """Return the official VQA accuracy, and the diversity of the answers."""
    subjects, lines, texts = predicted(runner, examples, progress)
    answers = [every_answer(some) for some in lines]
    points = vqa_accuracies(texts, answers)
    made = Measured(subjects, lines, texts, points, [point > 0.5 for point in points], "VQA accuracy")
    made.each = {"VQA accuracy": Column(points, [image_of(subject) for subject in subjects])}
    made.scores = {"VQA accuracy": made.each["VQA accuracy"].interval(seed)}
    return varied(made, answers)


def varied(made: Measured, references: list[list[str]]) -> Measured:
    found = diversity(made.texts, references)
    made.facts |= {
        "distinct texts": f"{found.distinct} of {len(made.texts)}", "type-token ratio": f"{found.type_token_ratio:.3f}",
    }  # fmt: skip
    made.warnings += [found.warning] if found.warning else []
    return made


# ---------------------------------------------------------------- retrieval


def measure_retrieval(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> Measured:
    """Return recalls and ranks both ways, with ITC only and with the likeliest candidates reranked by ITM."""
    first = {example.image: example for example in reversed(examples)}
    features = image_features(runner, [first[image] for image in dict.fromkeys(e.image for e in examples)], progress)
    require_some(features, examples)
    images = list(features)
    examples = [example for example in examples if example.image in features]
    texts = list(dict.fromkeys(example.text for example in examples))
    task: Any = runner.task
    logits = blocked(torch.stack(list(features.values())), task.encode_texts(texts).features) / task.temperature.item()
    right = belongs(examples, images, texts)
    by_image, by_text = reranked(runner, [first[image] for image in images], texts, logits, progress)
    ranks = retrieval.ranks(by_image, right)[0], retrieval.ranks(by_text, right)[1]
    best = by_image.argmax(1)
    lines: dict[Path, list[Example]] = {image: [] for image in images}
    for example in examples:
        lines[example.image].append(example)
    points, found_first = (1 / ranks[0]).tolist(), (ranks[0] == 1).tolist()
    made = Measured(images, list(lines.values()), [texts[i] for i in best], points, found_first, "1 / rank")
    owners = images, [images[row] for row in right.argmax(0)]  # the image of each rank
    itc = dict(zip(ONE_WAY, retrieval.ranks(logits, right), strict=True))
    for way, found, about in zip(ONE_WAY, ranks, owners, strict=True):
        columns: dict[str, Any] = {f"R@{most} {ONE_WAY[way]}": found <= most for most in retrieval.RECALLS}
        columns[f"mean rank {ONE_WAY[way]}"] = found
        for name, values in columns.items():
            made.each[name] = Column(values.astype(float).tolist(), about)
            made.scores[name] = made.each[name].interval(seed)
        for most in retrieval.RECALLS:
            made.notes[f"R@{most} {ONE_WAY[way]}"] = f"{(itc[way] <= most).mean():.1%} by ITC alone"
        made.scores[f"median rank {ONE_WAY[way]}"] = bootstrap.of_statistic(partial(median_at, found), len(found), seed=seed)
    again = min(RERANKED, len(texts))
    made.facts = {"candidates": f"{len(texts)} texts, {len(images)} images; ITM reranks the {again} likeliest"}
    return made


def median_at(values: Any, places: Any) -> float:
    return float(np.median(values[places]))


def image_features(runner: Runner, examples: list[Example], progress: Progress) -> dict[Path, torch.Tensor]:
    """Return each readable image with its features in the joint space (views, width), on the CPU."""
    found = runner.run(examples, lambda task, pictures, some: [f.image.cpu() for f in task.predict(pictures, some)])
    return {example.image: features for example, features in progress(found, len(examples))}


def blocked(seen: torch.Tensor, read: torch.Tensor) -> Any:
    """Return the cosines (images, texts), computed in blocks of images."""
    return torch.cat([cosines(part, read) for part in seen.split(256)]).numpy().astype(np.float64)


def reranked(runner: Runner, examples: list[Example], texts: list[str], logits: Any, progress: Progress) -> tuple[Any, Any]:
    """Return scores (images, texts) twice: with the texts of each image reranked, and with the images of each text reranked."""
    by_image, by_text = logits - FAR, logits - FAR  # below the reranked candidates, in the order of ITC
    most = min(RERANKED, len(texts)), min(RERANKED, len(examples))
    rows, columns = np.zeros_like(logits, dtype=bool), np.zeros_like(logits, dtype=bool)
    np.put_along_axis(rows, np.argpartition(-logits, most[0] - 1, axis=1)[:, : most[0]], True, axis=1)
    np.put_along_axis(columns, np.argpartition(-logits, most[1] - 1, axis=0)[: most[1]], True, axis=0)
    wanted = {example.image: np.flatnonzero(rows[i] | columns[i]) for i, example in enumerate(examples)}
    number = {example.image: i for i, example in enumerate(examples)}

    def odds(task: Any, pictures: torch.Tensor, some: list[Example]) -> list[Any]:
        return task.match(pictures, [[texts[j] for j in wanted[example.image]] for example in some])

    for example, found in progress(runner.run(examples, odds), len(examples)):
        i, places = number[example.image], wanted[example.image]
        together = logits[i, places] + found
        by_image[i, places] = np.where(rows[i, places], together, by_image[i, places])
        by_text[i, places] = np.where(columns[i, places], together, by_text[i, places])
    return by_image, by_text


FAR = 1e6
MEASURES: dict[str, Callable[[Runner, list[Example], int, Progress], Measured]] = {
    "caption": measure_captions,
    "vqa": measure_answers,
    "retrieval": measure_retrieval,
}


def gains(base: Measured, adapted: Measured, task: Task, seed: int) -> dict[str, Interval]:
    """Return intervals of adapted − base over the same subjects, by score. Return {} if the subjects differ."""
    if base.subjects != adapted.subjects:
        return {}
    found = {}
    if base.coco and adapted.coco:
        found = captions.gains(adapted.coco, base.coco, seed)
    first, second = (made.each | grouped(made, task) for made in (base, adapted))
    return {name: second[name].minus(first[name]).interval(seed) for name in second} | found


def by_group(made: Measured, task: Task, seed: int) -> dict[str, Interval]:
    """Return the main score within each group of the references, if there are several groups."""
    return {name: column.interval(seed) for name, column in grouped(made, task).items()}


def grouped(made: Measured, task: Task) -> dict[str, Column]:
    """Return the values of the main score by group."""
    groups = list(dict.fromkeys(some[0].group for some in made.lines))
    if not 1 < len(groups) <= MOST_GROUPS:
        return {}
    label = {"vqa": "VQA accuracy", "retrieval": "R@1 image→text"}.get(task.name, "exact match")
    found = {}
    for group in groups:
        places = [i for i, some in enumerate(made.lines) if some[0].group == group]
        column = Column([made.each[label].values[i] for i in places], [made.each[label].images[i] for i in places])
        found[f"{label}: {group or 'no group'} ({len(places)})"] = column
    return found


def image_of(subject: Any) -> Path:
    """Return the image of a subject, which is an image or a tuple that starts with one."""
    return subject[0] if isinstance(subject, tuple) else subject
