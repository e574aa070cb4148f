"""The diversity of predictions: an adapter that generates one caption for every image can still have high scores."""

from collections import Counter
from dataclasses import dataclass

from lora_blip.metrics.exact import normal
from lora_blip.metrics.tokens import plain

COLLAPSED = 0.5  # share of one caption above which a warning is given
FEWEST = 8  # with fewer predictions, one caption may be most of them by chance


@dataclass(frozen=True)
class Diversity:
    """How varied a list of predictions is."""

    type_token_ratio: float  # different words / all words
    distinct: int  # different captions
    share: float  # distinct / predictions
    most_common: str  # the most frequent caption
    times: int  # how often it is predicted
    warning: str  # a sentence about mode collapse, or ""


def diversity(predictions: list[str], references: list[list[str]] | None = None) -> Diversity:
    """Return the diversity. Captions are compared as in exact match; words are those of `tokens.plain`.

    Warn of mode collapse if one caption is more than COLLAPSED of at least FEWEST predictions, and no reference is that
    frequent (or there are no references). Raise ValueError for no predictions, or if the lengths differ.
    """
    if not predictions:
        raise ValueError("diversity needs at least one prediction")
    if references is not None and len(references) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} lists of references")
    words = [word for said in predictions for word in plain(said).split()]
    captions = Counter(normal(said) for said in predictions)
    form, times = captions.most_common(1)[0]
    most_common = next(said for said in predictions if normal(said) == form)
    ratio = len(set(words)) / len(words) if words else 0.0
    warning = collapse(most_common, times, len(predictions), references)
    return Diversity(ratio, len(captions), len(captions) / len(predictions), most_common, times, warning)


def collapse(said: str, times: int, predictions: int, references: list[list[str]] | None) -> str:
    """Return a warning of mode collapse, or ""."""
    if predictions < FEWEST or times <= COLLAPSED * predictions:
        return ""
    finding = f"{times} of {predictions} predictions ({times / predictions:.0%}) are {said!r}"
    if references is None:
        return f"{finding}: the model may have collapsed onto one caption"
    counts = Counter(form for right in references for form in {normal(text) for text in right})
    images = max(counts.values(), default=0)
    if images > COLLAPSED * predictions:
        return ""  # the references are as uniform
    return f"{finding}, but no reference belongs to more than {images} images: the model has collapsed onto one caption"
