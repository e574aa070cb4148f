"""Files of lines → entries, a dict each in lora_blip's keys, or the reason why a line is none: JSONL, TSV and CSV."""

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lora_blip.runtime.untrusted import DEEPEST, UnreadableError, cut, is_path, no_constant, once, open_regular, parsed, quoted

IMAGE_KEYS = ("image", "image_path", "file_name")
TEXT_KEYS = ("text", "caption")
ANSWER_KEYS = ("answers", "answer")
SEVERAL = "|"  # between the answers of one cell of a TSV or CSV
LONGEST = 2**20  # characters of a line; a caption has a hundred, a question with ten answers a thousand
TOO_LONG = f"a line of more than {LONGEST:,} characters; has the file lost its line ends?"
NOT_UTF8 = "not UTF-8 (or half a surrogate pair); save the file as UTF-8"

WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")  # a whole number, as JSON writes it


class WrittenFloat(float):
    """A number of a JSON that is not whole, with its spelling: 1.50 stays 1.50 if it is an answer."""

    __slots__ = ("spelling",)
    spelling: str

    def __new__(cls, spelling: str) -> "WrittenFloat":
        made = super().__new__(cls, spelling)
        if math.isinf(made):
            raise ValueError(f"{cut(spelling)} is too large for a number")
        made.spelling = spelling
        return made


QUICK = json.JSONDecoder(parse_float=WrittenFloat, parse_constant=no_constant)  # accepts a key twice; five times as fast
STRICT = json.JSONDecoder(object_pairs_hook=once, parse_float=WrittenFloat, parse_constant=no_constant)

Place = int | str  # a line's number, or what an entry is called in its JSON: "annotations[17]"
Entry = dict[str, Any]
Found = tuple[Place, Entry | str]  # every reader gives these: where, and an entry or the reason why there is none


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Bytes that are no UTF-8 are kept as surrogates, for `canonical` to name. OSError if it is no file that can be read."""
    file = open_regular(path)
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise UnreadableError("it is UTF-16; save it as UTF-8")
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def numbered_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """The lines that are not blank; None for one that is longer than LONGEST."""
    with open_text(path) as file:
        for number, line in enumerate(_bounded(file), 1):
            if len(line) > LONGEST:
                yield number, None
            elif not line.isspace():
                yield number, line


def _bounded(file: TextIO) -> Iterator[str]:
    """The lines of a file; of one that is longer than LONGEST only the first LONGEST + 1 characters."""
    while part := file.readline(LONGEST + 1):
        yield part
        while len(part) > LONGEST and part[-1] not in "\r\n":
            part = file.readline(LONGEST + 1)


def as_text(value: object) -> str | None:
    """Return a string, a number as it is written, or yes or no for a boolean; None for any other value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return value.spelling if isinstance(value, WrittenFloat) else str(value)
    return value if isinstance(value, str) else None


def canonical(entry: Entry, answered: bool = True) -> Entry | str:
    """{"image", "text"} or {"image", "question", "answers"}, spaces tidied, then the entry's other keys; or why not.

    A line with a question is a question, with its `answers` (texts, or VQAv2's {"answer": …}) or its one `answer`;
    not `answered`: it may have none. Numbers and booleans become texts, see `as_text`.
    """
    rest = dict(entry)
    image = _take(rest, IMAGE_KEYS)
    if not isinstance(image, str) or not image.strip():
        return f"no image: expected one of the keys {', '.join(IMAGE_KEYS)}, with a path"
    if not is_path(image):
        return f"the image is no path that a file can have: {quoted(image)}"
    try:
        made = {"image": image} | (_question(rest, answered) if "question" in rest else _caption(rest)) | _prompt(rest) | rest
    except _ValueError as error:
        return str(error)
    return NOT_UTF8 if _has_surrogates(made) else made


