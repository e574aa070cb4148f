"""Predict a text for each subject with one model, and score the predictions.

A subject is an image, or for VQA an image with a question. It has one prediction, and one or more lines of references.
"""

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
from lora_blip.runtime.counts import counted
from lora_blip.runtime.progress import subphase
from lora_blip.tasks.base import PredictionTask
from lora_blip.tasks.retrieval import RERANKED, relevance
from lora_blip.tasks.vqa import every_answer

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # (results, number of results) → the results, with a progress bar
DIRECTIONS = ("image→text", "text→image")


@dataclass(frozen=True)
class Column:
    """The value of a score for each subject, and the image of each subject. The bootstrap resamples images, not subjects."""

    values: list[float]
    images: list[Path]

    def interval(self, seed: int) -> Interval:
        """Return the mean and its bootstrap interval. A resample draws all questions of an image together."""
        row_of = {image: row for row, image in enumerate(dict.fromkeys(self.images))}
        if len(row_of) == len(self.values):
            return bootstrap.of_mean(self.values, seed=seed)
        table = np.zeros((len(row_of), 2))  # (images, 2) the sum of each image's values, and their number
        np.add.at(table, [row_of[image] for image in self.images], np.stack([self.values, np.ones(len(self.values))], axis=1))
        return bootstrap.of_sums(table, lambda sums: sums[..., 0] / sums[..., 1], seed=seed)

    def minus(self, other: "Column") -> "Column":
        """Return the difference of the two values for each subject."""
        return Column([a - b for a, b in zip(self.values, other.values, strict=True)], self.images)


@dataclass
class ModelScores:
    """The predictions and scores of one model. The lists have one entry per subject, in the order of `subjects`."""

    subjects: list[Any]
    lines: list[list[Example]]  # the lines of each subject
    texts: list[str]  # the predictions
    points: list[float]  # the main score of each subject; report.html is sorted by it
    right: list[bool]  # True if the prediction counts as right
    main_score: str  # the name of the score in `points`, such as "CIDEr"
    scores: dict[str, Interval | None] = field(default_factory=dict)  # None if a score cannot be computed
    # the scores that are means over subjects, with their value for each subject; `gains` pairs the values by subject
    columns: dict[str, Column] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # score → why it is missing, or how it was computed
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    coco: captions.Scores | None = None  # the captioning metrics


LOWER_IS_BETTER = ("mean rank", "median rank")
MOST_GROUPS = 20  # show no scores by group if there are more: then each image probably has its own group


