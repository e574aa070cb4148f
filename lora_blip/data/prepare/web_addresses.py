"""Refuse data sets that contain the web addresses of images instead of files: CC3M, CC12M, SBU and LAION."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_blip.data.conversions import converted, needs_conversion
from lora_blip.data.entries import IMAGE_KEYS, TEXT_KEYS
from lora_blip.data.images import SUFFIXES
from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell as quote
from lora_blip.runtime.untrusted import parsed

ADDRESS = re.compile(r"https?://\S+", re.IGNORECASE)
SBU = {"image_urls", "captions"}  # the keys of SBU's file


def refuse_addresses(path: Path, file_format: str, lines: list[str], document: Any) -> None:
    """Raise DataError if a file contains web addresses in place of image paths.

    lines: the first lines of the file, for formats with one entry per line. document: the parsed file, for JSON documents.
    """
    if file_format in ("tsv", "csv"):
        _refuse_rows(path, [line for line in lines if line.strip()][:3], "\t" if file_format == "tsv" else ",")
    elif file_format == "jsonl":
        entry = None
        with suppress(ValueError, IndexError):  # an invalid line is reported later
            entry = parsed(lines[0])
        _refuse_entry(path, entry, file_format)
    elif isinstance(document, dict) and document.keys() >= SBU:
        raise refusal(path, "json", "image_urls", "captions")
    elif isinstance(document, list) and document:
        _refuse_entry(path, document[0], "json")


def _refuse_rows(path: Path, lines: list[str], separator: str) -> None:
    """Raise DataError if the first rows of a table contain web addresses, and no image file name."""
    rows = [[cell.strip().strip('"') for cell in line.split(separator)] for line in lines]
    columns = [index for row in rows for index, cell in enumerate(row) if ADDRESS.fullmatch(cell)]
    if not columns or any(_is_file(cell) for row in rows for cell in row):
        return
    header, file_format, header_command = rows[0], "tsv" if separator == "\t" else "csv", ""
    if any(map(ADDRESS.fullmatch, header)):  # the table has no header, but img2dataset needs one
        header = [f"column{index}" for index in range(len(header))]
        header[next((index for index in range(len(header)) if index not in columns), 0)] = "caption"
        header[columns[0]] = "url"
        line = ("\\t" if file_format == "tsv" else ",").join(header)
        header_command = f"(printf '{line}\\n'; cat {quote(str(path))}) > named.{file_format}\n"
    url = header[columns[0]] if columns[0] < len(header) else "url"
    raise refusal(
        path, file_format, url, next((name for name in header if name.lower() in TEXT_KEYS), "caption"), header_command
    )


def _refuse_entry(path: Path, entry: Any, file_format: str) -> None:
    """Raise DataError if the image of an entry is a web address, or if it has an address and no image."""
    if needs_conversion(entry):
        _refuse_record(path, entry)
        return
    if not isinstance(entry, dict):
        return
    image = next((entry[key] for key in IMAGE_KEYS if key in entry), None)
    key = next((key for key, value in entry.items() if isinstance(value, str) and ADDRESS.fullmatch(value)), "")
    if key and (image is None or image == entry[key]):
        raise refusal(path, file_format, key, next((text for text in TEXT_KEYS if text in entry), "caption"))


def _refuse_record(path: Path, record: Any) -> None:
    """Raise DataError if the image of a record of another tool, such as a chat, is a web address."""
    entries = (entry for _, entry in converted(0, record) if isinstance(entry, dict))
    image = next((entry.get("image") for entry in entries), None)
    if isinstance(image, str) and ADDRESS.fullmatch(image):
        local = quote(f"{path.stem}_local{path.suffix}")
        raise DataError(
            f"{path} contains web addresses instead of image paths; download the images, and replace the addresses by paths:\n"
            f"grep -oE '\"https?://[^\"]+' {quote(str(path))} | tr -d '\"' | sort -u > addresses.txt\n"
            "wget --force-directories --input-file addresses.txt --directory-prefix downloaded\n"
            f"sed -E 's#\"https?://#\"downloaded/#g' {quote(str(path))} > {local}\n"
            f"lora-blip prepare --source {local}"
        )


def _is_file(cell: str) -> bool:
    """Return True if a cell is the name of an image file."""
    return not ADDRESS.match(cell) and Path(cell).suffix.lower() in SUFFIXES


def refusal(path: Path, file_format: str, url: str, caption: str, header_command: str = "") -> DataError:
    """Return the error, with commands that download and prepare the images. header_command: adds a header to the table."""
    source, images = f"named.{file_format}" if header_command else quote(str(path)), quote(f"{path.stem}_images")
    return DataError(
        f"{path} contains web addresses instead of image paths; download the images with img2dataset, then "
        "prepare its output folder:\n"
        f"pip install img2dataset\n{header_command}"
        f"img2dataset --url_list {source} --input_format {file_format} --url_col {quote(url)} --caption_col {quote(caption)} "
        f"--output_format files --output_folder {images}\n"
        f"lora-blip prepare --source {images}"
    )
