"""Search the training data of an adapter for evaluation images."""

from pathlib import Path
from typing import NamedTuple

from lora_blip.config import EvaluateConfig
from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.formats import Keys, keys_of
from lora_blip.data.leaks import Leak, find_leaks
from lora_blip.errors import DataError
from lora_blip.lora.adapter_file import Adapter
from lora_blip.runtime.counts import counted


class LeakSearch(NamedTuple):
    """The result of a search for leaks."""

    leaks: list[Leak]
    note: str  # what was searched, or why no search was possible


def search_leaks(config: EvaluateConfig, adapter: Adapter | None, examples: list[Example]) -> LeakSearch:
    """Return the evaluation images that are also in the training data.

    The setting `train_annotations` names the training data. If it is empty, the adapter file names them. Raise DataError if
    the file of the setting cannot be read. If the file of the adapter cannot be read, the note contains the reason.
    """
    settings = adapter.metadata.get("training", {}).get("settings", {}) if adapter else {}
    source = config.train_annotations or str(settings.get("annotations", ""))
    root = config.train_image_root or str(settings.get("image_root", "")) * (not config.train_annotations)
    keys = Keys(*(str(settings.get(f"{name}_key", "")) for name in ("image", "text", "question", "answer")))
    keys = keys_of(config) if config.train_annotations else keys
    if config.train_annotations == "none":
        return LeakSearch([], "not searched: --train-annotations is none")
    if not source:
        return LeakSearch([], "not searched: the training data are unknown; give them with --train-annotations")
    if not (Path(source).exists() or "," in source):  # a comma separates the names of several files
        if config.train_annotations:
            raise DataError(
                f"train_annotations = {source!r}: the file does not exist; give a file that exists, or --train-annotations none"
            )
        return LeakSearch([], f"not searched: {source} does not exist; give the file with --train-annotations")
    try:
        splits: dict[str, list[Example]] = {}
        training, _ = annotations.read(
            source, root, on_bad_data="skip", decode=False, report=lambda _: None, keys=keys, setting="train_annotations",
            splits=splits,
        )  # fmt: skip
        training = splits.get("train") or training  # as a training reads them now
    except DataError as error:
        if config.train_annotations:
            raise
        return LeakSearch([], f"not searched: {str(error).splitlines()[0]}")
    images = [image for image in dict.fromkeys(e.image for e in training) if image.is_file()]
    if not images:
        return LeakSearch([], f"not searched: no image of {source} exists; give their folder with --train-image-root")
    leaks = find_leaks(dict.fromkeys(e.image for e in examples), images)
    return LeakSearch(leaks, f"{len(leaks)} found among the {counted(len(images), 'image')} of {source}")
