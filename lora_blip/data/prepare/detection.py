"""Detect the format of a file: from its first bytes, its suffix, its first line, or the keys of its JSON document."""

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_blip.data import formats, tables, unreadable_formats
from lora_blip.data.conversions import needs_conversion
from lora_blip.data.entries import IMAGE_KEYS, Located
from lora_blip.data.formats import Keys
from lora_blip.data.prepare import exports, published
from lora_blip.data.prepare.json_lists import is_json_list, json_entries
from lora_blip.data.prepare.packed import PACKED, packed_kind
from lora_blip.data.prepare.published import TOKEN
from lora_blip.data.prepare.web_addresses import refuse_addresses
from lora_blip.data.workbook import SIGNATURES, workbook_entries
from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell, reason_and_fix
from lora_blip.runtime.untrusted import open_regular, os_error_reason, parsed, shorten

TABLES: dict[str, Callable[[Path, Keys], Iterator[Located]]] = {
    "tsv": tables.tsv_entries,
    "csv": tables.csv_entries,
    "xlsx": workbook_entries,
}
LINES: dict[str, Callable[[Path], Iterator[Located]]] = {
    "jsonl": formats.jsonl_entries,
    "flickr8k": published.flickr8k_entries,
    "flickr30k": published.flickr30k_entries,
}
DOCUMENTS: dict[str, Callable[[Path, Any], Iterator[Located]]] = {
    "json": json_entries,
    "coco": published.coco_entries,
    "karpathy": published.karpathy_entries,
    "textcaps": exports.textcaps_entries,
    "llava": json_entries,
    "via": exports.via_entries,
    "labelstudio": exports.studio_entries,
    "labelstudio_min": exports.studio_min_entries,
    "kohya": exports.kohya_entries,
    "visual_genome": exports.genome_entries,
    "gqa": exports.gqa_entries,
    "aokvqa": exports.aokvqa_entries,
}
FORMATS = (*LINES, *TABLES, *DOCUMENTS, *PACKED, "vqa", "folder")


def load(path: Path, requested: str) -> tuple[str, Any]:
    """Return (format, parsed JSON document), or (format, None) for a file that is not one JSON document.

    requested: the format; "auto": detect it. Raise DataError if it cannot be detected, or the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            head = file.read(8192)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_and_fix(error, path) or os_error_reason(error)}") from None
    if requested == "auto" and (advice := unreadable_formats.described_source(path, head)):
        raise DataError(f"{path} is {advice}")
    if (file_format := packed_kind(path, head)) and requested in ("auto", file_format):
        return file_format, None
    if requested == "auto" and head.startswith(SIGNATURES):
        requested = "xlsx"
    is_utf16 = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    lines = head.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").splitlines()
    if requested == "auto":
        requested = _line_format(path, next((line.strip() for line in lines if line.strip() and not line.startswith("#")), ""))
    document = None if requested in LINES or requested in TABLES else published.load_json(path)
    if requested != "xlsx":
        refuse_addresses(path, requested, lines, document)
    if requested in LINES or requested in TABLES:
        return requested, None
    file_format = _document_format(document) if requested == "document" else requested
    if not file_format or (file_format == "vqa" and not isinstance(document, dict)):
        keys = (
            f"it has the keys {shorten(', '.join(list(document)[:8]))}" if isinstance(document, dict) else "it is not an object"
        )
        raise DataError(f"{path}: the format of this JSON file is unknown ({keys}); {_format_advice(path)}")
    return file_format, document


def _line_format(path: Path, first: str) -> str:
    """Return the format of a file by its suffix and first line, or "document" for a file that is one JSON document."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if TOKEN.fullmatch(first):
        return "flickr8k"
    if published.FLICKR30K.fullmatch(first):
        return "flickr30k"
    if suffix in (".tsv", ".csv"):
        return suffix[1:]
    if suffix == ".json" or first.startswith(("{", "[")):
        return "jsonl" if _is_object(first) else "document"
    if tables.is_header(re.split(r"[,;\t|]", first)):
        return "flickr8k" if (path.name, first.lower()) == ("captions.txt", "image,caption") else "csv"
    if "\t" in first:
        return "tsv"
    if any(tables.IMAGE_NAME.fullmatch(first.partition(delimiter)[0].strip()) and delimiter in first for delimiter in ",;|"):
        return "csv"
    if tables.IMAGE_NAME.fullmatch(first):
        fix = "write an image, a tab and its text in each line"
        beside = (path.with_name(name) for name in ("captions.txt", "Flickr8k.token.txt"))
        if path.name in published.FLICKR8K_LISTS.values() and (texts := next(filter(Path.is_file, beside), None)):
            fix = f"give the file with the texts, which uses this list as a split: {texts}"
        raise DataError(f"{path} is a list of images without texts; {fix}")
    raise DataError(f"{path}: the format of this file is unknown; its first line is {first[:60]!r}; {_format_advice(path)}")


def _is_object(line: str) -> bool:
    """Return True if the first line is a complete JSON object with an image, as in JSONL."""
    try:
        entry = parsed(line)
    except ValueError:
        return False
    has_image = isinstance(entry, dict) and any(key in entry for key in IMAGE_KEYS)
    return has_image or (needs_conversion(entry) and "annotations" not in entry)


def _document_format(document: Any) -> str:
    """Return the format of a parsed JSON document, or "" if it is unknown."""
    if file_format := exports.document_format(document):
        return file_format
    if isinstance(document, list):
        return "json"
    keys = document.keys() if isinstance(document, dict) else set()
    if "images" in keys:
        first = next(iter(document["images"]), None) if isinstance(document["images"], list) else None
        if "annotations" in keys:
            return "coco"
        return "karpathy" if not isinstance(first, dict) or first.keys() & {"sentences", "filepath", "split"} else ""
    if is_json_list(document) and "questions" not in keys:
        return "json"
    return "vqa" if keys & {"questions", "annotations"} else ""


def _format_advice(path: Path) -> str:
    """Return the advice for a file of an unknown format."""
    command = f"lora-blip prepare --source {quoted_for_shell(str(path))} --format FORMAT"
    return f"give another file, or convert it: {command}, with one of the formats {', '.join(FORMATS)}"
