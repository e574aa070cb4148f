"""Read JSON documents: a list of objects, lists under keys such as train and val, or an object {image name: caption}."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.conversions import converted, needs_conversion
from lora_blip.data.entries import IMAGE_KEYS, SPLITS, Located
from lora_blip.data.several_texts import several
from lora_blip.data.tables import IMAGE_NAME
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import quoted, shorten


def json_entries(path: Path, document: Any, raw: bool = False) -> Iterator[Located]:
    """Read [{"image": …, "caption": …}, …], {"data": [{…}, …]}, {"train": […], "val": […]} or {"red_1.jpg": "a red cube", …}.

    The objects may have the layout of another tool, such as LLaVA's conversations.
    If an image has a list of captions, yield an entry for each. Raise DataError for any other document.
    raw: yield each object as it is, because its keys will be renamed.
    """
    if is_mapping(document):
        for name, texts in document.items():
            yield from several(shorten(name), {"image": name, "text": texts})
        return
    lists = {"": document} if isinstance(document, list) else lists_in(document)
    if not lists:
        raise DataError(f'{path}: expected a list of objects, as in [{{"image": …, "text": …}}, …]')
    convert = any(needs_conversion(entries[0]) for entries in lists.values() if entries)
    for key, entries in lists.items():
        split = {"split": key} if len(lists) > 1 else {}
        for index, entry in enumerate(entries):
            at = f"{key}[{index}]"
            if not isinstance(entry, dict | list) or (isinstance(entry, list) and not convert):
                yield at, f"expected an object {{…}}, got {quoted(entry)}"
                continue
            one: Any = split | entry if split and isinstance(entry, dict) else entry
            yield from [(at, one)] if raw else converted(at, one) if convert else several(at, one)


def is_json_list(document: Any) -> bool:
    """Return True if `json_entries` can read a parsed document."""
    return isinstance(document, list) or bool(lists_in(document)) or is_mapping(document)


def lists_in(document: Any) -> dict[str, list[Any]]:
    """Return {key: list of objects with images} of an object: its first such list, or the lists of all splits."""
    lists = {str(key): value for key, value in document.items() if _has_images(value)} if isinstance(document, dict) else {}
    splits = {key: value for key, value in lists.items() if key.lower() in SPLITS}
    return splits if len(splits) > 1 else dict(list(lists.items())[:1])


def _has_images(value: Any) -> bool:
    """Return True for a list of objects with images."""
    first = value[0] if isinstance(value, list) and value else None
    return needs_conversion(first) or (isinstance(first, dict) and not first.keys().isdisjoint(IMAGE_KEYS))


def is_mapping(document: Any) -> bool:
    """Return True for an object {image name: caption or list of captions}."""
    if not isinstance(document, dict) or not document:
        return False
    name, texts = next(iter(document.items()))
    return bool(IMAGE_NAME.fullmatch(name)) and isinstance(texts, str | list)
