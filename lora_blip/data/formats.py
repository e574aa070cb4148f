"""Read JSONL, TSV and CSV files. Each reader yields a line number with an entry, or with the reason why the line is invalid."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from lora_blip.data.entries import ANSWER_KEYS, IMAGE_KEYS, TEXT_KEYS, UNESCAPED, Entry, WrittenFloat
from lora_blip.runtime.untrusted import DEEPEST, UnreadableError, cut, no_constant, once, open_regular, parsed, quoted

ANSWER_SEPARATOR = "|"  # between the answers of one cell of a TSV or CSV
LONGEST = 2**20  # characters of a line; a caption has a hundred, a question with ten answers a thousand
TOO_LONG = f"a line of more than {LONGEST:,} characters; put each example on its own line"
IMAGE_PATH = re.compile(rf'("(?:{"|".join(IMAGE_KEYS)})"\s*:\s*")([^"]*)', re.IGNORECASE)
WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")  # a whole number, as JSON writes it

QUICK = json.JSONDecoder(parse_float=WrittenFloat, parse_constant=no_constant)  # five times as fast; ignores repeated keys
STRICT = json.JSONDecoder(object_pairs_hook=once, parse_float=WrittenFloat, parse_constant=no_constant)

Location = int | str  # the number of a line, or the place of an entry in a JSON document: "annotations[17]"
Located = tuple[Location, Entry | str]  # an entry, or the reason why it is invalid


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """Open a UTF-8 file. Invalid bytes become surrogates, which `entries.canonical` reports. Raise OSError on failure."""
    file = open_regular(path)
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        file.close()
        raise UnreadableError("it is UTF-16; save it as UTF-8")
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def numbered_lines(path: Path) -> Iterator[tuple[int, str | None]]:
    """Yield the lines that are not blank, with their numbers, and None for a line that is longer than LONGEST."""
    with open_text(path) as file:
        for number, line in enumerate(_bounded(file), 1):
            if len(line) > LONGEST:
                yield number, None
            elif not line.isspace():
                yield number, line


def _bounded(file: TextIO) -> Iterator[str]:
    """Yield the lines of a file. Of a line longer than LONGEST, yield only the first LONGEST + 1 characters."""
    while part := file.readline(LONGEST + 1):
        yield part
        while len(part) > LONGEST and part[-1] not in "\r\n":
            part = file.readline(LONGEST + 1)


def jsonl_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """Read a file with a JSON object per line."""
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
            continue
        try:
            entry = _object(line)
        except ValueError as error:
            yield number, with_slashes(line) or f"not valid JSON ({error}): {line.strip()[:60]!r}"
            continue
        yield (
            number,
            entry if isinstance(entry, dict) else f'expected an object {{"image": …, "text": …}}, got {line.strip()[:60]!r}',
        )


def with_slashes(text: str, line: int = 1) -> str:
    """Return a message with the corrected line if the backslashes of image paths are the only error of a JSON, or ""."""
    corrected = IMAGE_PATH.sub(lambda match: match[1] + re.sub(r"\\+", "/", match[2]), text)
    try:
        valid = corrected != text and parsed(corrected, STRICT)
    except ValueError:
        return ""
    return UNESCAPED.format(cut(corrected.split("\n")[line - 1].strip())) if isinstance(valid, dict | list) else ""


def _object(line: str) -> Any:
    """Return `parsed(line, STRICT)`, in less time for most lines.

    QUICK is enough for an object with as many keys as the line has colons: no key of it was repeated.
    """
    try:
        entry, end = QUICK.raw_decode(line)
    except (ValueError, RecursionError):
        return parsed(line, STRICT)  # raises the error with its reason
    flat = line[end:] in ("\n", "") and type(entry) is dict and len(entry) == line.count(":") and line.count("[") < DEEPEST - 1
    return entry if flat else parsed(line, STRICT)


def tsv_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """Read lines of image⇥caption, or image⇥question⇥answer with `|` between several answers.

    ⇥ is a tab. A line that starts with # is a comment; for an image with such a name, write ./#1.png. Quotes have no special
    meaning. The first line may name the columns, such as image⇥prompt⇥caption.
    """
    names: list[str] | None = None  # None before the first line; empty if that line does not name the columns
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
            columns = f"{len(cells)} column{'s' * (len(cells) > 1)} but the first line names {len(names)}"
            yield number, f"{columns}: {quoted(line.strip()[:60])}"
        elif len(cells) == 2:
            yield number, {"image": cells[0], "text": cells[1]}
        elif len(cells) == 3:
            yield number, {"image": cells[0], "question": cells[1], "answers": split_answers(cells[2])}
        else:
            columns = f"{len(cells)} column{'s' * (len(cells) > 1)}"
            expected = "expected image⇥caption or image⇥question⇥answer, where ⇥ is a tab"
            yield number, f"{columns} between tabs: {expected}; got {line.strip()[:60]!r}"


def csv_entries(path: Path) -> Iterator[tuple[int, Entry | str]]:
    """Read rows below a header such as image,caption or file_name,text or image,question,answer.

    Other columns are kept. The separator may be a semicolon, as Excel writes it. Quoting follows RFC 4180.
    """
    with open_text(path, newline="") as file:
        delimiter = ";" if ";" in (header_line := file.readline(LONGEST)) and "," not in header_line else ","
        file.seek(0)
        rows = _rows(_bounded(file), delimiter)
        number, header = next(rows, (1, []))
        names = [name.strip().lower() for name in header] if isinstance(header, list) else []
        if not is_header(names):
            yield number, f"the first line must name the columns, for example image,caption; it is {header_line.strip()[:60]!r}"
            return
        if reason := _repeated(names):
            yield number, reason
            return
        for number, row in rows:
            if isinstance(row, str):
                yield number, row
            elif len(row) != len(names):
                columns = f"{len(row)} column{'s' * (len(row) > 1)} but the header has {len(names)}"
                yield number, f"{columns}: put a text with commas in quotes; got {delimiter.join(row)[:60]!r}"
            else:
                yield number, _of_columns(names, row)


def _of_columns(names: list[str], cells: list[str]) -> Entry:
    """Return the entry of a row. A question_id of digits becomes a number, as in JSON."""
    entry: Entry = {name: cell.strip() for name, cell in zip(names, cells, strict=True) if name}
    entry |= {key: split_answers(entry[key]) for key in ANSWER_KEYS if key in entry}
    number = entry.get("question_id", "")
    return entry | {"question_id": int(number)} if WHOLE.fullmatch(number) else entry


def _repeated(names: list[str]) -> str:
    """Return the reason why these column names are invalid, or ""."""
    twice = next((name for name in names if name and names.count(name) > 1), "")
    return f"the first line names a column twice: {quoted(twice)}; keep one" if twice else ""


def split_answers(cell: str) -> list[str]:
    """Return the answers in a cell, which are separated by ANSWER_SEPARATOR."""
    return [answer.strip() for answer in cell.split(ANSWER_SEPARATOR)]


def is_header(cells: Iterable[str]) -> bool:
    """Return True if the cells are column names: one of an image, and one of a text or question."""
    names = {cell.strip().lower() for cell in cells}
    return bool(names.intersection(IMAGE_KEYS) and names.intersection((*TEXT_KEYS, "question")))


def _rows(lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yield each row that is not blank: the number of its first line, and its cells or the reason why it is invalid."""
    overlong: list[int] = []  # lengths of the lines of this row that were cut

    def checked_lines() -> Iterator[str]:
        for line in lines:
            overlong.extend([len(line)] * (len(line) > LONGEST))
            yield line

    # strict: otherwise the text of a quote that is not closed would be the rest of the file
    reader = csv.reader(checked_lines(), delimiter=delimiter, strict=True)
    while True:
        overlong.clear()
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"not valid CSV ({error}): put a text with quotes or commas in quotes, and write its own quotes twice"
            continue
        if overlong:
            yield number, TOO_LONG
        elif any(cell.strip() for cell in row):
            yield number, row
