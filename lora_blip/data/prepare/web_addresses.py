"""Refuse data sets that contain the web addresses of images instead of files: CC3M, CC12M, SBU and LAION."""

import re
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from lora_blip.data.entries import IMAGE_KEYS, TEXT_KEYS
from lora_blip.data.images import SUFFIXES
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import parsed

ADDRESS = re.compile(r"https?://\S+", re.IGNORECASE)
SBU = {"image_urls", "captions"}  # the keys of its file


def refuse_addresses(path: Path, form: str, lines: list[str], found: Any) -> None:
    """Raise DataError if a file has addresses where it should have files.

    lines: the start of the file, for the formats of one entry per line. found: the parsed file, for the others.
    """
    if form in ("tsv", "csv"):
        _refuse_rows(path, [line for line in lines if line.strip()][:3], "\t" if form == "tsv" else ",")
    elif form == "jsonl":
        entry = None
        with suppress(ValueError, IndexError):  # an invalid line is reported later
            entry = parsed(lines[0])
        _refuse_entry(path, entry, form)
    elif isinstance(found, dict) and found.keys() >= SBU:
        raise _refusal(path, "json", "image_urls", "captions")
    elif isinstance(found, list) and found:
        _refuse_entry(path, found[0], "json")


def _refuse_rows(path: Path, lines: list[str], separator: str) -> None:
    """Raise DataError if the rows of a table contain addresses, and no file names of images."""
    rows = [[cell.strip().strip('"') for cell in line.split(separator)] for line in lines]
    places = [index for row in rows for index, cell in enumerate(row) if ADDRESS.fullmatch(cell)]
    if not places or any(_is_file(cell) for row in rows for cell in row):
        return
    names, form, before = rows[0], "tsv" if separator == "\t" else "csv", ""
    if any(map(ADDRESS.fullmatch, names)):  # no header, which img2dataset needs
        names = [f"column{index}" for index in range(len(names))]
        names[next((index for index in range(len(names)) if index not in places), 0)] = "caption"
        names[places[0]] = "url"
        header = ("\\t" if form == "tsv" else ",").join(names)
        before = f"(printf '{header}\\n'; cat {quote(str(path))}) > named.{form}\n"
    url = names[places[0]] if places[0] < len(names) else "url"
    raise _refusal(path, form, url, next((name for name in names if name.lower() in TEXT_KEYS), "caption"), before)


def _refuse_entry(path: Path, entry: Any, form: str) -> None:
    """Raise DataError if an object has an address as its image, or an address and no image."""
    if not isinstance(entry, dict) or "conversations" in entry:
        return
    image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    key = next((key for key, value in entry.items() if isinstance(value, str) and ADDRESS.fullmatch(value)), "")
    if key and (image is None or image == entry[key]):
        raise _refusal(path, form, key, next((text for text in TEXT_KEYS if text in entry), "caption"))


def _is_file(cell: str) -> bool:
    return not ADDRESS.match(cell) and Path(cell).suffix.lower() in SUFFIXES


def _refusal(path: Path, form: str, url: str, caption: str, before: str = "") -> DataError:
    """Return the error with the commands that download the images and then read them. before: a command that names columns."""
    source, images = f"named.{form}" if before else quote(str(path)), quote(f"{path.stem}_images")
    return DataError(
        f"{path} has web addresses instead of image files; download them with img2dataset, then give its folder:\n"
        f"pip install img2dataset\n{before}"
        f"img2dataset --url_list {source} --input_format {form} --url_col {quote(url)} --caption_col {quote(caption)} "
        f"--output_format files --output_folder {images}\n"
        f"lora-blip prepare --source {images}"
    )
