"""Write explain.html, one page without external files: each word with its probability, and where it attends in the image."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lora_blip.data.images import open_image
from lora_blip.data.preprocessing import WHOLE, Part
from lora_blip.reports.inspection import SHARED
from lora_blip.reports.report import MARKER, facts_html, json_html, policy, thumbnail
from lora_blip.reports.score_table import escaped
from lora_blip.runtime.files import write_whole
from lora_blip.version import __version__

TEMPLATE, REPORT = (Path(__file__).with_name(name) for name in ("explain.html", "report.html"))
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WordView:
    """A word, or the end of the text. None: the tokenizer has no token for it."""

    word: str
    probability: float | None  # the product over its tokens
    tokens: Sequence[tuple[str, float]]  # (token, probability)
    layers: Floats | None  # (layers, image states) attention, each row sums to 1; state 0 is the class token
    share: Floats | None  # (layers,) the part of the attention that is on the image


@dataclass(frozen=True)
class TextView:
    """A generated text with its words and the end token."""

    model: str  # "base" or "adapter"
    text: str
    words: Sequence[WordView]


@dataclass(frozen=True)
class ImageView:
    """An image with one text for each model. No text: the image cannot be read."""

    image: Path
    question: str
    prompt: str
    texts: Sequence[TextView]
    part: Part = WHOLE  # the part of the image that the model sees, over which the page draws the maps


def write(
    path: Path,
    images: Sequence[ImageView],
    facts: Mapping[str, str],
    formula: str,
    open_picture: Callable[[Path], Image.Image] = open_image,
) -> Path:
    """Write the page to `path` and return the path. The page needs no network.

    formula: a sentence that says how the maps are computed. open_picture: opens an image, or raises ImageError.
    """
    page = TEMPLATE.read_text(encoding="utf-8")
    for text, kind in SHARED.findall(REPORT.read_text(encoding="utf-8")):
        page = page.replace(f"/* the {kind} of report.html */", text)
    data = {"images": [image_data(image, open_picture) for image in images]}
    parts = {
        "policy": escaped(policy(page)),
        "facts": facts_html(facts, "This run"),
        "formula": escaped(formula),
        "version": escaped(__version__),
        "data": json_html(data),
    }
    filled = MARKER.sub(lambda marker: parts[marker[1]], page)  # in one pass, so that a marker in a text is not replaced
    write_whole(path, filled.encode("utf-8", "replace"))
    return path


def image_data(view: ImageView, open_picture: Callable[[Path], Image.Image]) -> dict[str, Any]:
    """Return what the script of the page reads about an image."""
    texts = [{"model": text.model, "text": text.text, "words": [word_data(word) for word in text.words]} for text in view.texts]
    named = {"image": str(view.image), "question": view.question, "prompt": view.prompt, "part": view.part}
    return named | {"texts": texts, "picture": thumbnail(view.image, open_picture)}


def word_data(word: WordView) -> dict[str, Any]:
    """Return a word with its maps: first the mean over the layers, then each layer.

    A map has one byte per patch, relative to its largest patch. `peaks` has the attention of the largest patch, and `class`
    that of the class token.
    """
    data = {"word": word.word, "p": word.probability, "tokens": [list(token) for token in word.tokens]}
    if word.layers is None or word.share is None:
        return data
    maps, share = (np.concatenate([each.mean(0, keepdims=True), each]) for each in (word.layers, word.share))
    patches = maps[:, 1:]
    peaks = patches.max(1, keepdims=True)
    levels = np.round(255 * patches / np.maximum(peaks, np.finfo(float).tiny)).astype(np.uint8)
    return data | {
        "maps": [base64.b64encode(level.tobytes()).decode("ascii") for level in levels],
        "peaks": [float(peak) for peak in peaks[:, 0]],
        "class": [float(part) for part in maps[:, 0]],
        "share": [float(part) for part in share],
    }
