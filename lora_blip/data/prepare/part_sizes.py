"""The sizes of the parts of `prepare`'s random split."""

import math

from lora_blip.errors import DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.settings import require

SPLIT_NAMES = ("train", "val", "test")
DEFAULT_SPLITS = "0.9,0.05,0.05"


def split_fractions(splits: str) -> list[float]:
    """Return the fractions of train, val and test. Raise ConfigError if they are invalid."""
    try:
        fractions = [float(part) for part in splits.split(",")]
    except ValueError:
        fractions = []
    is_whole = min(fractions, default=-1) >= 0 and math.isclose(sum(fractions), 1, abs_tol=1e-6)
    require(
        is_whole and len(fractions) <= len(SPLIT_NAMES),
        "splits",
        splits,
        "fractions for train, val and test that add up to 1, such as 0.9,0.05,0.05",
    )
    return fractions + [0.0] * (len(SPLIT_NAMES) - len(fractions))


def part_sizes(splits: str, images: int) -> list[int]:
    """Return the numbers of images in train, val and test. Each part with a fraction above 0 has at least one.

    One or two images are too few for three parts. The default splits then give only train, or train and val, with a message.
    Raise DataError for other splits that need more images.
    """
    fractions = split_fractions(splits)
    if splits == DEFAULT_SPLITS and images < len(SPLIT_NAMES):
        fractions[images:] = [0.0] * (len(SPLIT_NAMES) - images)
        written = " and ".join(f"{name}.jsonl" for name in SPLIT_NAMES[:images])
        print(f"{counted(images, 'image', 'are')} too few for train, val and test, so the output is only {written}")
    sizes = [max(1, round(fraction * images)) if fraction else 0 for fraction in fractions]
    largest = max(range(len(sizes)), key=lambda n: sizes[n])
    sizes[largest] += images - sum(sizes)
    if sizes[largest] < 1:
        raise DataError(
            f"{counted(images, 'image', 'are')} too few for splits = {splits!r}, because each part needs one; for only "
            "train.jsonl, give --splits 1" + ", and for two parts --splits 0.8,0.2" * (images > 1)
        )
    return sizes
