"""Report accents that the tokenizer of a base removes, such as that of BLIP."""

import unicodedata
from collections.abc import Iterable
from typing import Any

from lora_blip.runtime.counts import counted


def lost_accents(tokenizer: Any, texts: Iterable[str]) -> str:
    """Return a line with the number of texts that lose accents, and an example. Return "" if none does."""
    if tokenizer.decode(tokenizer("é", add_special_tokens=False).input_ids).strip() != "e":
        return ""
    first, lost, count = "", 0, 0
    for text in texts:
        count += 1
        if not text.isascii() and (word := next(filter(has_accent, text.split()), "")):
            first, lost = first or word, lost + 1
    if not lost:
        return ""
    example = f"{first} → {without_accents(first)}"
    return (
        f"note: the tokenizer of this base removes accents, in {lost} of {counted(count, 'text')}: {example}. Generated texts "
        "have no accents. Exact match of captions ignores accents. All other scores, also VQA accuracy, compare them. "
        "A BLIP-2 keeps accents"
    )


def has_accent(word: str) -> bool:
    """Return True if a word has a letter with an accent."""
    return any(map(unicodedata.combining, unicodedata.normalize("NFD", word)))


def without_accents(word: str) -> str:
    """Return a word without its accents."""
    return "".join(letter for letter in unicodedata.normalize("NFD", word) if not unicodedata.combining(letter))
