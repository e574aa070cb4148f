"""`python -m lora_blip evaluate`: compare base and adapter on images with known texts."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # comes with transformers

from lora_blip.config import EvaluateConfig
from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.leaks import Leak, find_leaks, leak_warning
from lora_blip.errors import ConfigError, DataError
from lora_blip.evaluation import measures
from lora_blip.evaluation.measures import LOWER_IS_BETTER, Measured, by_group, gains, image_of, measure
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.prediction import line_of, prediction_of
from lora_blip.inference.setup import described, open_task, put_on, wanted_adapter
from lora_blip.lora.adapter_file import Adapter
from lora_blip.metrics.bootstrap import Interval
from lora_blip.reports import report
from lora_blip.reports.report import Card
from lora_blip.reports.score_table import ReportRow
from lora_blip.runtime import distributed
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.files import csv_text, refuse_unwritable, unused_path, write_whole
from lora_blip.runtime.runs import METRICS_NAME, RUNS
from lora_blip.runtime.seeding import seed_everything
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.text_length import CutCount

FILES = ("metrics.json", "comparison.csv", report.FILE_NAME)
FEW = 10  # images; with fewer, bootstrap intervals are too narrow


def evaluate(config: EvaluateConfig) -> Path:
    """Score an adapter and its base. Return the folder of metrics.json, comparison.csv and report.html.

    Each prediction is written to base.jsonl or adapted.jsonl at once. Raise ConfigError, ModelError, AdapterError,
    ImageError or DataError before the first prediction.
    """
    distributed.refuse_several("evaluate")
    seed_everything(config.seed)
    wanted = wanted_adapter(config.adapter)
    folder = output_folder(config.output_dir)
    task, precision = open_task(config, wanted)
    examples, problems = annotations.read(
        config.references, config.image_root, config.on_bad_data, task.check, pretokenize=task.pretokenize, trim=task.trim
    )
    if problems:
        print(f"left out {len(problems)} line(s):\n{annotations.listing(problems)}")
    if report_of_tokens := task.unknown_report(examples):
        print(report_of_tokens)
    leaks, why = leaks_of(config, wanted, examples)
    folder.mkdir(parents=True, exist_ok=bool(config.output_dir))  # reserves the name
    print(described(task, wanted, len(dict.fromkeys(map(task.subject, examples))), precision))

    runner = Runner(task, config.batch_size, precision, lambda: open_task(config, wanted, device="cpu")[0])
    base = adapted = None
    if config.base or not wanted:
        base = measure(runner, examples, config.seed, shown("base", folder))
    if wanted:
        put_on(runner.task, wanted, merge=True, precision=runner.precision)
        runner.reopen = lambda: open_task(config, wanted, adapted=True, device="cpu")[0]
        runner.checked = not runner.fast
        adapted = measure(runner, examples, config.seed, shown("adapted", folder))
    last = adapted or base
    assert last is not None
    rows = rows_of(base, adapted, runner.task, config.seed)
    images = len({e.image for e in examples})
    warnings = ([leak_warning(leaks, images, "evaluation")] if leaks else []) + last.warnings
    for name, made in (("the base", base), ("the adapter", adapted)):
        if made and (line := CutCount().add(made.texts).report(runner.task, f"texts of {name}", examples)):
            warnings.append(line)
    if images < FEW:
        warnings.append(f"only {images} image{'s' * (images > 1)}: with fewer than {FEW}, the intervals are too narrow")
    facts = facts_of(config, wanted, runner, last, examples) | {"leaks": why}

    write_whole(folder / FILES[0], json_of(rows, facts, warnings, leaks, config).encode("utf-8", "backslashreplace"))
    write_whole(folder / FILES[1], csv_of(base, adapted).encode("utf-8-sig", "replace"))  # Excel needs the byte order mark
    title = f"{runner.task.name} on {config.references}"
    page, cards, curves = folder / FILES[2], cards_of(base, adapted, leaks), curves_of(wanted)
    said_by = "adapted" if adapted else "base"
    attempt(
        "report",
        lambda: report.write(
            page, title, rows, cards, curves, facts, warnings, said_by=said_by, score_name=last.main
        ),
    )  # fmt: skip
    written = ", ".join(str(folder / name) for name in FILES if (folder / name).exists())
    print(f"\n{table(rows, warnings)}\n\nwrote {printable(written)}")
    return folder


def output_folder(output_dir: str) -> Path:
    """Return the output folder. Raise ConfigError if it cannot be written or contains an evaluation."""
    if not output_dir:
        refuse_unwritable(str(RUNS))
        return unused_path(RUNS / f"evaluation_{datetime.now():%Y%m%d_%H%M%S}")
    refuse_unwritable(output_dir)
    taken = [name for name in (*FILES, "base.jsonl", "adapted.jsonl") if (Path(output_dir) / name).exists()]
    if taken:
        raise ConfigError(f"{Path(output_dir) / taken[0]} exists already; give another output_dir, or leave it empty")
    return Path(output_dir)


def shown(name: str, folder: Path) -> measures.Progress:
    """Return a progress bar that writes each text to <name>.jsonl at once, so that a later error does not lose it."""

    def watch(found: Iterable[Any], count: int) -> Iterable[Any]:
        for example, said in tqdm(found, total=count, desc=name, unit="", disable=None, dynamic_ncols=True):
            if isinstance(said, str):
                line = line_of(prediction_of(example, said))
                with (folder / f"{name}.jsonl").open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            yield example, said

    return watch


# ---------------------------------------------------------------- leaks


def leaks_of(config: EvaluateConfig, wanted: Adapter | None, examples: list[Example]) -> tuple[list[Leak], str]:
    """Return the evaluation images that are in the training data, and what they were compared with (or why not)."""
    settings = wanted.metadata.get("training", {}).get("settings", {}) if wanted else {}
    source = config.train_annotations or str(settings.get("annotations", ""))
    root = config.train_image_root or str(settings.get("image_root", "")) * (not config.train_annotations)
    if source in ("", "none"):
        return [], "not searched: the training data is unknown"
    if not Path(source).is_file():
        if config.train_annotations:
            raise DataError(f"train_annotations {source!r} do not exist; give the file, or none")
        return [], f"not searched: the training data, {source}, does not exist here (--train-annotations)"
    try:
        trained, _ = annotations.read(source, root, on_bad_data="skip", decode=False, report=lambda _: None)
    except DataError as error:
        if config.train_annotations:
            raise
        return [], f"not searched: {str(error).splitlines()[0]}"
    images = [image for image in dict.fromkeys(e.image for e in trained) if image.is_file()]
    if not images:
        return [], f"not searched: no image of {source} exists here (--train-image-root)"
    found = find_leaks(dict.fromkeys(e.image for e in examples), images)
    return found, f"{len(found)} found among the {len(images)} images of {source}"


# ---------------------------------------------------------------- the outputs


def rows_of(base: Measured | None, adapted: Measured | None, task: Any, seed: int) -> list[ReportRow]:
    """Return the rows of the table: every score, then the main score of each group."""
    both = [made for made in (base, adapted) if made]
    paired = gains(base, adapted, task, seed) if base and adapted else {}
    first, second = (({**made.scores, **by_group(made, task, seed)} if made else {}) for made in (base, adapted))
    rows = []
    for name in second or first:
        note = next((made.notes[name] for made in reversed(both) if name in made.notes), "")
        lower = name.startswith(LOWER_IS_BETTER)
        rows.append(ReportRow(name, first.get(name), second.get(name), note, lower, False if lower else None, paired.get(name)))
    return rows


def facts_of(
    config: EvaluateConfig, wanted: Adapter | None, runner: Runner, made: Measured, asked: list[Example]
) -> dict[str, str]:
    facts = {"base": runner.task.backbone.name, "task": runner.task.name, "references": config.references}
    if wanted:
        facts["adapter"] = str(wanted.path)
        facts["trained"] = f"{wanted.metadata.get('training', {}).get('steps', '?')} steps"
    if runner.task.backbone.chosen_size:
        facts["images"] = f"{runner.task.backbone.image_size}×{runner.task.backbone.image_size} pixels, positions interpolated"
    if runner.task.prompt:
        facts["prompt"] = runner.task.prompt
    scored = f"{len({image_of(s) for s in made.subjects})} of {len({e.image for e in asked})} images"
    questions = f", {len(made.subjects)} questions" * runner.task.takes_question
    facts |= {"scored": scored + questions, "precision": runner.precision, "date": f"{datetime.now():%Y-%m-%d %H:%M}"}
    return facts | {key: str(value) for key, value in made.facts.items()}


def json_of(
    rows: list[ReportRow], facts: dict[str, str], warnings: list[str], leaks: list[Leak], config: EvaluateConfig
) -> str:
    scores = {
        row.name: {"base": numbers(row.base), "adapted": numbers(row.adapted), "gain": numbers(row.gain), "note": row.note}
        for row in rows
    }
    found = [{"evaluation": str(x.evaluation), "training": str(x.training), "kind": x.kind} for x in leaks]
    about = {"scores": scores, "facts": facts, "warnings": warnings, "leaks": found, "settings": asdict(config)}
    return json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def numbers(interval: Interval | None) -> dict[str, float | None] | None:
    if interval is None or math.isnan(interval.value):
        return None
    return {key: None if math.isnan(value) else value for key, value in interval._asdict().items()}


def csv_of(base: Measured | None, adapted: Measured | None) -> str:
    """Return a CSV with a row per subject: image, question, references, base and adapted texts, and their scores."""
    made = adapted or base
    assert made is not None
    before = dict(zip(base.subjects, zip(base.texts, base.points, strict=True), strict=True)) if base else {}
    names = ["image", "question", "references", "base", "adapted", f"base {made.main}", made.main, "group"]
    rows: list[list[object]] = [[*names, "question_id", "prompt"]]
    for subject, lines, text, point in zip(made.subjects, made.lines, made.texts, made.points, strict=True):
        old, old_point = before.get(subject, ("", ""))
        said, own = (text, point) if adapted else ("", "")
        known = " | ".join(references_of(lines))
        first = lines[0]
        asked = [first.image, first.question, known]
        rows.append([*asked, old, said, old_point, own, first.group, first.question_id, first.prompt])
    return csv_text(rows)


def references_of(lines: list[Example]) -> list[str]:
    """Return the reference texts of a subject, without duplicates."""
    return list(dict.fromkeys(text for line in lines for text in (line.answers or (line.text,))))


def cards_of(base: Measured | None, adapted: Measured | None, leaks: list[Leak]) -> list[Card]:
    made = adapted or base
    assert made is not None
    before = dict(zip(base.subjects, zip(base.texts, base.points, strict=True), strict=True)) if base and adapted else {}
    leaked = {leak.evaluation: f"{leak.kind} as {leak.training}" for leak in leaks}
    cards = []
    for subject, lines, text, point, right in zip(made.subjects, made.lines, made.texts, made.points, made.right, strict=True):
        old, old_point = before.get(subject, ("", None))
        image, question = lines[0].image, lines[0].question
        cards.append(
            Card(
                image,
                references_of(lines),
                adapted=text,
                base=old,
                question=question,
                score=point,
                base_score=old_point,
                group=lines[0].group,
                leaked=leaked.get(image, ""),
                right=right,
            )
        )
    return cards


def curves_of(wanted: Adapter | None) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl in the adapter's folder, or [] if there is none."""
    path = wanted.path.parent / METRICS_NAME if wanted else None
    if path is None or not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        lines += [entry] if isinstance(entry, dict) else []
    return lines


