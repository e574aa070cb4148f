"""Read JSON documents that users write: a list of objects, such a list under a key, or an object of names and captions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import IMAGE_KEYS
from lora_blip.data.formats import Located, several
from lora_blip.data.tables import IMAGE_NAME
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import cut, quoted


def json_entries(path: Path, found: Any) -> Iterator[Located]:
    """Read [{"image": …, "caption": …}, …], {"data": [{…}, …]} or {"red_1.jpg": "a red cube", …}.

    A list of captions gives an entry for each caption.
    """
    if is_mapping(found):
        for name, texts in found.items():
            yield from several(cut(name), {"image": name, "text": texts})
        return
    key = "" if isinstance(found, list) else list_key(found)
    if not isinstance(found, list) and not key:
        raise DataError(f'{path}: expected a list of objects, as in [{{"image": …, "text": …}}, …]')
    for index, entry in enumerate(found[key] if key else found):
        if not isinstance(entry, dict):
            yield f"{key}[{index}]", f"expected an object {{…}}, got {quoted(entry)}"
        elif "question" in entry:
            yield f"{key}[{index}]", entry
        else:
            yield from several(f"{key}[{index}]", entry)


def is_json_list(found: Any) -> bool:
    """Return True if `json_entries` can read a document."""
    return isinstance(found, list) or bool(list_key(found)) or is_mapping(found)


def list_key(found: Any) -> str:
    """Return the key whose value is a list of objects with images, or ""."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not value[0].keys().isdisjoint(IMAGE_KEYS):
            return str(key)
    return ""


def is_mapping(found: Any) -> bool:
    """Return True for {name of an image: caption or captions}."""
    if not isinstance(found, dict) or not found:
        return False
    name, texts = next(iter(found.items()))
    return bool(IMAGE_NAME.fullmatch(name)) and isinstance(texts, str | list)
