"""Return the names and the values of scores as all messages and pages show them."""

from collections.abc import Mapping
from typing import Any

SPECIAL = {
    "cider": "CIDEr", "cider_d": "CIDEr-D", "meteor": "METEOR", "spice": "SPICE", "rouge_l": "ROUGE-L",
    "vqa_accuracy": "VQA accuracy", "recall_at_1": "R@1", **{f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)},
}  # fmt: skip
DIRECTIONS = {"image_to_text": "image→text", "text_to_image": "text→image"}


def score_name(key: str) -> str:
    """Return the name of a score: "cider" is "CIDEr", "image_to_text_r5" is "R@5 image→text"."""
    direction, _, k = key.rpartition("_r")
    if direction in DIRECTIONS and k.isdigit():
        return f"R@{k} {DIRECTIONS[direction]}"
    return SPECIAL.get(key, key.replace("_", " "))


def score_value(key: str, value: float) -> str:
    """Return the value as text: a loss, a CIDEr or a value outside 0..1 with four decimals, another score in per cent."""
    return f"{value:.4f}" if key == "loss" or key.startswith("cider") or not 0 <= value <= 1 else f"{value:.1%}"


def named_score(key: str, value: float) -> str:
    """Return a score with its name, such as "CIDEr 0.0800" or "exact match 97.5%"."""
    return f"{score_name(key)} {score_value(key, value)}"


def validation_score(training: Mapping[str, Any]) -> str:
    """Return the validation score that selected an adapter, with its name; "" if it was not validated.

    training: the entry "training" of the adapter's metadata. It is not trusted: an adapter file may contain anything.
    """
    settings = training.get("settings")
    by = settings.get("best_by") if isinstance(settings, Mapping) else None
    keys = [by] if f"val_{by}" in training else [key[4:] for key in training if key.startswith("val_") and key != "val_loss"]
    for key in keys:
        value = training[f"val_{key}"]
        if is_score(value):
            return named_score(str(key), value)
    return ""


def validation_scores(training: Mapping[str, Any]) -> list[str]:
    """Return all validation scores in the metadata of an adapter, with their names. The metadata may be untrusted."""
    values = {key[4:]: value for key, value in training.items() if key.startswith("val_")}
    return [named_score(key, value) for key, value in values.items() if is_score(value)]


def is_score(value: object) -> bool:
    """Return True for a finite number that can be written with decimals: an integer may have any number of digits."""
    return type(value) in (int, float) and abs(value) < 1e30  # type: ignore[arg-type]