def table(rows: list[ReportRow], warnings: Iterable[str]) -> str:
    """Return the warnings, then a line per score: base, adapted, and the gain with its interval."""
    lines = [printable(f"WARNING: {warning}") for warning in warnings]
    names = [printable(row.name) for row in rows]
    width = max(map(len, names)) + 2
    lines.append(f"{'':<{width}}{'base':>24}{'adapted':>24}{'gain':>26}")
    for row, name in zip(rows, names, strict=True):
        share = not (row.name.startswith(("CIDEr", *LOWER_IS_BETTER)))
        cells = [interval_text(row.base, share), interval_text(row.adapted, share)]
        gain = interval_text(row.gain, share) if row.gain else difference(row, share)
        note = printable(f"  {row.note}") if row.note else ""
        lines.append(f"{name:<{width}}{cells[0]:>24}{cells[1]:>24}{gain:>26}{note}")
    return "\n".join(lines)


def interval_text(interval: Interval | None, share: bool) -> str:
    """Return an interval as text, such as "97.1 % [94.0, 99.0]"."""
    if interval is None:
        return "–"
    scale, digits, unit = (100, 1, " %") if share else (1, 3, "")
    value, low, high = (f"{round(scale * x, digits) + 0.0:.{digits}f}" for x in interval)  # + 0.0 avoids −0.0
    return f"{value}{unit}" if math.isnan(interval.low) else f"{value}{unit} [{low}, {high}]"


def difference(row: ReportRow, share: bool) -> str:
    if row.base is None or row.adapted is None:
        return "–"
    gain = row.adapted.value - row.base.value
    return interval_text(Interval(gain, math.nan, math.nan), share)
