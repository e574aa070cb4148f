"""Caption scores of the COCO evaluation (Chen et al. 2015), through `pycocoevalcap`.

`pip install "lora_blip[metrics]"` installs the scorers. METEOR and SPICE also need Java. Nothing is downloaded.
"""

from collections.abc import Collection
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
MEANS = ("exact match", "ROUGE-L", "CIDEr", "SPICE")  # the means of their scores by image
MISSING = 'pycocoevalcap is not installed: pip install "lora_blip[metrics]"'
PTB, PLAIN = "PTBTokenizer (Stanford CoreNLP 3.4.1)", "lora_blip's own, without Java"
NOTHING_RARE = (
    "0 by definition: the references of every image contain every n-gram, so that all weights are 0 "
    "(log(images / images with the n-gram)); CIDEr needs several images with different references"
)


@dataclass(frozen=True)
class Scores:
    """The scores of a list of predictions: numbers from 0 to 1, and for CIDEr from 0 to 10.

    values: each name of NAMES → the score of the whole set, or None if it could not be computed.
    per_image: name → the score of each image, in the order of the predictions. CIDEr, ROUGE-L, SPICE and exact match are the
    means of these; BLEU and METEOR are not.
    reasons: name → why there is no value, or why the value has no meaning.
    tokenizer: the tokenizer of the scores, "" if none was used.
    bleu_counts: (images, 10); BLEU is a function of their sum, see `bleu`.
    """

    values: dict[str, float | None]
    per_image: dict[str, list[float]]
    reasons: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    bleu_counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 10)), repr=False, compare=False)


def caption_scores(predictions: list[str], references: list[list[str]], names: Collection[str] = NAMES) -> Scores:
    """Return exact match, BLEU-1 to 4 (Papineni et al. 2002), METEOR, ROUGE-L, CIDEr (Vedantam et al. 2015) and SPICE.

    references: for each prediction, all captions of its image.
    names: METEOR and SPICE are slow, and are computed only if they are in `names`.

    With Java, PTBTokenizer finds the words, and every score equals pycocoevalcap's. Without Java, `tokens.plain` does; then
    METEOR and SPICE are None, and the others are equal on captions with everyday quotes, contractions, numbers and hyphens.
    If a tenth of the texts contain an exception of `tokens.plain`, they differ by at most 0.01 (CIDEr by 0.1).

    CIDEr weights an n-gram by the logarithm of images / images with it. So it depends on all images that are scored together,
    and is 0 for a single image or for equal references.

    Raise ValueError for lists of different lengths, no predictions, or an image without references.
    """
    check(predictions, references)
    matches = [exact_match([said], [right]) for said, right in zip(predictions, references, strict=True)]
    values: dict[str, float | None] = dict.fromkeys(NAMES)
    values["exact match"] = sum(matches) / len(matches)
    per_image = {"exact match": matches}
    package = package_folder()
    if package is None:
        return Scores(values, per_image, dict.fromkeys(COCO, MISSING))

    said, right, tokenizer, no_java = tokenised(predictions, references, package)
    reasons = dict.fromkeys(("METEOR", "SPICE"), no_java) if no_java else {}
    counts = bleu_counts(said, right)
    for place, name in enumerate(BLEU):
        values[name] = float(bleu(counts.sum(0), place + 1))
        per_image[name] = bleu(counts, place + 1).tolist()
    values["ROUGE-L"], per_image["ROUGE-L"] = rouge_l(said, right)
    values["CIDEr"], per_image["CIDEr"], nothing_rare = cider(said, right)
    if nothing_rare:
        reasons["CIDEr"] = NOTHING_RARE
    for name, score in (("METEOR", java.meteor), ("SPICE", java.spice)):
        if name in names and name not in reasons:
            try:
                whole, by_image = score(said, right, package)
            except JavaError as error:
                reasons[name] = str(error)
                continue
            if np.isfinite([whole, *by_image]).all():
                values[name], per_image[name] = whole, by_image
            else:
                reasons[name] = f"{name} is not a number for {int((~np.isfinite(by_image)).sum())} image(s)"
    return Scores(values, {name: per_image[name] for name in NAMES if name in per_image}, reasons, tokenizer, counts)


def check(predictions: list[str], references: list[list[str]]) -> None:
    if not predictions:
        raise ValueError("no predictions to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} lists of references")
    bare = [place for place, right in enumerate(references) if isinstance(right, str)]
    if bare:
        raise ValueError(f"the references of prediction {bare[0]} are one text; expected a list of texts")
    empty = [place for place, right in enumerate(references) if not right]
    if empty:
        raise ValueError(f"prediction {empty[0]} has no references ({len(empty)} in all)")


