"""Write gallery.html: the first images of a run as cards, with their generated texts and their references."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from lora_blip.data.example import Example
from lora_blip.data.image_sources import open_example
from lora_blip.inference.finished import example_of_line, key_of, lines_of
from lora_blip.inference.output import ERRORS_NAME, FILE_NAME
from lora_blip.reports import report
from lora_blip.reports.report import Card
from lora_blip.runtime.runs import GALLERY_NAME
from lora_blip.tasks.base import PredictionTask

SHOWN = 200  # largest number of cards: about 3 MB of thumbnails


def write_gallery(
    folder: Path,
    task: PredictionTask,
    examples: Iterable[Example],
    references: dict[Path, list[Example]],
    facts: dict[str, str],
    model_name: str,
    count: int,
) -> Path:
    """Write gallery.html into the folder of a finished run, with its first SHOWN examples, and return the path of the page.

    model_name: the model that generated the texts, "adapted" or "base". count: the number of examples of the run.
    """
    first = list(islice(examples, SHOWN))
    cards = cards_of(folder, task, first, references)
    pictures = {example.image: example for example in first}
    note = f"The first {len(cards):,} of {count:,} are on this page; {FILE_NAME} contains all." if count > len(cards) else ""
    return report.write(
        folder / GALLERY_NAME, f"{task.name}: {facts.get('images', '')}", [], cards, facts=facts, most_pictures=SHOWN,
        model_name=model_name, score_name=task.correctness_name, facts_title="This run",
        note=note, open_picture=lambda image: open_example(pictures[image]),
    )  # fmt: skip


def cards_of(folder: Path, task: PredictionTask, examples: list[Example], references: dict[Path, list[Example]]) -> list[Card]:
    """Return a card for each example, in order. A card without text shows why its image cannot be read."""
    lines: dict[int, list[dict[str, Any]]] = {}
    for name in (FILE_NAME, ERRORS_NAME):
        if (folder / name).exists():
            for line in islice(lines_of(folder / name), len(examples)):
                lines.setdefault(key_of(example_of_line(line)), []).append(line)
    cards = []
    for example in examples:
        line = next(iter(lines.get(key_of(example), ())), {})
        known_lines = references_of(task, example, references)
        text = str(line.get("text", ""))
        score = task.correctness(text, known_lines) if known_lines and "text" in line else None
        ranking = [(str(entry["text"]), float(entry["probability"])) for entry in line.get("ranking", ())]
        alternatives = [(str(entry["text"]), float(entry["score"])) for entry in line.get("alternatives", ())]
        cards.append(
            Card(
                example.image, list(dict.fromkeys(a for known in known_lines for a in (known.answers or (known.text,)))), text,
                str(line.get("base_text", "")), example.question, score, group=known_lines[0].group if known_lines else "",
                right=None if score is None else score == 1, ranking=ranking, alternatives=alternatives,
            )
        )  # fmt: skip
    return cards


def references_of(task: PredictionTask, example: Example, references: dict[Path, list[Example]]) -> list[Example]:
    """Return the lines of the references that have a text or an answer for the image and question of an example."""
    lines = [line for line in references.get(example.image, ()) if (line.answers if task.takes_question else line.text)]
    return [line for line in lines if not task.writes_text or task.subject(line) == task.subject(example)]
