"""Numbers of things in messages: "1 step", "1,200 images", "1 line has", "3 batches have"."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from lora_blip.runtime.settings import LARGEST

PLURALS = {"entry": "entries", "batch": "batches", "process": "processes"}  # of the nouns that do not only get an s
SINGULARS = {"are": "is", "have": "has", "were": "was", "begin": "begins", "get": "gets", "stay": "stays"}


def plural(noun: str, number: int = 2) -> str:
    """Return the noun in the singular for 1 and in the plural for other numbers. Only the last of several words changes."""
    *words, last = noun.split(" ")
    return noun if number == 1 else " ".join([*words, PLURALS.get(last, f"{last}s")])


def counted(number: int, noun: str, verb: str = "") -> str:
    """Return the number with its noun: "1 step", "1,200 images", or "1 image has" with the verb "have"."""
    text = f"{number:,} {plural(noun, number)}"
    return f"{text} {SINGULARS[verb] if number == 1 else verb}" if verb else text


def first_names(names: Sequence[str], most: int) -> str:
    """Return the first names, and the number of the others: "a, b, c and 1,200 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def exact(value: float) -> str:
    """Return a number that a setting reads as the same float, without an exponent: "8", "22.627416997969522", "0.00001"."""
    text = f"{Decimal(repr(float(value))):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def rounded(value: float) -> float:
    """Return the number rounded to 8 significant digits, the precision of float32."""
    return float(f"{value:.8g}")


def steps_of(training: Mapping[str, Any]) -> str:
    """Return the number of steps in the metadata of an adapter: "1 step", "1,200 steps", or "? steps" if it is not there."""
    steps = training.get("steps")
    return counted(steps, "step") if type(steps) is int else "? steps"


def lr_ratio_of(training: Mapping[str, Any]) -> str:
    """Return "LR_RATIO = 16" from the metadata of an adapter that was trained with LoRA+, else ""."""
    settings = training.get("settings")
    ratio = settings.get("lr_ratio") if isinstance(settings, Mapping) else None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= LARGEST["lr_ratio"] or ratio == 1:
        return ""
    return f"LR_RATIO = {ratio:g}"
