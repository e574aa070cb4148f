"""Write the outputs of an evaluation: metrics.json, comparison.csv and report.html. Format the table of scores to print."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_blip.config import EvaluateConfig
from lora_blip.data.example import Example
from lora_blip.data.leaks import Leak
from lora_blip.evaluation.measures import LOWER_IS_BETTER, ModelScores, gains, group_scores, image_of
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.setup import work_of
from lora_blip.lora.adapter_file import Adapter
from lora_blip.metrics.bootstrap import Interval
from lora_blip.reports import report
from lora_blip.reports.report import Card
from lora_blip.reports.score_table import ReportRow, joined
from lora_blip.runtime.counts import counted
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.files import csv_text, write_whole
from lora_blip.runtime.runs import METRICS_NAME
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import PredictionTask

FILES = ("metrics.json", "comparison.csv", report.FILE_NAME)
LEGEND = "[95 % interval]"  # the first cell of the table on the terminal


@dataclass(frozen=True)
class Comparison:
    """The scores of the base and of the adapter on the same references. None for a model that was not run."""

    base: ModelScores | None
    adapted: ModelScores | None

    @property
    def main(self) -> ModelScores:
        """Return the scores of the adapter, or of the base if there is no adapter."""
        scores = self.adapted or self.base
        assert scores is not None
        return scores

    def base_results(self) -> dict[Any, tuple[str, float]]:
        """Return {subject: (text, score)} of the base."""
        return (
            dict(zip(self.base.subjects, zip(self.base.texts, self.base.points, strict=True), strict=True)) if self.base else {}
        )


def write(
    folder: Path, config: EvaluateConfig, comparison: Comparison, rows: list[ReportRow], facts: dict[str, str],
    warnings: list[str], leaks: list[Leak], adapter: Adapter | None,
) -> list[Path]:  # fmt: skip
    """Write the files of an evaluation and return their paths. If the table or report.html cannot be written, print why."""
    metrics, table, page = (folder / name for name in FILES)
    write_whole(metrics, metrics_json(rows, facts, warnings, leaks, config).encode("utf-8", "backslashreplace"))
    rows_of_texts = comparison_csv(comparison).encode("utf-8-sig", "replace")  # Excel needs the byte order mark
    attempt(table.name, lambda: write_whole(table, rows_of_texts))
    title = f"{facts['task']} on {config.references}"
    cards, curves = cards_of(comparison, leaks), read_curves(adapter)
    model, score = "adapted" if comparison.adapted else "base", comparison.main.main_score
    attempt(
        "report", lambda: report.write(page, title, rows, cards, curves, facts, warnings, model_name=model, score_name=score)
    )
    return [path for path in (metrics, table, page) if path.exists()]


# ---------------------------------------------------------------- scores and facts


def score_rows(comparison: Comparison, task: PredictionTask, seed: int) -> list[ReportRow]:
    """Return the rows of the score table: every score, then the main score of each group."""
    base, adapted = comparison.base, comparison.adapted
    paired = gains(base, adapted, task, seed) if base and adapted else {}
    of_base, of_adapted = ({**model.scores, **group_scores(model, task, seed)} if model else {} for model in (base, adapted))
    rows = []
    for name in of_adapted or of_base:
        note = note_of(name, {"adapted": adapted, "base": base})
        is_rank = name.startswith(LOWER_IS_BETTER)
        is_share = not is_rank and not name.startswith("CIDEr")
        comparable = not any(model and model.coco and name in model.coco.meaningless for model in (base, adapted))
        scores = of_base.get(name), of_adapted.get(name)
        rows.append(ReportRow(name, *scores, note, is_rank, is_share, paired.get(name), comparable))
    return rows


def note_of(name: str, models: dict[str, ModelScores | None]) -> str:
    """Return the note about a score: that of the first model that has one. If another has none, it starts with the model."""
    notes = {who: model.notes.get(name, "") for who, model in models.items() if model}
    who, note = next(((who, note) for who, note in notes.items() if note), ("", ""))
    return note if all(notes.values()) or not note else f"{who}: {note}"


def facts_of(
    config: EvaluateConfig, adapter: Adapter | None, runner: Runner, scores: ModelScores, examples: list[Example]
) -> dict[str, str]:
    """Return the facts to show with the scores: base, adapter, number of images, precision, prompt …"""
    task, size = runner.task, runner.task.backbone.image_size
    facts = {"base": task.backbone.name, "task": task.name, "references": config.references}
    if adapter:
        facts["adapter"] = str(adapter.path)
        facts["trained"] = work_of(adapter)
    if task.backbone.chosen_size:
        facts["images"] = f"{size}×{size} pixels, positions interpolated"
    if task.prompt:
        facts["prompt"] = task.prompt
    scored = f"{len({image_of(s) for s in scores.subjects})} of {counted(len({e.image for e in examples}), 'image')}"
    questions = f", {counted(len(scores.subjects), 'question')}" * task.takes_question
    facts |= {"scored": scored + questions, "precision": runner.precision, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    return facts | {key: str(value) for key, value in scores.facts.items()}


def metrics_json(
    rows: list[ReportRow], facts: dict[str, str], warnings: list[str], leaks: list[Leak], config: EvaluateConfig
) -> str:
    """Return the content of metrics.json."""
    scores = {
        row.name: {"base": numbers(row.base), "adapted": numbers(row.adapted), "gain": numbers(row.gain), "note": row.note}
        for row in rows
    }
    pairs = [{"evaluation": str(leak.evaluation), "training": str(leak.training), "kind": leak.kind} for leak in leaks]
    content = {"scores": scores, "facts": facts, "warnings": warnings, "leaks": pairs, "settings": asdict(config)}
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def numbers(interval: Interval | None) -> dict[str, float | None] | None:
    """Return an interval for JSON, with null instead of NaN."""
    if interval is None or math.isnan(interval.value):
        return None
    return {key: None if math.isnan(value) else value for key, value in interval._asdict().items()}


# ---------------------------------------------------------------- texts


def comparison_csv(comparison: Comparison) -> str:
    """Return a CSV with a row per subject: image, question, references, both texts, and their scores."""
    scores, base_results = comparison.main, comparison.base_results()
    names = ["image", "question", "references", "base", "adapted", f"base {scores.main_score}", scores.main_score, "group"]
    rows: list[list[object]] = [[*names, "question_id", "prompt"]]
    for subject, lines, text, point in zip(scores.subjects, scores.lines, scores.texts, scores.points, strict=True):
        base_text, base_point = base_results.get(subject, ("", ""))
        adapted_text, adapted_point = (text, point) if comparison.adapted else ("", "")
        first = lines[0]
        inputs = [first.image, first.question, " | ".join(references_of(lines))]
        columns = [base_text, adapted_text, base_point, adapted_point, first.group, first.question_id, first.prompt]
        rows.append([*inputs, *columns])
    return csv_text(rows)


def references_of(lines: list[Example]) -> list[str]:
    """Return the reference texts of a subject, without duplicates."""
    return list(dict.fromkeys(text for line in lines for text in (line.answers or (line.text,))))


def cards_of(comparison: Comparison, leaks: list[Leak]) -> list[Card]:
    """Return a card of report.html for each subject."""
    scores, base_results = comparison.main, comparison.base_results() if comparison.adapted else {}
    leaked = {leak.evaluation: f"{leak.kind} as {leak.training}" for leak in leaks}
    cards = []
    columns = zip(scores.subjects, scores.lines, scores.texts, scores.points, scores.right, strict=True)
    for subject, lines, text, point, right in columns:
        base_text, base_point = base_results.get(subject, ("", None))
        first = lines[0]
        card = Card(
            first.image, references_of(lines), text, base_text, first.question, point, base_point, first.group,
            leaked=leaked.get(first.image, ""), right=right,
        )  # fmt: skip
        cards.append(card)
    return cards


def read_curves(adapter: Adapter | None) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl in the adapter's folder, or [] if there is none."""
    path = adapter.path.parent / METRICS_NAME if adapter else None
    if path is None or not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        entries += [entry] if isinstance(entry, dict) else []
    return entries


