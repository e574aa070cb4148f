"""Write report.html, one page without external files: scores, training curves, and images, the worst first.

This module prepares the data and escapes the texts. The template report.html contains the layout and the script.
"""

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lora_blip.data.images import open_image
from lora_blip.errors import ImageError
from lora_blip.metrics.exact import normal
from lora_blip.metrics.names import score_name as score_name_of
from lora_blip.reports.score_table import ReportRow, escaped, scores_html
from lora_blip.runtime.files import write_whole
from lora_blip.runtime.untrusted import printable
from lora_blip.version import __version__

FILE_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")
SIDE, QUALITY = 256, 72  # thumbnails: pixels of the longer side, JPEG quality (1 to 95)
MOST_POINTS = 2000  # largest number of training steps in a curve; a longer run shows every n-th step
MARKER = re.compile(r"<!-- (\w+) -->")  # a placeholder of the template


@dataclass(frozen=True)
class Card:
    """An image, or a question about an image, on the page."""

    image: Path
    references: list[str]
    adapted: str
    base: str = ""  # "" if the base was not run
    question: str = ""  # only for visual question answering
    score: float | None = None  # score of `adapted`, 0 to 1 or CIDEr; sorts the cards
    base_score: float | None = None
    group: str = ""
    leaked: str = ""  # the reason why this image may also be in the training data
    right: bool | None = None  # True if `adapted` is right; None: right if it equals a reference (metrics.exact)
    ranking: Sequence[tuple[str, float]] = ()  # (text, probability), the most probable first
    alternatives: Sequence[tuple[str, float]] = ()  # (generated text, score), the best first


def write(
    path: Path,
    title: str,
    rows: Sequence[ReportRow],
    cards: Sequence[Card],
    metrics: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    most_pictures: int = 500,
    model_name: str = "adapted",
    score_name: str = "score",
    facts_title: str = "What was measured",
    note: str = "",
    open_picture: Callable[[Path], Image.Image] = open_image,
) -> Path:
    """Write the page to `path` and return the path. The page needs no network. Replace an older page atomically.

    metrics: the lines of metrics.jsonl.
    facts: what was measured (base, adapter, images …).
    most_pictures: the largest number of embedded images. The worst cards have an image, the others only texts.
    model_name: "adapted" or "base", the model that generated the main text of each card.
    score_name: the name of the score of each card, such as "CIDEr".
    note: a sentence above the cards, such as how many of the images are shown.
    open_picture: opens the image of a card, or raises ImageError with the reason.
    """
    cards = sorted(cards, key=worst_first)
    chosen = list(dict.fromkeys(card.image for card in cards))[: max(0, most_pictures)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL
        pictures = dict(zip(chosen, pool.map(partial(thumbnail, open_picture=open_picture), chosen), strict=True))
    index = {image: number for number, image in enumerate(chosen)}
    data = {
        "cards": [entry(card, index) for card in cards],
        "pictures": list(pictures.values()),
        "by": model_name,
        "score_name": score_name,
        "note": note,
        "names": {key: score_name_of(key.removeprefix("val_")) for line in metrics for key in line if key.startswith("val_")},
        **thinned(metrics),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "policy": escaped(policy(page)),
        "title": escaped(title),
        "heading": breakable(title),
        "warnings": warnings_html(warnings),
        "scores": scores_html(rows),
        "facts": facts_html(facts or {}, facts_title),
        "version": escaped(__version__),
        "data": json_html(data),
    }
    filled = MARKER.sub(lambda marker: parts[marker[1]], page)  # in one pass, so that a marker in a text is not replaced
    write_whole(path, filled.encode("utf-8", "replace"))  # an invalid character of a file name becomes "?"
    return path


# ---------------------------------------------------------------- data


def worst_first(card: Card) -> tuple[bool, float, float]:
    """Return a sort key: lowest score first, and for equal scores the highest base score. Cards without a score are last."""
    score, base = finite([card.score, card.base_score])
    return score is None, score or 0.0, -(base or 0.0)


def entry(card: Card, index: Mapping[Path, int]) -> dict[str, Any]:
    """Return the fields of a card that the page needs, without empty ones."""
    right = card.right
    if right is None and card.references:
        right = normal(card.adapted) in {normal(text) for text in card.references}
    fields = {
        "image": str(card.image),
        "picture": index.get(card.image),
        "references": card.references,
        "adapted": card.adapted,
        "base": card.base or None,
        "question": card.question or None,
        "score": card.score,
        "base_score": card.base_score,
        "group": card.group or None,
        "leaked": card.leaked or None,
        "right": right,
        "ranking": list(card.ranking) or None,
        "alternatives": list(card.alternatives) or None,
        "changed": True if card.base and normal(card.base) != normal(card.adapted) else None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def thumbnail(path: Path, open_picture: Callable[[Path], Image.Image] = open_image) -> dict[str, Any]:
    """Return {"jpeg": base64, "size": [width, height]}, or {"problem": reason} if the image cannot be read."""
    try:
        picture = open_picture(path)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    except ImageError as error:
        return {"problem": str(error)}
    except Exception as error:  # a decoder can raise any error; the page is written without this image
        return {"problem": f"{path} cannot be decoded ({type(error).__name__}: {error})"}
    return {"jpeg": base64.b64encode(buffer.getvalue()).decode("ascii"), "size": picture.size}


def thinned(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {"metrics": lines, "every": n}: every n-th training step and the last one, all validations and skipped steps."""
    steps = [number for number, line in enumerate(metrics) if "loss" in line]
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    dropped = set(steps) - set(steps[::every]) - set(steps[-1:])
    return {"metrics": [line for number, line in enumerate(metrics) if number not in dropped], "every": every}


def finite(value: Any) -> Any:
    """Return `value` with its texts escaped, and with None instead of NaN and infinity, which JSON cannot represent."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_html(data: Any) -> str:
    """Return JSON for a script element. `<` is escaped, so that no text can contain `</script>` or `<!--`."""
    text = json.dumps(finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(page: str) -> str:
    """Return a content security policy that allows no download, and no script except the template's own, by its hash."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


# ---------------------------------------------------------------- HTML without a script


def breakable(text: str) -> str:
    """Return a text as HTML with possible line breaks after slashes and underscores."""
    return re.sub(r"([/\\\\_])", r"\1<wbr>", escaped(text))


def warnings_html(warnings: Sequence[str], heading: str = "") -> str:
    """Return the warnings as a section, or "" if there are none. heading: "" for that of a page with scores."""
    if not warnings:
        return ""
    of_scores = (
        "Read this before the scores" if len(warnings) == 1 else f"Read these {len(warnings)} warnings before the scores"
    )
    heading = escaped(heading or of_scores)
    items = "".join(f'<li dir="auto">{escaped(warning)}</li>' for warning in warnings)
    return f'<section class="warnings" aria-labelledby="w"><h2 id="w">{heading}</h2><ul>{items}</ul></section>'


def facts_html(facts: Mapping[str, str], title: str, identifier: str = "f") -> str:
    """Return the facts as a section, or "" if there are none. identifier: the id of its heading, unique on the page."""
    if not facts:
        return ""
    items = "".join(
        f'<div><dt>{escaped(name)}</dt><dd dir="auto">{breakable(str(fact))}</dd></div>' for name, fact in facts.items()
    )
    heading = f'<h2 id="{identifier}">{escaped(title)}</h2>'
    return f'<section class="facts" aria-labelledby="{identifier}">{heading}<dl>{items}</dl></section>'
