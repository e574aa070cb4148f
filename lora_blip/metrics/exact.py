"""Exact match: the fraction of predictions that equal a reference."""

import re
import unicodedata

MARK = re.compile(r"\s*([^\w\s])\s*")  # a punctuation mark and the spaces around it


def normal(text: str) -> str:
    """Return a text in lower case, without accents, without spaces next to punctuation, and without final full stops.

    The texts that BLIP generates also lack these differences, because of its tokenizer.
    """
    letters = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return MARK.sub(r"\1", " ".join(plain.split())).rstrip(".")


def exact_match(predictions: list[str], references: list[list[str]]) -> float:
    """Return the fraction of predictions that equal one of their references after `normal`, 0 to 1."""
    if not predictions:
        raise ValueError("exact match needs at least one prediction")
    pairs = zip(predictions, references, strict=True)
    return sum(normal(prediction) in {normal(text) for text in texts} for prediction, texts in pairs) / len(predictions)
