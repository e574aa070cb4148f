"""Exact match: the share of predictions that are right to the letter."""


def normal(text: str) -> str:
    """Case, outer and doubled spaces and a closing full stop do not count: BLIP's tokenizer drops case itself."""
    return " ".join(text.casefold().split()).rstrip(" .")


def exact_match(predictions: list[str], references: list[list[str]]) -> float:
    """Share (0 to 1) of predictions that equal one of their references. ValueError when the lengths differ or are 0."""
    if not predictions:
        raise ValueError("exact match of no predictions")
    pairs = zip(predictions, references, strict=True)
    return sum(normal(said) in {normal(text) for text in right} for said, right in pairs) / len(predictions)
