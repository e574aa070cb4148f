"""Measure how diverse predictions are. An adapter that generates one caption for every image can still have high scores."""

from collections import Counter
from dataclasses import dataclass

from lora_blip.metrics.exact import normal
from lora_blip.metrics.tokens import plain

COLLAPSED = 0.5  # warn if one text is a larger share of the predictions
MORE_OFTEN = 1.5  # do not warn if a reference occurs so often that the prediction does not exceed it by this factor
FEWEST = 8  # do not warn if there are fewer predictions: half of them may be equal by chance


@dataclass(frozen=True)
class Diversity:
    """The diversity of a list of predictions."""

    type_token_ratio: float  # different words / all words
    distinct: int  # different captions
    share: float  # distinct / predictions
    most_common: str  # the most frequent caption
    times: int  # number of predictions that equal it
    warning: str  # a sentence about mode collapse, or ""


def diversity(predictions: list[str], references: list[list[str]] | None = None) -> Diversity:
    """Return the diversity. Compare captions as in exact match. Split them into words with `tokens.plain`.

    Warn of mode collapse if there are at least FEWEST predictions, more than the share COLLAPSED of them are equal, and no
    reference is nearly as frequent: yes is the right answer of many questions.

    Raise ValueError if there is no prediction, or if the lengths differ.
    """
    if not predictions:
        raise ValueError("diversity needs at least one prediction")
    if references is not None and len(references) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} lists of references")
    words = [word for text in predictions for word in plain(text).split()]
    captions = Counter(normal(text) for text in predictions)
    form, times = captions.most_common(1)[0]
    most_common = next(text for text in predictions if normal(text) == form)
    ratio = len(set(words)) / len(words) if words else 0.0
    warning = collapse(most_common, times, len(predictions), references)
    return Diversity(ratio, len(captions), len(captions) / len(predictions), most_common, times, warning)


def collapse(caption: str, times: int, predictions: int, references: list[list[str]] | None) -> str:
    """Return a warning of mode collapse, or ""."""
    if predictions < FEWEST or times <= COLLAPSED * predictions:
        return ""
    fact = f"{times} of {predictions} predictions ({times / predictions:.0%}) are {caption!r}"
    if references is None:
        return f"{fact}: the model may have collapsed onto one text"
    counts = Counter(form for captions in references for form in {normal(text) for text in captions})
    most = max(counts.values(), default=0)
    if times <= MORE_OFTEN * most or most > COLLAPSED * predictions:
        return ""
    return f"{fact}, but no reference text occurs for more than {most} of them: the model may have collapsed onto one text"
