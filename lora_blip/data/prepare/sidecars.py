"""Read the JSON file next to an image, as Google Takeout and gallery-dl write it.

For 1.jpg: 1.json, 1.jpg.json or 1.jpg.supplemental-metadata.json.
"""

import re
from pathlib import Path
from typing import Any

from lora_blip.data.entries import TEXT_KEYS, Entry, LeftOut
from lora_blip.data.formats import LONGEST, TOO_LONG, open_text
from lora_blip.data.tables import IMAGE_NAME
from lora_blip.runtime.untrusted import os_error_reason, parsed, shorten

KEYS = (*(key for key in TEXT_KEYS if key not in ("title", "prompt")), "content", "title")  # content: gallery-dl's posts
TAKEOUT = re.compile(r"(?<=.)\.(s[a-z-]*)$")  # Google cuts long names: 1.jpg.supplemental-meta.json
WHOLE_WORD = "supplemental-metadata"
TRIED = 20  # sidecars that are read to find out whether sidecars contain captions


def image_of(name: str) -> str:
    """Return what the name of a JSON file says about its image: its name, or its name without the suffix."""
    name = name[: -len(".json")]
    cut = TAKEOUT.search(name)
    return name[: cut.start()] if cut and WHOLE_WORD.startswith(cut[1]) else name


def sidecar_of(image: str, sidecars: dict[str, str]) -> str:
    """Return the JSON file of an image, or "" if it has none. sidecars: {`image_of`(file): file}."""
    return sidecars.get(image) or sidecars.get(image.removesuffix(Path(image).suffix), "")


def entry_of_sidecar(image: str, path: Path) -> Entry | str:
    """Return the entry of an image from its JSON file, or the reason why there is none. A photo without a text is left out."""
    try:
        with open_text(path) as file:
            text = file.read(LONGEST + 1)
        metadata = parsed(text) if len(text) <= LONGEST else None
    except OSError as error:
        return f"this file cannot be read ({os_error_reason(error)}); it should contain the caption of {image}"
    except ValueError as error:
        return f"it is not valid JSON ({shorten(str(error))}); it should contain the caption of {image}"
    if len(text) > LONGEST:
        return TOO_LONG
    caption = _caption(metadata) if isinstance(metadata, dict) else ""
    return {"image": image, "text": caption} if caption else LeftOut("its JSON file has no description, caption or title")


def _caption(metadata: dict[str, Any]) -> str:
    """Return the first text of the metadata, or "". A title that is the name of the file is no caption."""
    texts = (metadata.get(key) for key in KEYS)
    return next((text for text in texts if isinstance(text, str) and text.strip() and not IMAGE_NAME.fullmatch(text)), "")
