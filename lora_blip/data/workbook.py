"""Read the sheet of an Excel workbook (.xlsx) that has the images and texts, if openpyxl is installed."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from lora_blip.data.entries import IMAGE_NAME, Located
from lora_blip.data.formats import LONGEST, NO_KEYS, TOO_LONG, Keys
from lora_blip.data.tables import Row, entries_of_rows, has_known_columns
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import shorten

Merged = dict[int, dict[int, int]]  # row → {column: last row} of the cells that are merged over several rows

SIGNATURES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # first bytes of .xlsx, and of .xls
LARGEST = 2**30  # largest number of bytes of the unpacked workbook
MOST_COLUMNS = 1000  # largest number of columns that are read
MOST_SHEETS = 100  # largest number of sheets whose first rows are compared
MOST_TITLES = 20  # largest number of rows of a title above a table
FIRST_ROWS = 10  # rows of a sheet that are searched for the name of an image
MOST_MERGED = 100_000  # largest number of merged cells that are read
MERGED = re.compile(rb'<(?:\w+:)?mergeCell [^>]{0,50}?ref="([A-Z]{1,3})(\d{1,7}):[A-Z]{1,3}(\d{1,7})"')
SAVE_AS = 'in Excel, save it as "CSV UTF-8 (Comma delimited)" and give the .csv file'


def workbook_entries(path: Path, keys: Keys = NO_KEYS) -> Iterator[Located]:
    """Read the rows of one sheet (see `_sheet_of`), as `csv_entries` does. Raise DataError if the workbook cannot be read."""
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f'{path} is an Excel workbook; to read it, install openpyxl: pip install "lora_blip[excel]"; or {SAVE_AS}'
        ) from None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise DataError(f"{path}: the unpacked workbook has more than {LARGEST:,} bytes; {SAVE_AS}")
        workbook = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheet = _sheet_of(path, workbook.worksheets, keys)
        merged = _merged_cells(path, sheet)
    except DataError:
        raise
    except Exception as error:  # openpyxl raises errors of many types for a damaged file
        raise DataError(f"{path} is not a readable Excel workbook ({shorten(str(error))}); {SAVE_AS}") from None
    try:
        yield from entries_of_rows(path, _rows(path, sheet, merged), keys, needs_header=True)
    finally:
        workbook.close()


def _sheet_of(path: Path, sheets: Sequence[Any], keys: Keys) -> Any:
    """Return the first sheet whose first row has the known or named columns.

    If none has, return the first sheet that has the name of an image below its first row, or else the first sheet.
    """
    with_images = []
    for sheet in sheets[:MOST_SHEETS]:
        with suppress(DataError):  # a damaged sheet that may not be needed
            rows = _rows(path, sheet, {})
            row = next(rows, (0, ""))[1]
            if isinstance(row, list) and has_known_columns(row, keys):
                return sheet
            below = (cell.strip() for _, cells in islice(rows, FIRST_ROWS) if isinstance(cells, list) for cell in cells)
            with_images += [sheet] * any(map(IMAGE_NAME.fullmatch, below))
    return (with_images or sheets)[0]


def _rows(path: Path, sheet: Any, merged: Merged) -> Iterator[Row]:
    """Yield (number, cells) for each row that is not blank. Cells are texts. Remove empty columns at the end.

    Leave out the rows with one cell above a row with several: they are titles. A merged cell has its value in each row.
    merged: see `_merged_cells`.
    """
    open_cells: dict[int, tuple[str, int]] = {}
    width = 0
    titles: list[Row] = []
    rows = sheet.iter_rows(values_only=True, max_col=MOST_COLUMNS)
    number = 0
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            yield from titles
            return
        except Exception as error:  # openpyxl reads a row only when it is needed, and raises errors of many types
            raise DataError(f"{path}:{number}: the workbook is damaged ({shorten(str(error))}); {SAVE_AS}") from None
        cells = ["" if value is None else _text(value) for value in row]
        if not any(cell.strip() for cell in cells):
            continue
        _fill(cells, number, merged, open_cells)
        used = max(index for index, cell in enumerate(cells, 1) if cell.strip())
        if not width and len(titles) < MOST_TITLES and sum(bool(cell.strip()) for cell in cells) == 1:
            titles.append((number, [cells[used - 1]]))
            continue
        if not width and used == 1:  # a table of one column
            yield from titles
        width, titles = width or used, []
        cells = (cells + [""] * width)[: max(width, used)]
        yield number, TOO_LONG if sum(map(len, cells)) > LONGEST else cells


def _merged_cells(path: Path, sheet: Any) -> Merged:
    """Return {row: {column: last row}} of the cells that are merged over several rows.

    openpyxl does not read them if it reads row by row. The element `mergeCells` comes after the rows.
    """
    result: Merged = {}
    count, rest = 0, b""
    name = getattr(sheet, "_worksheet_path", "")  # not a documented attribute
    if not name:
        return result
    from openpyxl.utils import column_index_from_string

    with zipfile.ZipFile(path) as archive, archive.open(name) as file:
        while (part := file.read(2**20)) and count < MOST_MERGED:
            rest += part
            end = 0
            for match in MERGED.finditer(rest):
                column, first, last, end = match[1].decode(), int(match[2]), int(match[3]), match.end()
                if first < last:
                    result.setdefault(first, {})[column_index_from_string(column) - 1] = last
                    count += 1
            rest = rest[max(end, len(rest) - 100) :]
    return result


def _fill(cells: list[str], number: int, merged: Merged, open_cells: dict[int, tuple[str, int]]) -> None:
    """Give the cells of a row that continue a merged cell its value. open_cells: {column: (value, last row)} of these cells."""
    for column, (value, last) in open_cells.items():
        if number <= last and column < len(cells) and not cells[column]:
            cells[column] = value
    for column, last in merged.get(number, {}).items():
        if column < len(cells):
            open_cells[column] = cells[column], last


def _text(value: object) -> str:
    """Return a cell as Excel shows it: 3.0 is 3, and a boolean is TRUE or FALSE."""
    if isinstance(value, bool):
        return str(value).upper()
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else str(value)
