"""Write report.html, one page without external files: scores, training curves, and images with the worst first.

This file prepares the data and escapes the texts. The template in the same folder has the layout and the script.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_blip.data.images import open_image
from lora_blip.errors import ImageError
from lora_blip.metrics.bootstrap import Interval
from lora_blip.metrics.exact import normal
from lora_blip.runtime.files import write_whole
from lora_blip.runtime.untrusted import printable
from lora_blip.version import __version__

FILE_NAME = "report.html"
TEMPLATE = Path(__file__).with_name("report.html")
SIDE, QUALITY = 256, 72  # of a thumbnail: pixels of its longer side, JPEG's 1 to 95
MOST_POINTS = 2000  # training steps in the curves; of a longer run, every n-th step
NONE = '<span class="quiet">–</span>'  # a score that is missing
MARKER = re.compile(r"<!-- (\w+) -->")  # a placeholder of the template


@dataclass(frozen=True)
class ReportRow:
    """One row of the score table."""

    name: str  # "CIDEr", "exact match", "R@1 image→text" …
    base: Interval | None
    adapted: Interval | None
    note: str = ""  # why it is missing, or how it was measured
    lower_is_better: bool = False  # a loss, a median rank
    share: bool | None = None  # show in per cent; None: yes, unless it is CIDEr or greater than 1
    gain: Interval | None = None  # adapted − base over the same images; None: only the difference is known


@dataclass(frozen=True)
class Card:
    """One image, or one question about an image, in the gallery."""

    image: Path
    references: list[str]
    adapted: str
    base: str = ""  # "" if the base was not run
    question: str = ""  # of visual question answering
    score: float | None = None  # of the adapted text, 0 to 1 or CIDEr; sorts the gallery
    base_score: float | None = None
    group: str = ""
    leaked: str = ""  # why this image is suspected to be in the training data
    right: bool | None = None  # None: it is right if it equals a reference (metrics.exact)


def write(
    path: Path,
    title: str,
    rows: Sequence[ReportRow],
    cards: Sequence[Card],
    metrics: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    most_pictures: int = 500,
    said_by: str = "adapted",
    score_name: str = "score",
) -> Path:
    """Write the page to `path` and return the path. The page needs no network. Replace an older page atomically.

    metrics: the lines of metrics.jsonl.
    facts: what was measured (base, adapter, images …).
    most_pictures: the number of embedded images, from the worst cards. Other cards have only texts.
    said_by: "adapted" or "base": the model that generated the cards' main texts.
    score_name: the name of the score of each card, such as "CIDEr".
    """
    cards = sorted(cards, key=worst_first)
    chosen = list(dict.fromkeys(card.image for card in cards))[: max(0, most_pictures)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the GIL
        pictures = dict(zip(chosen, pool.map(thumbnail, chosen), strict=True))
    index = {image: number for number, image in enumerate(chosen)}
    data = {
        "cards": [entry(card, index) for card in cards],
        "pictures": list(pictures.values()),
        "by": said_by,
        "score_name": score_name,
        **thinned(metrics),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "policy": escaped(policy(page)),
        "title": escaped(title),
        "heading": breakable(title),
        "warnings": warnings_html(warnings),
        "scores": scores_html(rows),
        "facts": facts_html(facts or {}),
        "version": escaped(__version__),
        "data": json_html(data),
    }
    filled = MARKER.sub(lambda marker: parts[marker[1]], page)  # in one pass, so that a marker in a text is not replaced
    write_whole(path, filled.encode("utf-8", "replace"))  # half a surrogate pair, as in odd file names, becomes "?"
    return path


# ---------------------------------------------------------------- data


def worst_first(card: Card) -> tuple[bool, float, float]:
    """Return a sort key: the lowest score first, among equal ones the highest base score first, without a score last."""
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
        "changed": True if card.base and normal(card.base) != normal(card.adapted) else None,
    }
    return {key: value for key, value in fields.items() if value is not None}


def thumbnail(path: Path) -> dict[str, Any]:
    """Return {"jpeg": base64, "size": [width, height]}, or {"problem": reason} if the image cannot be read."""
    try:
        picture = open_image(path)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    except ImageError as error:
        return {"problem": str(error)}
    except Exception as error:  # a decoder can raise any error; the page is written without this image
        return {"problem": f"{path} cannot be decoded ({type(error).__name__}: {error})"}
    return {"jpeg": base64.b64encode(buffer.getvalue()).decode("ascii"), "size": picture.size}


def thinned(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return every n-th training step and the last, and all validations and skipped steps."""
    steps = [number for number, line in enumerate(metrics) if "loss" in line]
    every = max(1, math.ceil(len(steps) / MOST_POINTS))
    dropped = set(steps) - set(steps[::every]) - set(steps[-1:])
    return {"metrics": [line for number, line in enumerate(metrics) if number not in dropped], "every": every}


