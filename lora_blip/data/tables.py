"""Read tables, such as CSV and TSV. Readers yield (line number, entry), or (line number, reason) for an invalid row.

The delimiter, the quoting, the encoding and the columns are detected. `Keys` names columns that are not detected.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from lora_blip.data.columns import INTEGER, keys_of_columns
from lora_blip.data.entries import ANSWER_SEPARATOR, IMAGE_KEYS, IMAGE_NAME, TEXT_KEYS, Entry, Located, plain_name
from lora_blip.data.formats import LONGEST, NO_KEYS, TOO_LONG, Keys, bounded, open_text, table_encoding
from lora_blip.data.several_files import chosen
from lora_blip.data.several_texts import numbered_names, numbered_of, several
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted

BOOLEANS = {"TRUE": "yes", "FALSE": "no"}  # as spreadsheet programs write them into a CSV
WHOLE = re.compile(r"0|[1-9][0-9]{0,17}")  # a whole number, as JSON writes it
QUOTED_CELL = re.compile(r'\s*"(?:[^"]|"")*"\s*')
ADDRESS = re.compile(r"\w+://\S+")
DELIMITERS = ",\t;|"
DELIMITER_LINE = re.compile(r'"?sep=(.)"?\1*\s*', re.IGNORECASE)  # the first line of some CSV files, for Excel
MOST_TITLES = 10  # rows above the header
SAMPLE = 50  # lines that are compared to detect the delimiter, the quoting and the columns

Row = tuple[int, list[str] | str]  # the number of the row's first line, and its cells or the reason why it is invalid


def csv_entries(path: Path, keys: Keys = NO_KEYS) -> Iterator[Located]:
    """Read rows below a header such as image,caption or file_name;text. Keep other columns. Quoting follows RFC 4180."""
    encoding = table_encoding(path)
    delimiter = table_delimiter(path, "csv", encoding, keys)
    with open_text(path, newline="", encoding=encoding) as file:
        lines = (line if number or not DELIMITER_LINE.fullmatch(line) else "\n" for number, line in enumerate(bounded(file)))
        yield from entries_of_rows(path, csv_rows(lines, delimiter), keys, needs_header=True)


def tsv_entries(path: Path, keys: Keys = NO_KEYS) -> Iterator[Located]:
    """Read lines of image⇥caption, or image⇥question⇥answer with `|` between several answers.

    ⇥ is a tab. A line that starts with # is a comment; for an image with such a name, write ./#1.png. The first line may name
    the columns. Quotes are normal characters, unless the first lines show that they are quotes of RFC 4180 (see `_is_quoted`).
    """
    encoding = table_encoding(path)
    delimiter = table_delimiter(path, "tsv", encoding, keys)
    is_quoted = delimiter != "\t" or _is_quoted(_sample(path, encoding))
    with open_text(path, newline="" if is_quoted else None, encoding=encoding) as file:
        lines = bounded(file)
        rows = csv_rows(lines, delimiter) if is_quoted else _plain_rows(lines)
        yield from entries_of_rows(path, (row for row in rows if not _is_comment(row)), keys, needs_header=False)


def entries_of_rows(path: Path, rows: Iterator[Row], keys: Keys, needs_header: bool) -> Iterator[Located]:
    """Yield the entries of the rows of a table. Raise DataError if the columns are unknown."""
    first = list(islice(rows, SAMPLE))
    while first and all(isinstance(row, str) for _, row in first):  # no valid row yet
        yield from ((number, str(row)) for number, row in first)
        first = list(islice(rows, SAMPLE))
    if not first:
        return
    first = first[titles_above([row if isinstance(row, list) else [] for _, row in first], keys) :]
    number, header = next(((number, row) for number, row in first if isinstance(row, list)), (0, []))
    names = list(map(plain_name, header))
    below = [row for at, row in first if isinstance(row, list) and at != number and len(row) == len(header)]
    named = chosen(keys.named, header)
    if not (named or is_header(names)) and not _is_header_row(header, below, needs_header):
        yield from _without_header(chain(first, rows), first)
        return
    if reason := _repeated(names):
        yield number, reason
        return
    columns = keys_of_columns(path, number, header, below, named)
    count, asks = len(header), "question" in columns
    numbered = numbered_names(columns, asks)
    for at, row in chain(first, rows):
        if isinstance(row, str):
            yield at, row
        elif len(row) != count:
            different = f"{counted(len(row), 'column')} but the header has {count}"
            yield at, f"{different}: put a text that contains the delimiter in quotes; got {quoted(' '.join(row)[:60])}"
        elif at != number:
            entry = _entry_of_row(columns, row)
            entry |= {name: BOOLEANS.get(entry[name], entry[name]) for name in numbered if asks}
            yield from several(at, entry) if numbered else [(at, entry)]


def titles_above(rows: list[list[str]], keys: Keys) -> int:
    """Return the number of rows with one cell above a header: titles, as in a sheet that was saved as CSV.

    A header has known or named columns, or it is above a row with the name of an image. No row above that one has an image.
    """
    for number, row in enumerate(rows[: MOST_TITLES + 1]):
        if sum(bool(cell.strip()) for cell in row) != 1:
            before_images = not any(map(_has_image, rows[: number + 1]))
            above_images = before_images and any(len(each) == len(row) and _has_image(each) for each in rows[number:])
            return number if has_known_columns(row, keys) or above_images else 0
    return 0


def _has_image(row: list[str]) -> bool:
    """Return True if a cell is the name of an image, or an address."""
    return any(ADDRESS.fullmatch(cell.strip()) or IMAGE_NAME.fullmatch(cell.strip()) for cell in row)


def has_known_columns(row: list[str], keys: Keys) -> bool:
    """Return True if a row contains the names that the user gives, or else usual names of an image and a text."""
    cells = {cell.strip().lower() for cell in row}
    named = chosen(keys.named, row)
    if not named:
        return is_header(row)
    return all(name.strip().lower() in cells or numbered_of(row, ours, name) for ours, name in named.items())


def delimiter_of(sample: list[str], usual: str, keys: Keys = NO_KEYS) -> str:
    """Return the delimiter that gives a known header.

    If none does, return the delimiter with which the largest share of lines has as many columns as the first line.

    usual: the delimiter to prefer if several are equally good.
    """

    def score(delimiter: str) -> tuple[bool, bool, float, bool, int]:
        rows = [row for row in csv.reader(sample, delimiter=delimiter) if row]
        titles = titles_above(rows, keys)
        rows = rows[titles:]
        header = rows[0] if rows else []
        known, width = has_known_columns(header, keys), len(header)
        share = [len(row) for row in rows].count(width) / len(rows) if width > 1 else 0.0
        return known and width > 1, share > 0 and not titles, share, delimiter == usual, width

    try:
        return max(DELIMITERS, key=score) if sample else usual
    except csv.Error:
        return usual


def table_delimiter(path: Path, file_format: str, encoding: str, keys: Keys = NO_KEYS) -> str:
    """Return the delimiter of a file in the format "csv" or "tsv"."""
    sample, is_csv = _sample(path, encoding), file_format == "csv"
    if is_csv and sample and (named := DELIMITER_LINE.fullmatch(sample[0])):
        return named[1]
    return delimiter_of([line for line in sample if is_csv or not line.startswith("#")], "," if is_csv else "\t", keys)


def _sample(path: Path, encoding: str) -> list[str]:
    """Return the first lines of a table."""
    with open_text(path, newline="", encoding=encoding) as file:
        return [line for line in islice(bounded(file), SAMPLE) if len(line) <= LONGEST and line.strip()]


def _is_quoted(sample: list[str]) -> bool:
    """Return True if the sample has quotes of RFC 4180.

    They are recognized by a doubled quote ("a 12"" pizza"), by a row of only quoted cells, or by a text with a line break.
    """
    cells = [line.rstrip("\r\n").split("\t") for line in sample]
    starting = [cell for row in cells for cell in row if cell.startswith('"')]
    if not starting or not all(map(QUOTED_CELL.fullmatch, starting)):
        counts, rows = [len(row) for row in cells], list(csv.reader(sample, delimiter="\t"))
        split = len(set(counts)) > 1 and len({len(row) for row in rows if row}) == 1 and len(rows) < len(cells)
        return split and len(rows) > 1  # a text with a line break
    doubled = any('""' in cell.strip()[1:-1] for cell in starting)
    return doubled or any(all(cell.startswith('"') for cell in row) for row in cells)


def _is_comment(row: Row) -> bool:
    return isinstance(row[1], list) and bool(row[1]) and row[1][0].startswith("#")


def is_header(cells: Iterable[str]) -> bool:
    """Return True if the cells contain a known name for the image, and one for the text or the question."""
    names = set(map(plain_name, cells))
    has_text = names.intersection((*TEXT_KEYS, "question")) or numbered_names([*names], False)
    return bool(names.intersection(IMAGE_KEYS) and has_text)


def _is_header_row(header: list[str], below: list[list[str]], needs_header: bool) -> bool:
    """Return True if the first row is a header with unknown names, and not data."""
    if len(header) < 2 or _has_image(header):
        return needs_header and len(header) < 2
    return needs_header or any(IMAGE_NAME.fullmatch(cell.strip()) for row in below for cell in row)


def _without_header(rows: Iterable[Row], first: list[Row]) -> Iterator[Located]:
    """Yield the entries of a table without a header: rows of image and caption, or of image, question and answers.

    If the middle one of three columns contains only whole numbers, the rows are image, number and caption.
    """
    middles = [row[1] for _, row in first if isinstance(row, list) and len(row) == 3]
    numbered = bool(middles) and all(INTEGER.fullmatch(cell.strip()) for cell in middles)
    for number, row in rows:
        if isinstance(row, str):
            yield number, row
            continue
        cells = [cell.strip() for cell in row]
        if len(cells) == 2 or (len(cells) == 3 and numbered):
            yield number, {"image": cells[0], "text": cells[-1]}
        elif len(cells) == 3:
            yield number, {"image": cells[0], "question": cells[1], "answers": split_answers(cells[2])}
        else:
            columns = counted(len(cells), "column")
            expected = "expected image⇥caption or image⇥question⇥answer, where ⇥ is a tab"
            yield number, f"{columns} between tabs: {expected}; got {quoted(' '.join(cells)[:60])}"


def _entry_of_row(names: list[str], cells: list[str]) -> Entry:
    """Return the entry of a row. A question_id of digits becomes a number, as in JSON."""
    entry: Entry = {name: cell.strip() for name, cell in zip(names, cells, strict=True) if name}
    if "answers" in entry:
        entry["answers"] = split_answers(entry["answers"])
    if WHOLE.fullmatch(entry.get("question_id", "")):
        entry["question_id"] = int(entry["question_id"])
    return entry


def _repeated(names: list[str]) -> str:
    """Return the reason why the column names are invalid if a name is repeated, or ""."""
    twice = next((name for name in names if name and names.count(name) > 1), "")
    return f"the first line names a column twice: {quoted(twice)}; keep one" if twice else ""


def split_answers(cell: str) -> list[str]:
    """Return the answers in a cell, which are separated by ANSWER_SEPARATOR. TRUE and FALSE of a spreadsheet are yes and no."""
    return [BOOLEANS.get(answer.strip(), answer.strip()) for answer in cell.split(ANSWER_SEPARATOR)]


def _plain_rows(lines: Iterable[str]) -> Iterator[Row]:
    """Split each line that is not blank at its tabs, and yield (number, cells)."""
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST:
            yield number, TOO_LONG
        elif not line.isspace():
            yield number, [cell.strip() for cell in line.split("\t")]


def csv_rows(lines: Iterable[str], delimiter: str) -> Iterator[Row]:
    """Yield (number, cells) for each row that is not blank. Quotes follow RFC 4180."""
    overlong: list[int] = []  # lengths of the lines of this row that were cut

    def checked_lines() -> Iterator[str]:
        for line in lines:
            overlong.extend([len(line)] * (len(line) > LONGEST))
            yield line

    # strict=True: otherwise a quote that is not closed would swallow the rest of the file
    reader = csv.reader(checked_lines(), delimiter=delimiter, strict=True)
    while True:
        overlong.clear()
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            advice = 'put a text with quotes or commas in quotes, and write its own quotes twice: "a 12"" pizza"'
            yield number, f"it is not valid CSV ({error}); {advice}"
            continue
        if overlong:
            yield number, TOO_LONG
        elif any(cell.strip() for cell in row):
            yield number, row
