"""Unpack images that are written inside JSON as "data:image/png;base64,…", as OpenAI's chats and Prodigy do."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import IMAGE_KEYS, Located, first_key
from lora_blip.data.images import LARGEST_FILE
from lora_blip.data.prepare.parquet_reader import SIGNATURES
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import make_folder, write_new

LONGEST = 2**26  # characters of a line with an image
DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.IGNORECASE)


def unpacked(entries: Iterable[Located], target: Path) -> Iterator[Located]:
    """Yield the entries. Write an image inside an entry to the folder `target`, once, and put its path in the entry."""
    make_folder(target)
    for at, entry in entries:
        key = first_key(entry, IMAGE_KEYS) if isinstance(entry, dict) else None
        image: Any = entry[key] if key and isinstance(entry, dict) else None
        match = DATA_URL.match(image) if isinstance(image, str) else None
        if not match or not isinstance(entry, dict) or not key:
            yield at, entry
            continue
        try:
            content = base64.b64decode("".join(image[match.end() :].split()), validate=True)
        except ValueError:
            content = b""
        if not 0 < len(content) <= LARGEST_FILE:
            yield (
                at,
                f"its image inside JSON has {counted(len(content), 'byte')}" if content else "its image is not valid base64",
            )
            continue
        suffix = next((suffix for start, suffix in SIGNATURES.items() if content.startswith(start)), "")
        path = target.absolute() / f"{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        if not path.exists() or path.stat().st_size != len(content):
            write_new(path, content)
        yield at, entry | {key: str(path)}
