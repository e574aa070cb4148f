"""Compute the caption scores of the COCO evaluation (Chen et al. 2015) with `pycocoevalcap`.

`pip install "lora_blip[metrics]"` installs the scorers. METEOR and SPICE also need Java. Nothing is downloaded.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lora_blip.errors import JavaError
from lora_blip.metrics import bootstrap, java
from lora_blip.metrics.bootstrap import Interval
from lora_blip.metrics.exact import exact_match
from lora_blip.metrics.tokens import plain

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
COCO = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE")
NAMES = ("exact match", *COCO)
MEANS = ("exact match", "ROUGE-L", "CIDEr", "SPICE")  # each is the mean of its scores by image
MISSING = 'pycocoevalcap is not installed: pip install "lora_blip[metrics]"'
PTB, PLAIN = "PTBTokenizer (Stanford CoreNLP 3.4.1)", "lora_blip's own, without Java"  # names of the tokenizers
ALL_WEIGHTS_ZERO = (
    "0 by definition: every n-gram is in the references of every image, so all weights are 0 "
    "(log(images / images with the n-gram)); CIDEr needs several images with different references"
)

WITHOUT_NGRAMS = "no meaning: no {texts} has {n} words, so no {n}-gram can match; compare BLEU-1 or ROUGE-L instead"
FEW_NGRAMS = (
    "{short:,} of {total:,} generated texts have fewer than {n} words, and so no {n}-gram; compare BLEU-1 or ROUGE-L too"
)


@dataclass(frozen=True)
class Scores:
    """The scores of a list of predictions: numbers from 0 to 1, and for CIDEr from 0 to 10.

    values: each name of NAMES → the score of the whole set, or None if it could not be computed.
    per_image: name → the score of each image, in the order of the predictions. CIDEr, ROUGE-L, SPICE and exact match are the
    means of these; BLEU and METEOR are not.
    reasons: name → the reason why there is no value, or why the value has no meaning or rests on few texts.
    meaningless: the names whose value is only a constant of the definition, because no text can get another one.
    tokenizer: the name of the tokenizer; "" if no score needed one, because pycocoevalcap is not installed.
    bleu_counts: (images, 10); `bleu` computes BLEU from their sum.
    """

    values: dict[str, float | None]
    per_image: dict[str, list[float]]
    reasons: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    bleu_counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 10)), repr=False, compare=False)
    meaningless: frozenset[str] = frozenset()


def caption_scores(
    predictions: list[str],
    references: list[list[str]],
    names: Collection[str] = NAMES,
    working: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> Scores:
    """Return exact match, BLEU-1 to 4 (Papineni et al. 2002), METEOR, ROUGE-L, CIDEr (Vedantam et al. 2015) and SPICE.

    references: for each prediction, all captions of its image.
    names: METEOR and SPICE are slow, so they are computed only if they are in `names`. The other scores are always computed.
    working: called with the name of each score before it is computed. The score is computed inside the context that it returns.

    With Java, PTBTokenizer splits the texts into words, and every score equals pycocoevalcap's. Without Java, `tokens.plain`
    splits them, and METEOR and SPICE are None. The other scores are equal for captions with everyday quotes, contractions,
    numbers and hyphens. If `tokens.plain` splits a tenth of the texts otherwise than PTBTokenizer, the scores differ by at
    most 0.01 (CIDEr by 0.1).

    CIDEr weights an n-gram by log(images / images whose references contain it). So the CIDEr of an image depends on the other
    images, and is 0 for a single image or if all images have the same references.

    Raise ValueError for lists of different lengths, no predictions, or an image without references.
    """
    check(predictions, references)
    matches = [exact_match([text], [texts]) for text, texts in zip(predictions, references, strict=True)]
    values: dict[str, float | None] = dict.fromkeys(NAMES)
    values["exact match"] = sum(matches) / len(matches)
    per_image = {"exact match": matches}
    package = package_folder()
    if package is None:
        return Scores(values, per_image, dict.fromkeys(COCO, MISSING))

    with working("the words, by Java's PTBTokenizer"):
        predicted, captions, tokenizer, no_java = tokenized(predictions, references, package)
    reasons = dict.fromkeys(("METEOR", "SPICE"), no_java) if no_java else {}
    with working("BLEU"):
        counts = bleu_counts(predicted, captions)
    for order, name in enumerate(BLEU, 1):
        values[name] = float(bleu(counts.sum(0), order))
        per_image[name] = bleu(counts, order).tolist()
    notes, meaningless = bleu_notes(predicted, captions)
    reasons |= notes
    with working("ROUGE-L"):
        values["ROUGE-L"], per_image["ROUGE-L"] = rouge_l(predicted, captions)
    with working("CIDEr"):
        values["CIDEr"], per_image["CIDEr"], all_zero = cider(predicted, captions)
    if all_zero:
        reasons["CIDEr"] = ALL_WEIGHTS_ZERO
        meaningless |= {"CIDEr"}
    for name, score in (("METEOR", java.meteor), ("SPICE", java.spice)):
        if name in names and name not in reasons:
            with working(f"{name}, by Java"):
                values[name], of_images, reason = scored_by_java(name, score, predicted, captions, package)
            per_image |= {name: of_images} if of_images else {}
            reasons |= {name: reason} if reason else {}
    ordered = {name: per_image[name] for name in NAMES if name in per_image}
    return Scores(values, ordered, reasons, tokenizer, counts, frozenset(meaningless))


def check(predictions: list[str], references: list[list[str]]) -> None:
    """Raise ValueError as `caption_scores` does."""
    if not predictions:
        raise ValueError("no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} lists of references")
    not_lists = [index for index, texts in enumerate(references) if isinstance(texts, str)]
    if not_lists:
        raise ValueError(f"the references of prediction {not_lists[0]} are one text; expected a list of texts")
    empty = [index for index, texts in enumerate(references) if not texts]
    if empty:
        raise ValueError(f"prediction {empty[0]} has no references ({len(empty)} in all)")


def package_folder() -> Path | None:
    """Return the folder of pycocoevalcap, or None if it is not installed."""
    try:
        scorer = import_module("pycocoevalcap.bleu.bleu_scorer")
    except ImportError:
        return None
    return Path(str(scorer.__file__)).parent.parent


def tokenized(
    predictions: list[str], references: list[list[str]], package: Path
) -> tuple[list[str], list[list[str]], str, str]:
    """Return the tokenized predictions and references, the name of the tokenizer, and the error of Java's tokenizer or ""."""
    texts = [*predictions, *(text for captions in references for text in captions)]
    try:
        words, name, reason = java.tokenize(texts, package), PTB, ""
    except JavaError as error:
        words, name, reason = [plain(text) for text in texts], PLAIN, str(error)
    remaining = iter(words[len(predictions) :])
    return words[: len(predictions)], [[next(remaining) for _ in captions] for captions in references], name, reason


