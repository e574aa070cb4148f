"""Format the table of scores in report.html."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_blip.metrics.bootstrap import Interval
from lora_blip.runtime.untrusted import printable

NONE = '<span class="quiet">–</span>'  # shown for a missing score


@dataclass(frozen=True)
class ReportRow:
    """One row of the score table."""

    name: str  # "CIDEr", "exact match", "R@1 image→text" …
    base: Interval | None
    adapted: Interval | None
    note: str = ""  # why a score is missing, or how it was measured
    lower_is_better: bool = False  # True for a loss or a median rank
    share: bool | None = None  # True: show in per cent; None: in per cent, unless it is CIDEr or greater than 1
    gain: Interval | None = None  # adapted − base over the same images; None: only the difference is known
    comparable: bool = True  # False if one of the two scores has no meaning: the gain is then not shown


def escaped(text: str) -> str:
    """Return a text as HTML, escaped."""
    return html.escape(printable(text))


def joined(rows: Sequence[ReportRow]) -> list[ReportRow]:
    """Return the rows, with one row for all that have no value for the same reason, in the place of the first of them."""
    missing: dict[str, list[str]] = {}
    for row in rows:
        if not (row.base or row.adapted) and row.note:
            missing.setdefault(row.note, []).append(row.name)
    result = []
    for row in rows:
        names = missing.get(row.note, []) if not (row.base or row.adapted) else []
        if len(names) < 2:
            result.append(row)
        elif row.name == names[0]:
            result.append(replace(row, name=f"{len(names)} other scores", note=f"{', '.join(names)}: {row.note}"))
    return result


def scores_html(rows: Sequence[ReportRow]) -> str:
    """Return the table of scores as a section, or "" if there are no rows."""
    if not rows:
        return ""
    compared = any(row.base for row in rows)
    names = ("score", "base", "adapted", "gain") if compared else ("score", "adapted")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<section class="scores" aria-labelledby="s"><h2 id="s">Scores</h2>'
        f'<table><thead><tr>{head}<td class="plot"></td></tr></thead><tbody>'
        f"{''.join(row_html(row, compared) for row in joined(rows))}</tbody></table>"
        '<p class="quiet"><span class="key base"></span> base <span class="key adapted"></span> adapted, '
        "with 95 % intervals on an axis from 0 (to 100 %, or to the largest value).</p></section>"
    )


def row_html(row: ReportRow, compared: bool) -> str:
    """Return a row of the table. compared: whether the table has the columns base and gain."""
    base, adapted = (x if x and math.isfinite(x.value) else None for x in (row.base, row.adapted))
    largest = max((max(interval.value, interval.high) for interval in (base, adapted) if interval), default=1.0)
    share = row.share if row.share is not None else largest <= 1 and "cider" not in row.name.lower()
    note = f'<small dir="auto">{escaped(row.note)}</small>' if row.note else ""
    gain = gain_html(base, adapted, row, share) if base and adapted and row.comparable else NONE
    cells = {"base": interval_html(base, share), "adapted": interval_html(adapted, share), "gain": gain}
    if not compared:
        cells = {"adapted": cells["adapted"]}
    if note and not (base or adapted):
        return f'<tr><th scope="row">{escaped(row.name)}</th><td class="note" colspan="{len(cells) + 1}">{note}</td></tr>'
    return (
        f'<tr><th scope="row">{escaped(row.name)}{note}</th>'
        + "".join(f'<td data-name="{name}">{cell}</td>' for name, cell in cells.items())
        + f'<td class="plot">{plot_html(base, adapted, 1.0 if share else largest)}</td></tr>'
    )


def interval_html(interval: Interval | None, share: bool) -> str:
    """Return a score with its 95 % interval. share: whether to show it in per cent."""
    if interval is None:
        return NONE
    value, low, high = (figure(x, share) for x in interval)
    if math.isnan(interval.low):  # METEOR of a set is not a mean and has no interval
        return f'<b>{value}{" %" * share}</b> <small class="range">no interval</small>'
    return f'<b>{value}{" %" * share}</b> <small class="range">{low} to {high}</small>'


def gain_html(base: Interval, adapted: Interval, row: ReportRow, share: bool) -> str:
    """Return adapted − base with the word better or worse, and a note if the difference may be due to chance."""
    gain = adapted.value - base.value
    size = figure(abs(gain), share)
    if not float(size):
        return '<b class="same">± 0</b>'
    verdict = "better" if (gain > 0) != row.lower_is_better else "worse"
    if row.gain is not None:
        doubt = ", could be chance" * (row.gain.low <= 0 <= row.gain.high)
    else:
        doubt = ", intervals overlap" * (adapted.low <= base.high and base.low <= adapted.high)
    return f'<b class="{verdict}">{"+−"[gain < 0]}{size}</b> <small>{"points " * share}{verdict}{doubt}</small>'


def plot_html(base: Interval | None, adapted: Interval | None, largest: float) -> str:
    """Return an SVG: base above adapted, each a dot on its interval, on an axis from 0 to `largest`."""

    def at(value: float) -> float:
        return round(4 + 152 * min(1.0, max(0.0, value / (largest or 1.0))), 1)

    marks = "".join(
        f'<g class="{name}"><path d="M{at(bound(x.low, x))} {y}H{at(bound(x.high, x))}"/>'
        f'<circle cx="{at(x.value)}" cy="{y}" r="3.5"/></g>'
        for name, x, y in (("base", base, 9), ("adapted", adapted, 21))
        if x
    )
    axis = '<path class="axis" d="M4 2V28M156 2V28"/>'
    return f'<svg viewBox="0 0 160 30" aria-hidden="true">{axis}{marks}</svg>' if marks else ""


def bound(end: float, interval: Interval) -> float:
    """Return an end of an interval, or the value of the score if the end is NaN."""
    return interval.value if math.isnan(end) else end


def figure(value: float, share: bool) -> str:
    """Return a number as text: a share in per cent (0.9712 → "97.1"), another number with 3 decimals, or with 1 if ≥ 10."""
    if share:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