def _caption(rest: Entry) -> Entry:
    if rest.keys().isdisjoint(TEXT_KEYS):
        there = f"; this line has {quoted(list(rest))[1:-1]}" if rest else ""
        raise _ValueError(f"no text: expected one of the keys {', '.join(TEXT_KEYS)}, or question and answers{there}")
    return {"text": _tidied("text", _take(rest, TEXT_KEYS))}


def _question(rest: Entry, answered: bool) -> Entry:
    question, unasked = _tidied("question", rest.pop("question")), not answered and rest.keys().isdisjoint(ANSWER_KEYS)
    answers = _take(rest, ANSWER_KEYS, [])
    answers = answers if isinstance(answers, list) else [answers]
    if not answers and not unasked:
        raise _ValueError('no answer: expected "answers", a list of texts, or "answer", a text')
    said = [item.get("answer", item) if isinstance(item, dict) else item for item in answers]
    made: Entry = {"question": question, "answers": [_tidied("answer", text) for text in said]}
    number = rest.pop("question_id", None)
    if number is None or number == "":
        return made
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise _ValueError(f"the question_id is {quoted(number)}; expected a whole number or a text")
    return made | {"question_id": number}


def _prompt(rest: Entry) -> Entry:
    """The line's own prompt. None and an empty text are none: a CSV has a cell for it on every row."""
    prompt = rest.pop("prompt", None)
    return {"prompt": _tidied("prompt", prompt)} if prompt is not None and str(prompt).strip() else {}


def _tidied(name: str, value: object) -> str:
    """A text with one space between words. Raises _ValueError for null, an empty text, and what is no text."""
    text = as_text(value)
    if text is None:
        found = f"the {name} is null" if value is None else f"no {name}: it is {quoted(value)}"
        raise _ValueError(f"{found}; write a text")
    if not (text := " ".join(text.split())):
        raise _ValueError(f"{'an' if name == 'answer' else 'the'} {name} is empty")
    return text


def _has_surrogates(entry: Entry) -> bool:
    """Whether a text that becomes part of an Example holds half of a surrogate pair."""
    used = [entry.get(key) for key in ("image", "group", "text", "question", "prompt", "question_id")]
    answers = entry["answers"] if "question" in entry else ()  # a caption may have any value under that key
    written = "".join(value for value in (*used, *answers) if isinstance(value, str))
    return not written.isascii() and any("\ud800" <= letter <= "\udfff" for letter in written)


class _ValueError(ValueError):
    """A value of an entry that cannot be used; the message names it."""


def jsonl_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """One JSON object a line."""
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
            continue
        try:
            entry = _object(line)
        except ValueError as error:
            yield number, f"not valid JSON ({error}): {line.strip()[:60]!r}"
            continue
        yield (
            number,
            entry if isinstance(entry, dict) else f'expected an object {{"image": …, "text": …}}, got {line.strip()[:60]!r}',
        )


def _object(line: str) -> Any:
    """What `parsed` gives. Each key has its colon: an object of strings with as many keys as colons has none twice."""
    try:
        entry, end = QUICK.raw_decode(line)
    except (ValueError, RecursionError):
        return parsed(line, STRICT)  # which says what is wrong
    flat = line[end:] in ("\n", "") and type(entry) is dict and len(entry) == line.count(":") and line.count("[") < DEEPEST - 1
    return entry if flat else parsed(line, STRICT)