def measure(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> ModelScores:
    """Predict and score every subject of `examples`. Images that cannot be read are reported and left out."""
    return MEASURES[runner.task.name](runner, examples, seed, progress)


def predict(runner: Runner, examples: list[Example], progress: Progress) -> tuple[list[Any], list[list[Example]], list[str]]:
    """Return the readable subjects, the lines of each, and the predicted text of each."""
    lines: dict[Any, list[Example]] = {}
    for example in examples:
        lines.setdefault(runner.task.subject(example), []).append(example)
    first_lines = [of_subject[0] for of_subject in lines.values()]
    results = runner.run(first_lines, lambda task, pictures, batch: task.predict(pictures, batch))
    texts = {runner.task.subject(example): text for example, text in progress(results, len(first_lines))}
    require_results(texts, examples)
    return list(texts), [lines[subject] for subject in texts], list(texts.values())


def require_results(results: Any, examples: list[Example]) -> None:
    """Raise DataError if there is no result, because no image can be read."""
    if not results:
        raise DataError(f"no image of {len({e.image for e in examples}):,} can be read; see the messages above")


def measure_captions(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> ModelScores:
    """Return the caption scores of COCO, exact match, and the diversity of the captions."""
    subjects, lines, texts = predict(runner, examples, progress)
    references = [[example.text for example in of_subject] for of_subject in lines]
    scores = caption_scores(texts, references, working=subphase)
    points = scores.per_image.get("CIDEr", scores.per_image["exact match"])
    right = [value == 1 for value in scores.per_image["exact match"]]
    result = ModelScores(subjects, lines, texts, points, right, "CIDEr" if "CIDEr" in scores.per_image else "exact match")
    with subphase("the intervals"):
        intervals = captions.intervals(scores, seed)
    for name in captions.NAMES:
        value = scores.values[name]
        result.scores[name] = None if value is None else intervals.get(name, Interval(value, np.nan, np.nan))
    result.columns = {"exact match": Column(scores.per_image["exact match"], [image_of(s) for s in subjects])}
    result.coco = scores
    result.notes |= scores.reasons
    if scores.tokenizer:
        result.facts["tokenizer of the scores"] = scores.tokenizer
    return with_diversity(result, references)


def measure_answers(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> ModelScores:
    """Return the official VQA accuracy, and the diversity of the answers."""
    subjects, lines, texts = predict(runner, examples, progress)
    answers = [every_answer(of_subject) for of_subject in lines]
    points = vqa_accuracies(texts, answers)
    result = ModelScores(subjects, lines, texts, points, [point > 0.5 for point in points], "VQA accuracy")
    result.columns = {"VQA accuracy": Column(points, [image_of(subject) for subject in subjects])}
    result.scores = {"VQA accuracy": result.columns["VQA accuracy"].interval(seed)}
    return with_diversity(result, answers)


def with_diversity(result: ModelScores, references: list[list[str]]) -> ModelScores:
    """Return the result with the diversity of its texts in the facts, and with a warning if too many texts are equal."""
    measured = diversity(result.texts, references)
    result.facts |= {
        "distinct texts": f"{measured.distinct} of {len(result.texts)}",
        "type-token ratio": f"{measured.type_token_ratio:.3f}",
    }
    result.warnings += [measured.warning] if measured.warning else []
    return result


# ---------------------------------------------------------------- retrieval


def measure_retrieval(runner: Runner, examples: list[Example], seed: int, progress: Progress) -> ModelScores:
    """Return recalls and ranks in both directions. ITC ranks all candidates, and ITM reranks the most probable ones."""
    first = {example.image: example for example in reversed(examples)}  # the first line of each image
    features = image_features(runner, [first[image] for image in dict.fromkeys(e.image for e in examples)], progress)
    require_results(features, examples)
    images = list(features)
    examples = [example for example in examples if example.image in features]
    texts = list(dict.fromkeys(example.text for example in examples))
    task: Any = runner.task
    text_features = task.encode_texts(texts).features
    logits = cosines_in_blocks(torch.stack(list(features.values())), text_features) / task.temperature.item()
    is_pair = relevance(examples, images, texts)  # (images, texts)
    by_image, by_text = rerank(runner, [first[image] for image in images], texts, logits, progress)
    ranks = retrieval.ranks(by_image, is_pair)[0], retrieval.ranks(by_text, is_pair)[1]
    lines: dict[Path, list[Example]] = {image: [] for image in images}
    for example in examples:
        lines[example.image].append(example)
    best_texts = [texts[column] for column in by_image.argmax(1)]
    points, is_first = (1 / ranks[0]).tolist(), (ranks[0] == 1).tolist()
    result = ModelScores(images, list(lines.values()), best_texts, points, is_first, "1 / rank")
    images_of_ranks = images, [images[row] for row in is_pair.argmax(0)]
    itc_ranks = retrieval.ranks(logits, is_pair)
    for direction, rank, rank_images, itc_rank in zip(DIRECTIONS, ranks, images_of_ranks, itc_ranks, strict=True):
        columns: dict[str, Any] = {f"R@{k} {direction}": rank <= k for k in retrieval.RECALLS}
        columns[f"mean rank {direction}"] = rank
        for name, values in columns.items():
            result.columns[name] = Column(values.astype(float).tolist(), rank_images)
            result.scores[name] = result.columns[name].interval(seed)
        for k in retrieval.RECALLS:
            result.notes[f"R@{k} {direction}"] = f"{(itc_rank <= k).mean():.1%} by ITC alone, without ITM"
        median = bootstrap.of_statistic(partial(median_at, rank), len(rank), seed=seed)
        result.scores[f"median rank {direction}"] = median
    reranked = min(RERANKED, len(texts))
    candidates = f"{counted(len(texts), 'text')}, {counted(len(images), 'image')}"
    result.facts = {"candidates": f"{candidates}; ITM reranks the {reranked} most probable"}
    return result


def median_at(values: Any, indices: Any) -> float:
    """Return the median of the values at these indices."""
    return float(np.median(values[indices]))


def image_features(runner: Runner, examples: list[Example], progress: Progress) -> dict[Path, torch.Tensor]:
    """Return {image: its features in the joint space, (views, width), on the CPU} for the readable images."""
    results = runner.run(examples, lambda task, pictures, batch: [f.image.cpu() for f in task.predict(pictures, batch)])
    return {example.image: features for example, features in progress(results, len(examples))}


def cosines_in_blocks(image_features: torch.Tensor, text_features: torch.Tensor) -> Any:
    """Return the cosines (images, texts), computed in blocks of images to bound the memory."""
    blocks = [cosines(block, text_features) for block in image_features.split(256)]
    return torch.cat(blocks).numpy().astype(np.float64)


def rerank(runner: Runner, examples: list[Example], texts: list[str], logits: Any, progress: Progress) -> tuple[Any, Any]:
    """Return two arrays of scores (images, texts): one to rank the texts of each image, one to rank the images of each text.

    logits: the ITC scores (images, texts). The best RERANKED texts of each image, and the best RERANKED images of each text,
    get the score ITC + ITM. All other pairs get ITC − FAR: they keep their order, and come after the reranked pairs.
    """
    by_image, by_text = logits - FAR, logits - FAR
    counts = min(RERANKED, len(texts)), min(RERANKED, len(examples))  # reranked texts per image, and images per text
    rows, columns = np.zeros_like(logits, dtype=bool), np.zeros_like(logits, dtype=bool)  # the pairs to rerank
    np.put_along_axis(rows, np.argpartition(-logits, counts[0] - 1, axis=1)[:, : counts[0]], True, axis=1)
    np.put_along_axis(columns, np.argpartition(-logits, counts[1] - 1, axis=0)[: counts[1]], True, axis=0)
    candidates = {example.image: np.flatnonzero(rows[i] | columns[i]) for i, example in enumerate(examples)}
    row_of = {example.image: i for i, example in enumerate(examples)}

    def match(task: Any, pictures: torch.Tensor, batch: list[Example]) -> list[Any]:
        return task.match(pictures, [[texts[j] for j in candidates[example.image]] for example in batch])

    for example, log_odds in progress(runner.run(examples, match), len(examples)):
        i, js = row_of[example.image], candidates[example.image]
        total = logits[i, js] + log_odds
        by_image[i, js] = np.where(rows[i, js], total, by_image[i, js])
        by_text[i, js] = np.where(columns[i, js], total, by_text[i, js])
    return by_image, by_text


FAR = 1e6  # subtracted from the score of each pair that is not reranked; larger than any score
MEASURES: dict[str, Callable[[Runner, list[Example], int, Progress], ModelScores]] = {
    "caption": measure_captions,
    "vqa": measure_answers,
    "retrieval": measure_retrieval,
}


def gains(base: ModelScores, adapted: ModelScores, task: PredictionTask, seed: int) -> dict[str, Interval]:
    """Return the interval of adapted − base for each score, paired by subject. Return {} if the subjects differ."""
    if base.subjects != adapted.subjects:
        return {}
    caption_gains = captions.gains(adapted.coco, base.coco, seed) if base.coco and adapted.coco else {}
    base_columns, adapted_columns = (scores.columns | group_columns(scores, task) for scores in (base, adapted))
    return {name: column.minus(base_columns[name]).interval(seed) for name, column in adapted_columns.items()} | caption_gains


def group_scores(scores: ModelScores, task: PredictionTask, seed: int) -> dict[str, Interval]:
    """Return the main score of each group of the references, if there are several groups."""
    return {name: column.interval(seed) for name, column in group_columns(scores, task).items()}


def group_columns(scores: ModelScores, task: PredictionTask) -> dict[str, Column]:
    """Return a column with the main score for each group of the references."""
    groups = list(dict.fromkeys(lines[0].group for lines in scores.lines))
    if not 1 < len(groups) <= MOST_GROUPS:
        return {}
    label, columns = task.correctness_name, {}
    column_of_all = scores.columns[label]
    for group in groups:
        indices = [i for i, lines in enumerate(scores.lines) if lines[0].group == group]
        column = Column([column_of_all.values[i] for i in indices], [column_of_all.images[i] for i in indices])
        columns[f"{label}: {group or 'no group'} ({len(indices)})"] = column
    return columns


def image_of(subject: Any) -> Path:
    """Return the image of a subject, which is an image or a tuple that starts with one."""
    return subject[0] if isinstance(subject, tuple) else subject
