"""Exact match: the share of predictions that are right to the letter."""

import re
import unicodedata

MARK = re.compile(r"\s*([^\w\s])\s*")  # a punctuation mark and the spaces around it


def normal(text: str) -> str:
    """What BLIP's tokenizer cannot write back does not count: case, accents, spaces (at marks too), a closing full stop."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return MARK.sub(r"\1", " ".join(plain.split())).rstrip(".")


def exact_match(predictions: list[str], references: list[list[str]]) -> float:
    """Share (0 to 1) of predictions that equal one of their references. ValueError when the lengths differ or are 0."""
    if not predictions:
        raise ValueError("exact match of no predictions")
    pairs = zip(predictions, references, strict=True)
    return sum(normal(said) in {normal(text) for text in right} for said, right in pairs) / len(predictions)
