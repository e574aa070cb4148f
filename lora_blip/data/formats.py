"""Files of lines → entries, a dict each in lora_blip's keys, or the reason why a line is none: JSONL, TSV and CSV."""

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lora_blip.untrusted import DEEPEST, UnreadableError, is_path, no_constant, open_regular, parsed, quoted

IMAGE_KEYS = ("image", "image_path", "file_name")
TEXT_KEYS = ("text", "caption")
ANSWER_KEYS = ("answers", "answer")
SEVERAL = "|"  # between the answers of one cell of a TSV or CSV
LONGEST = 2**20  # characters of a line; a caption has a hundred, a question with ten answers a thousand
TOO_LONG = f"a line of more than {LONGEST:,} characters; has the file lost its line ends?"
NOT_UTF8 = "not UTF-8 (or half a surrogate pair); save the file as UTF-8"

QUICK = json.JSONDecoder(parse_constant=no_constant)  # takes a key twice without a word, in a fifth of the time

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


def canonical(entry: Entry, answered: bool = True) -> Entry | str:
    """{"image", "text"} or {"image", "question", "answers"}, spaces tidied, then the entry's other keys; or why not.

    A line with a question is a question, with its `answers` (strings, or VQAv2's {"answer": …}) or its one `answer`;
    not `answered`: it may have none.
    """
    rest = dict(entry)
    image = _take(rest, IMAGE_KEYS)
    if not isinstance(image, str) or not image.strip():
        return f"no image: expected one of the keys {', '.join(IMAGE_KEYS)}, with a path"
    if not is_path(image):
        return f"the image is no path that a file can have: {quoted(image)}"
    made: Entry
    if "question" in rest:
        none = not answered and rest.keys().isdisjoint(ANSWER_KEYS)
        question, answers = rest.pop("question"), [] if none else _take(rest, ANSWER_KEYS)
        answers = answers if isinstance(answers, list) else [answers]
        answers = [item.get("answer") if isinstance(item, dict) else item for item in answers]
        if not isinstance(question, str):
            return "the question is no string"
        if (not answers and not none) or not all(isinstance(answer, str) for answer in answers):
            return 'no answer: expected "answers", a list of strings, or "answer", a string'
        made = {"question": " ".join(question.split()), "answers": [" ".join(answer.split()) for answer in answers]}
        empty = "" if all(made["answers"]) else "an answer is empty"
        empty = empty if made["question"] else "the question is empty"
    else:
        text = _take(rest, TEXT_KEYS)
        if not isinstance(text, str):
            there = f"; this line has {quoted(list(rest))[1:-1]}" if rest else ""
            return f"no text: expected one of the keys {', '.join(TEXT_KEYS)}, with a string, or question and answers{there}"
        made = {"text": " ".join(text.split())}
        empty = "" if made["text"] else "the text is empty"
    written = (
        image
        + (rest["group"] if isinstance(rest.get("group"), str) else "")
        + (made.get("text") or " ".join((made["question"], *made["answers"])) if not empty else "")
    )
    if not written.isascii() and any("\ud800" <= letter <= "\udfff" for letter in written):
        return NOT_UTF8
    return empty or {"image": image} | made | rest


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
        return parsed(line)  # which says what is wrong
    flat = line[end:] in ("\n", "") and type(entry) is dict and len(entry) == line.count(":") and line.count("[") < DEEPEST - 1
    return entry if flat else parsed(line)


def tsv_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """image⇥caption, or image⇥question⇥answer with `|` between several answers.

    Lines that start with # are comments (an image of such a name is written ./#1.png). There is no quoting. A first
    line that names the columns is passed over.
    """
    first = True
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
            continue
        if line.startswith("#"):
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        heads, first = first and _is_header(cells), False
        if heads:
            continue
        if len(cells) == 2:
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
        named = [name for name in names if name]
        if len(set(named)) < len(named):
            yield number, f"the first line names a column twice: {header_line.strip()[:60]!r}"
            return
        for number, row in rows:
            if isinstance(row, str):
                yield number, row
            elif len(row) != len(names):
                columns = f"{len(row)} column{'s' * (len(row) > 1)} where the header has {len(names)}"
                yield number, f"{columns}: a text with commas stands in quotes, got {delimiter.join(row)[:60]!r}"
            else:
                entry: Entry = {name: cell.strip() for name, cell in zip(names, row, strict=True) if name}
                yield number, entry | {key: several(entry[key]) for key in ANSWER_KEYS if key in entry}


def several(cell: str) -> list[str]:
    return [answer.strip() for answer in cell.split(SEVERAL)]


def is_header(cells: Iterable[str]) -> bool:
    """Names of columns with an image and with a text or question among them."""
    names = {cell.strip().lower() for cell in cells}
    return bool(names.intersection(IMAGE_KEYS) and names.intersection((*TEXT_KEYS, "question")))


def _is_header(cells: list[str]) -> bool:
    return is_header(cells) and all(cell.lower() in (*IMAGE_KEYS, *TEXT_KEYS, "question", *ANSWER_KEYS) for cell in cells)


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


def _take(entry: Entry, keys: Iterable[str]) -> Any:
    """The value of the first key that is there; all of them are taken out."""
    found = [entry.pop(key) for key in keys if key in entry]
    return found[0] if found else None
