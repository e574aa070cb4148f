"""Exact match: the fraction of predictions that equal a reference."""

import re
import unicodedata

MARK = re.compile(r"\s*([^\w\s])\s*")  # a punctuation mark and the spaces around it


def normal(text: str) -> str:
    """Normalise a text: ignore case, accents, spaces at punctuation and a final full stop, which BLIP's tokenizer loses."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return MARK.sub(r"\1", " ".join(plain.split())).rstrip(".")


def exact_match(predictions: list[str], references: list[list[str]]) -> float:
    """Return the fraction of predictions that equal one of their references, 0 to 1."""
    if not predictions:
        raise ValueError("exact match needs at least one prediction")
    pairs = zip(predictions, references, strict=True)
    return sum(normal(said) in {normal(text) for text in right} for said, right in pairs) / len(predictions)
