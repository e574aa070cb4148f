"""Read JSON documents that users write: a list of objects, a list under a key, or an object {image name: caption}."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import IMAGE_KEYS
from lora_blip.data.formats import Located, several
from lora_blip.data.tables import IMAGE_NAME
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import quoted, shorten


def json_entries(path: Path, document: Any) -> Iterator[Located]:
    """Read [{"image": …, "caption": …}, …], {"data": [{…}, …]} or {"red_1.jpg": "a red cube", …}.

    If an image has a list of captions, yield an entry for each. Raise DataError for any other document.
    """
    if is_mapping(document):
        for name, texts in document.items():
            yield from several(shorten(name), {"image": name, "text": texts})
        return
    key = "" if isinstance(document, list) else list_key(document)
    if not isinstance(document, list) and not key:
        raise DataError(f'{path}: expected a list of objects, as in [{{"image": …, "text": …}}, …]')
    for index, entry in enumerate(document[key] if key else document):
        if not isinstance(entry, dict):
            yield f"{key}[{index}]", f"expected an object {{…}}, got {quoted(entry)}"
        elif "question" in entry:
            yield f"{key}[{index}]", entry
        else:
            yield from several(f"{key}[{index}]", entry)


def is_json_list(document: Any) -> bool:
    """Return True if `json_entries` can read a parsed document."""
    return isinstance(document, list) or bool(list_key(document)) or is_mapping(document)


def list_key(document: Any) -> str:
    """Return the key whose value is a list of objects with images, or ""."""
    for key, value in document.items() if isinstance(document, dict) else ():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not value[0].keys().isdisjoint(IMAGE_KEYS):
            return str(key)
    return ""


def is_mapping(document: Any) -> bool:
    """Return True for an object {image name: caption or list of captions}."""
    if not isinstance(document, dict) or not document:
        return False
    name, texts = next(iter(document.items()))
    return bool(IMAGE_NAME.fullmatch(name)) and isinstance(texts, str | list)