def finite(value: Any) -> Any:
    """Return `value` with texts escaped, and NaN and infinity as None, which JSON can represent."""
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
    """Return a content security policy: load nothing, and run only the template's own script, by its hash."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


# ---------------------------------------------------------------- HTML without a script


def escaped(text: str) -> str:
    """Return a text as HTML, escaped."""
    return html.escape(printable(text))


def breakable(text: str) -> str:
    """Return a text as HTML with possible line breaks after slashes and underscores."""
    return re.sub(r"([/\\\\_])", r"\1<wbr>", escaped(text))


def warnings_html(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    heading = "Read this before the scores" if len(warnings) == 1 else f"Read these {len(warnings)} warnings before the scores"
    items = "".join(f'<li dir="auto">{escaped(warning)}</li>' for warning in warnings)
    return f'<section class="warnings" aria-labelledby="w"><h2 id="w">{heading}</h2><ul>{items}</ul></section>'


def facts_html(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(
        f'<div><dt>{escaped(name)}</dt><dd dir="auto">{breakable(str(fact))}</dd></div>' for name, fact in facts.items()
    )
    return f'<section class="facts" aria-labelledby="f"><h2 id="f">What was measured</h2><dl>{items}</dl></section>'


def scores_html(rows: Sequence[ReportRow]) -> str:
    if not rows:
        return ""
    compared = any(row.base for row in rows)
    names = ("score", "base", "adapted", "gain") if compared else ("score", "adapted")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<section class="scores" aria-labelledby="s"><h2 id="s">Scores</h2>'
        f'<table><thead><tr>{head}<td class="plot"></td></tr></thead><tbody>'
        f"{''.join(row_html(row, compared) for row in rows)}</tbody></table>"
        '<p class="quiet"><span class="key base"></span> base <span class="key adapted"></span> adapted, '
        "with 95 % intervals on an axis from 0 (to 100 %, or to the largest value).</p></section>"
    )


def row_html(row: ReportRow, compared: bool) -> str:
    base, adapted = (one if one and math.isfinite(one.value) else None for one in (row.base, row.adapted))
    most = max((max(interval.value, interval.high) for interval in (base, adapted) if interval), default=1.0)
    share = row.share if row.share is not None else most <= 1 and "cider" not in row.name.lower()
    note = f'<small dir="auto">{escaped(row.note)}</small>' if row.note else ""
    gain = gain_html(base, adapted, row, share) if base and adapted else NONE
    cells = {"base": interval_html(base, share), "adapted": interval_html(adapted, share), "gain": gain}
    if not compared:
        cells = {"adapted": cells["adapted"]}
    return (
        f'<tr><th scope="row">{escaped(row.name)}{note}</th>'
        + "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells.items())
        + f'<td class="plot">{plot_html(base, adapted, 1.0 if share else most)}</td></tr>'
    )


def interval_html(interval: Interval | None, share: bool) -> str:
    if interval is None:
        return NONE
    value, low, high = (figure(x, share) for x in interval)
    if math.isnan(interval.low):  # METEOR of a set is not a mean and has no interval
        return f'<b>{value}{" %" * share}</b> <small class="range">no interval</small>'
    return f'<b>{value}{" %" * share}</b> <small class="range">{low} to {high}</small>'


def gain_html(base: Interval, adapted: Interval, row: ReportRow, share: bool) -> str:
    """Return adapted − base with the word better or worse, and a note if it is not significant."""
    gain = adapted.value - base.value
    written = figure(abs(gain), share)
    if not float(written):
        return '<b class="same">± 0</b>'
    verdict = "better" if (gain > 0) != row.lower_is_better else "worse"
    if row.gain is not None:
        doubt = ", could be chance" * (row.gain.low <= 0 <= row.gain.high)
    else:
        doubt = ", intervals overlap" * (adapted.low <= base.high and base.low <= adapted.high)
    return f'<b class="{verdict}">{"+−"[gain < 0]}{written}</b> <small>{"points " * share}{verdict}{doubt}</small>'


def plot_html(base: Interval | None, adapted: Interval | None, most: float) -> str:
    """Return an SVG: base above adapted, each a dot on its interval, on an axis from 0 to `most`."""

    def at(value: float) -> float:
        return round(4 + 152 * min(1.0, max(0.0, value / (most or 1.0))), 1)

    marks = "".join(
        f'<g class="{name}"><path d="M{at(bound(x.low, x))} {y}H{at(bound(x.high, x))}"/>'
        f'<circle cx="{at(x.value)}" cy="{y}" r="3.5"/></g>'
        for name, x, y in (("base", base, 9), ("adapted", adapted, 21))
        if x
    )
    axis = '<path class="axis" d="M4 2V28M156 2V28"/>'
    return f'<svg viewBox="0 0 160 30" aria-hidden="true">{axis}{marks}</svg>' if marks else ""


def bound(end: float, interval: Interval) -> float:
    return interval.value if math.isnan(end) else end


def figure(value: float, share: bool) -> str:
    """Return a number as text: a share in per cent, 0.9712 → "97.1"; others with 3 digits, or 1 from 10 on."""
    if share:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