def bleu_counts(predictions: list[str], references: list[list[str]]) -> NDArray[np.float64]:
    """Return counts for BLEU, (images, 10).

    Columns: matching n-grams (n = 1..4), predicted n-grams (n = 1..4), words of the prediction, and words of the reference
    with the nearest length.
    """
    scorer = import_module("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    for prediction, texts in zip(predictions, references, strict=True):
        scorer += (prediction, texts)
    rows = []
    for image in scorer.ctest:
        nearest = min((abs(length - image["testlen"]), length) for length in image["reflen"])[1]
        rows.append([*image["correct"], *image["guess"], image["testlen"], nearest])
    return np.asarray(rows, dtype=np.float64)


def bleu(counts: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Return BLEU from summed counts (…, 10): brevity penalty · (Π over n = 1..order of matches / predicted)^(1/order).

    See Papineni et al. 2002, section 2.3. The tiny constants are pycocoevalcap's. They make 0 / 0 equal 0.
    """
    matches, predicted, length, nearest = counts[..., :order], counts[..., 4 : 4 + order], counts[..., 8], counts[..., 9]
    precision = np.prod((matches + 1e-15) / (predicted + 1e-9), axis=-1) ** (1 / order)
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def scored_by_java(
    name: str, score: Callable[[list[str], list[list[str]], Path], tuple[float, list[float]]], predicted: list[str],
    captions: list[list[str]], package: Path,
) -> tuple[float | None, list[float], str]:  # fmt: skip
    """Return the score of the set, the scores by image, and "". If there is no score, return None, [] and the reason."""
    try:
        of_set, by_image = score(predicted, captions, package)
    except JavaError as error:
        return None, [], str(error)
    if np.isfinite([of_set, *by_image]).all():
        return of_set, by_image, ""
    images = int((~np.isfinite(by_image)).sum())
    return None, [], f"{name} is not a number for {images} image{'s' * (images != 1)}"


def bleu_notes(predictions: list[str], references: list[list[str]]) -> tuple[dict[str, str], set[str]]:
    """Return a note for each BLEU-n that n-grams decide only in few texts or in none, and the names of those without meaning.

    predictions, references: tokenized texts. A text with fewer than n words has no n-gram. If no prediction has one, BLEU-n is
    made of the constants in `bleu`: for n = 4 and texts of three words that equal their references, 3.2 %. If no reference has
    one, no prediction can match. A note about some predictions is returned if they are at least half of all.
    """
    notes, meaningless = dict[str, str](), set[str]()
    lengths = [len(text.split()) for text in predictions]
    longest_reference = max(len(text.split()) for texts in references for text in texts)
    for n, name in enumerate(BLEU, 1):
        short = sum(length < n for length in lengths)
        if short == len(lengths) or longest_reference < n:
            texts = "generated text" if short == len(lengths) else "reference"
            notes[name] = WITHOUT_NGRAMS.format(texts=texts, n=n)
            meaningless.add(name)
        elif 2 * short >= len(lengths):
            notes[name] = FEW_NGRAMS.format(short=short, total=len(lengths), n=n)
    return notes, meaningless


def rouge_l(predictions: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
    """Return the mean of ROUGE-L and its scores by image (Lin 2004).

    The score of an image is the F measure (β = 1.2) of the best precision and the best recall over its references, both
    computed from the longest common subsequence.
    """
    scorer = import_module("pycocoevalcap.rouge.rouge").Rouge()
    scores = [float(scorer.calc_score([prediction], texts)) for prediction, texts in zip(predictions, references, strict=True)]
    return sum(scores) / len(scores), scores


def cider(predictions: list[str], references: list[list[str]]) -> tuple[float, list[float], bool]:
    """Return CIDEr-D as pycocoevalcap computes it: the mean, the scores by image, and True if all weights are 0."""
    scorer = import_module("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for prediction, texts in zip(predictions, references, strict=True):
        scorer += (prediction, texts)
    if not any(any(grams) for grams in scorer.crefs):  # the references have only punctuation; the scorer would fail
        return 0.0, [0.0] * len(predictions), True
    mean, scores = scorer.compute_score()
    known = [images for images in scorer.document_frequency.values() if images]  # 0: no reference has the n-gram
    return float(mean), [float(score) for score in scores], min(known) == len(predictions)


def intervals(scores: Scores, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % bootstrap intervals over images, for every score that has a value except METEOR.

    BLEU is computed from the summed counts of each resample. The other scores are means of the scores by image; for CIDEr,
    the weights of n-grams stay those of all images. METEOR has no interval: it is not a mean, and Java does not return its
    counts.
    """
    result = {name: bootstrap.of_mean(scores.per_image[name], seed=seed) for name in MEANS if name in scores.per_image}
    if len(scores.bleu_counts):
        for order, name in enumerate(BLEU, 1):
            result[name] = bootstrap.of_sums(scores.bleu_counts, partial(bleu, order=order), seed=seed)
    return {name: result[name] for name in NAMES if name in result}


def gains(adapted: Scores, base: Scores, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % bootstrap intervals of adapted − base, for the names of `intervals`. Resamples are paired.

    Raise ValueError if the two have different numbers of images.
    """
    result = {}
    for name in MEANS:
        if name in adapted.per_image and name in base.per_image:
            result[name] = bootstrap.of_difference(adapted.per_image[name], base.per_image[name], seed=seed)
    if len(adapted.bleu_counts) and len(base.bleu_counts):
        both = np.concatenate([adapted.bleu_counts, base.bleu_counts], axis=1)
        for order, name in enumerate(BLEU, 1):
            result[name] = bootstrap.of_sums(both, partial(bleu_gain, order=order), seed=seed)
    return {name: result[name] for name in NAMES if name in result}


def bleu_gain(counts: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Return the BLEU of the first ten summed counts (…, 20) minus the BLEU of the other ten."""
    return bleu(counts[..., :10], order) - bleu(counts[..., 10:], order)