# ---------------------------------------------------------------- the terminal


def score_table(rows: list[ReportRow], warnings: Iterable[str]) -> str:
    """Return the warnings, then a line per score: base, adapted, and the gain, each with its 95 % interval."""
    lines, rows = [printable(f"WARNING: {warning}") for warning in warnings], joined(rows)
    names = [printable(row.name) for row in rows]
    width = max(map(len, [*names, LEGEND])) + 2
    lines.append(f"{LEGEND:<{width}}{'base':>24}{'adapted':>24}{'gain':>26}")
    for row, name in zip(rows, names, strict=True):
        base, adapted, gain = (interval_text(interval, bool(row.share)) for interval in (row.base, row.adapted, gain_of(row)))
        note = printable(f"  {row.note}") if row.note else ""
        lines.append(f"{name:<{width}}{base:>24}{adapted:>24}{gain:>26}{note}")
    return "\n".join(lines)


def gain_of(row: ReportRow) -> Interval | None:
    """Return the gain of a row, or None if a score is missing or has no meaning.

    If only the difference of the two scores is known, it has no interval.
    """
    if not row.comparable:
        return None
    if row.gain or row.base is None or row.adapted is None:
        return row.gain
    return Interval(row.adapted.value - row.base.value, math.nan, math.nan)


def interval_text(interval: Interval | None, is_share: bool) -> str:
    """Return an interval as text, such as "97.1 % [94.0, 99.0]"."""
    if interval is None:
        return "–"
    scale, digits, unit = (100, 1, " %") if is_share else (1, 3, "")
    value, low, high = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in interval)  # + 0.0 avoids −0.0
    return f"{value}{unit}" if math.isnan(interval.low) else f"{value}{unit} [{low}, {high}]"