def package_folder() -> Path | None:
    """Return the folder of pycocoevalcap, or None if it is not installed."""
    try:
        scorer = import_module("pycocoevalcap.bleu.bleu_scorer")
    except ImportError:
        return None
    return Path(str(scorer.__file__)).parent.parent


def tokenised(
    predictions: list[str], references: list[list[str]], package: Path
) -> tuple[list[str], list[list[str]], str, str]:
    """Return tokenized predictions and references, the tokenizer, and why it is not Java's ("" if it is)."""
    texts = [*predictions, *(text for right in references for text in right)]
    try:
        words, name, why = java.tokenise(texts, package), PTB, ""
    except JavaError as error:
        words, name, why = [plain(text) for text in texts], PLAIN, str(error)
    following = iter(words[len(predictions) :])
    return words[: len(predictions)], [[next(following) for _ in right] for right in references], name, why


def bleu_counts(said: list[str], right: list[list[str]]) -> NDArray[np.float64]:
    """Return (images, 10): matching and predicted n-grams (n = 1..4), predicted words, words of the nearest reference."""
    scorer = import_module("pycocoevalcap.bleu.bleu_scorer").BleuScorer(n=4)
    for prediction, references in zip(said, right, strict=True):
        scorer += (prediction, references)
    rows = []
    for image in scorer.ctest:
        nearest = min((abs(length - image["testlen"]), length) for length in image["reflen"])[1]
        rows.append([*image["correct"], *image["guess"], image["testlen"], nearest])
    return np.asarray(rows, dtype=np.float64)


def bleu(counts: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Return BLEU of n = 1..order from summed counts (…, 10): brevity · (Π matches / predicted)^(1/order).

    See Papineni et al. 2002, section 2.3. The tiny constants are pycocoevalcap's: they make 0 / 0 = 0.
    """
    matches, said, length, nearest = counts[..., :order], counts[..., 4 : 4 + order], counts[..., 8], counts[..., 9]
    precision = np.prod((matches + 1e-15) / (said + 1e-9), axis=-1) ** (1 / order)
    ratio = (length + 1e-15) / (nearest + 1e-9)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def rouge_l(said: list[str], right: list[list[str]]) -> tuple[float, list[float]]:
    """Return the mean and the scores by image (Lin 2004).

    Each is F, β = 1.2, of the longest common subsequence, from the best precision and best recall over the references.
    """
    scorer = import_module("pycocoevalcap.rouge.rouge").Rouge()
    scores = [float(scorer.calc_score([prediction], references)) for prediction, references in zip(said, right, strict=True)]
    return sum(scores) / len(scores), scores


def cider(said: list[str], right: list[list[str]]) -> tuple[float, list[float], bool]:
    """Return CIDEr-D as pycocoevalcap computes it: mean, by image, and True if all weights are 0."""
    scorer = import_module("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for prediction, references in zip(said, right, strict=True):
        scorer += (prediction, references)
    if not any(any(grams) for grams in scorer.crefs):  # references of only punctuation, on which the scorer fails
        return 0.0, [0.0] * len(said), True
    mean, scores = scorer.compute_score()
    known = [images for images in scorer.document_frequency.values() if images]  # a look-up adds an n-gram with 0
    return float(mean), [float(score) for score in scores], min(known) == len(said)


def intervals(scores: Scores, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % bootstrap intervals over images, for every score that has a value except METEOR.

    BLEU is computed from the summed counts of each resample. The others are means of their scores by image, and CIDEr keeps
    the weights of the whole set. METEOR of a set is not a mean, and Java does not return its counts.
    """
    found = {name: bootstrap.of_mean(scores.per_image[name], seed=seed) for name in MEANS if name in scores.per_image}
    if len(scores.bleu_counts):
        for place, name in enumerate(BLEU):
            found[name] = bootstrap.of_sums(scores.bleu_counts, partial(bleu, order=place + 1), seed=seed)
    return {name: found[name] for name in NAMES if name in found}


def gains(adapted: Scores, base: Scores, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % bootstrap intervals of adapted − base, paired: over the same resampled images. Names as in `intervals`.

    Raise ValueError if the two have different numbers of images.
    """
    found = {}
    for name in MEANS:
        if name in adapted.per_image and name in base.per_image:
            found[name] = bootstrap.of_difference(adapted.per_image[name], base.per_image[name], seed=seed)
    if len(adapted.bleu_counts) and len(base.bleu_counts):
        both = np.concatenate([adapted.bleu_counts, base.bleu_counts], axis=1)
        for place, name in enumerate(BLEU):
            found[name] = bootstrap.of_sums(both, partial(bleu_gain, order=place + 1), seed=seed)
    return {name: found[name] for name in NAMES if name in found}


def bleu_gain(counts: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """BLEU of the first ten summed counts − BLEU of the second ten."""
    return bleu(counts[..., :10], order) - bleu(counts[..., 10:], order)
