"""How varied predictions are: an adapter that says one caption of every picture can still score well."""

from collections import Counter
from dataclasses import dataclass

from lora_blip.metrics.exact import normal
from lora_blip.metrics.tokens import plain

COLLAPSED = 0.5  # share of one caption among the predictions, from which on it is said aloud
FEWEST = 8  # predictions below which one caption may well be most of them


@dataclass(frozen=True)
class Diversity:
    """type_token_ratio: different words / all words. distinct: different captions. share: distinct / predictions.

    most_common: the caption said most often, `times` times. warning: a sentence, or "" when all is well.
    """

    type_token_ratio: float
    distinct: int
    share: float
    most_common: str
    times: int
    warning: str


def diversity(predictions: list[str], references: list[list[str]] | None = None) -> Diversity:
    """Captions are compared as exact match does (case and closing full stop do not count), words as `tokens.plain` finds them.

    The warning is about mode collapse: at least FEWEST predictions, more than COLLAPSED of them one caption, and references
    that hold no caption nearly as often (or no references). ValueError for no predictions, or when the lengths differ.
    """
    if not predictions:
        raise ValueError("diversity of no predictions")
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
    """The sentence that names a mode collapse, or ""."""
    if predictions < FEWEST or times <= COLLAPSED * predictions:
        return ""
    meant = f"{times} of {predictions} predictions ({times / predictions:.0%}) are {said!r}"
    if references is None:
        return f"{meant}: the model may have collapsed onto one caption"
    held = Counter(form for right in references for form in {normal(text) for text in right})
    images = max(held.values(), default=0)
    if images > COLLAPSED * predictions:
        return ""  # the references are that uniform themselves
    return f"{meant}, while no reference stands at more than {images} images: the model has collapsed onto one caption"