def tsv_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """image⇥caption, or image⇥question⇥answer with `|` between several answers.

    Lines that start with # are comments (an image of such a name is written ./#1.png). There is no quoting. A first
    line that names the columns, such as image⇥prompt⇥caption, says what each column is.
    """
    names: list[str] | None = None  # not known before the first line; empty: it names no columns
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
            continue
        if line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if names is None:
            names = [cell.lower() for cell in cells] if is_header(cells) else []
            if names:
                if reason := _repeated(names):
                    yield number, reason
                    return
                continue
        if names and len(cells) == len(names):
            yield number, _of_columns(names, cells)
        elif names:
            columns = f"{len(cells)} column{'s' * (len(cells) > 1)} where the first line names {len(names)}"
            yield number, f"{columns}: {quoted(line.strip()[:60])}"
        elif len(cells) == 2:
            yield number, {"image": cells[0], "text": cells[1]}
        elif len(cells) == 3:
            yield number, {"image": cells[0], "question": cells[1], "answers": several(cells[2])}
        else:
            columns = f"{len(cells)} column{'s' * (len(cells) > 1)}"
            yield number, f"{columns} between tabs: expected image⇥caption or image⇥question⇥answer, got {line.strip()[:60]!r}"


def csv_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """Rows under a header such as image,caption or file_name,text or image,question,answer.

    Other columns are kept as they are. Excel's semicolons are understood; quoting must be that of RFC 4180.
    """
    with open_text(path, newline="") as file:
        delimiter = ";" if ";" in (header_line := file.readline(LONGEST)) and "," not in header_line else ","
        file.seek(0)
        rows = _rows(_bounded(file), delimiter)
        number, header = next(rows, (1, []))
        names = [name.strip().lower() for name in header] if isinstance(header, list) else []
        if not is_header(names):
            yield number, f"the first line must name the columns, image,caption or such; it is {header_line.strip()[:60]!r}"
            return
        if reason := _repeated(names):
            yield number, reason
            return
        for number, row in rows:
            if isinstance(row, str):
                yield number, row
            elif len(row) != len(names):
                columns = f"{len(row)} column{'s' * (len(row) > 1)} where the header has {len(names)}"
                yield number, f"{columns}: a text with commas stands in quotes, got {delimiter.join(row)[:60]!r}"
            else:
                yield number, _of_columns(names, row)


def _of_columns(names: list[str], cells: list[str]) -> Entry:
    """An entry of the cells of a row. A question_id of digits is a number, as it is in a JSON."""
    entry: Entry = {name: cell.strip() for name, cell in zip(names, cells, strict=True) if name}
    entry |= {key: several(entry[key]) for key in ANSWER_KEYS if key in entry}
    number = entry.get("question_id", "")
    return entry | {"question_id": int(number)} if WHOLE.fullmatch(number) else entry


def _repeated(names: list[str]) -> str:
    """Why these are no names of columns, or ""."""
    named = [name for name in names if name]
    twice = next((name for name in named if named.count(name) > 1), "")
    return f"the first line names a column twice: {quoted(twice)}; keep one" if twice else ""


def several(cell: str) -> list[str]:
    return [answer.strip() for answer in cell.split(SEVERAL)]


def is_header(cells: Iterable[str]) -> bool:
    """Names of columns with an image and with a text or question among them."""
    names = {cell.strip().lower() for cell in cells}
    return bool(names.intersection(IMAGE_KEYS) and names.intersection((*TEXT_KEYS, "question")))


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """(number of its first line, cells or what is wrong) of each row that is not blank; a row may span lines."""
    overlong: list[int] = []  # the lengths of this row's lines that were cut

    def fed() -> Iterator[str]:
        for line in lines:
            overlong.extend([len(line)] * (len(line) > LONGEST))
            yield line

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)  # else an open quote swallows all that follows
    while True:
        overlong.clear()
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not valid CSV ({error}): a text with quotes or commas stands in quotes, its own quotes doubled"
            continue
        if overlong:
            yield number, TOO_LONG
        elif any(cell.strip() for cell in row):
            yield number, row


def first_key(entry: Entry, keys: Iterable[str]) -> str | None:
    """Return the first of some keys that an entry has. The others of them are not used."""
    return next((key for key in keys if key in entry), None)


def _take(entry: Entry, keys: Iterable[str], otherwise: Any = None) -> Any:
    """Take the value of the first of some keys out of an entry."""
    key = first_key(entry, keys)
    return otherwise if key is None else entry.pop(key)
