"""Search the training data of an adapter for evaluation images."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lora_blip.config import EvaluateConfig
from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.formats import Keys, keys_of
from lora_blip.data.leaks import Leak, find_leaks
from lora_blip.data.several_files import of_several_files, with_usual_names
from lora_blip.data.source_digest import source_digest
from lora_blip.data.splits import RULES, lines_for_training
from lora_blip.errors import AdapterError, DataError
from lora_blip.lora import adapter_file
from lora_blip.lora.adapter_file import Adapter
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted

MOST_ADAPTERS = 16  # initial adapters of initial adapters that are searched
EARLIER_DATA = "not searched: the earlier training data of this run, which was resumed with other data (ALLOW_CHANGED)"
OTHER_FILE = "has changed since the training, or is another file; give the training data with --train-annotations"


class LeakSearch(NamedTuple):
    """The result of a search for leaks."""

    leaks: list[Leak]
    note: str  # what was searched, or why no search was possible


def search_leaks(config: EvaluateConfig, adapter: Adapter | None, examples: list[Example]) -> LeakSearch:
    """Return the evaluation images that are also in the training data.

    The setting `train_annotations` names the training data. If it is empty, the adapter file names them, and those of the
    adapter that its training continued (INIT_ADAPTER) are searched too. Raise DataError if the file of the setting cannot be
    read. If the file of an adapter cannot be read, the note contains the reason.
    """
    if config.train_annotations == "none":
        return LeakSearch([], "not searched: --train-annotations is none")
    if config.train_annotations:
        return _search(config.train_annotations, config.train_image_root, keys_of(config), config, examples)
    searches = _search_data_of(adapter, config, examples)
    for earlier in initial_adapters(adapter):
        if isinstance(earlier, str):
            searches.append(LeakSearch([], earlier))
            continue
        for found in _search_data_of(earlier, replace(config, train_image_root=""), examples):
            searches.append(LeakSearch(found.leaks, f"of the initial adapter {earlier.path.parent.name}: {found.note}"))
    first = {leak.evaluation: leak for search in reversed(searches) for leak in search.leaks}
    leaks = [first[image] for image in dict.fromkeys(example.image for example in examples) if image in first]
    return LeakSearch(leaks, "; ".join(dict.fromkeys(search.note for search in searches)))


def initial_adapters(adapter: Adapter | None) -> Iterator[Adapter | str]:
    """Yield the adapter from which the training of an adapter started (INIT_ADAPTER), then that one's, and so on.

    If the file of one is missing or has changed, yield the reason, and end.
    """
    for _ in range(MOST_ADAPTERS):
        source = adapter.metadata.get("training", {}).get("init_adapter") if adapter else None
        if not isinstance(source, dict) or not isinstance(source.get("path"), str):
            return
        path = source["path"]
        try:
            adapter = adapter_file.read(path)
        except AdapterError:
            yield f"not searched: the training data of the initial adapter {quoted(path)}, which cannot be read"
            return
        if not adapter_file.digest(adapter.tensors).startswith(str(source.get("sha256"))):
            yield f"not searched: the training data of the initial adapter {quoted(path)}, which has changed"
            return
        yield adapter


def _search_data_of(adapter: Adapter | None, config: EvaluateConfig, examples: list[Example]) -> list[LeakSearch]:
    """Search the training data that an adapter file names. A second result is only a note, if the run had earlier data too."""
    training = adapter.metadata.get("training", {}) if adapter else {}
    settings = _settings_of(adapter)
    root = config.train_image_root or str(settings.get("image_root", ""))
    rules = training.get("data_rules", 1)
    source, digest = str(settings.get("annotations", "")), training.get("data_digest")
    if digest and source_digest(source) not in ("", digest):
        found = LeakSearch([], f"not searched: {source} {OTHER_FILE}")
    else:
        found = _search(source, root, _keys_of(settings), config, examples, rules)
    return [found, *([LeakSearch([], EARLIER_DATA)] if training.get("data_changed") else [])]


def _settings_of(adapter: Adapter | None) -> dict[str, Any]:
    """Return the settings of the training that an adapter file contains, or {}."""
    settings = adapter.metadata.get("training", {}).get("settings", {}) if adapter else {}
    return settings if isinstance(settings, dict) else {}


def _keys_of(settings: dict[str, Any]) -> Keys:
    """Return the names of the columns in the settings of a training."""
    return Keys(*(str(settings.get(f"{name}_key", "")) for name in ("image", "text", "question", "answer")))


def _search(
    source: str, root: str, keys: Keys, config: EvaluateConfig, examples: list[Example], rules: int = RULES
) -> LeakSearch:
    """Search one source of training data. rules: see `lines_for_training`."""
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
        given = bool(config.train_annotations)  # the settings of columns are then those of REFERENCES too
        with of_several_files(keys, given):
            training, _ = annotations.read(
                source, root, on_bad_data="skip", decode=False, report=lambda _: None, setting="train_annotations",
                keys=with_usual_names(keys) if given else keys, splits=splits,
            )  # fmt: skip
        training = lines_for_training(training, splits, rules)
    except DataError as error:
        if config.train_annotations:
            raise
        return LeakSearch([], f"not searched: {str(error).splitlines()[0]}")
    images = [image for image in dict.fromkeys(e.image for e in training) if image.is_file()]
    if not images:
        return LeakSearch([], f"not searched: no image of {source} exists; give their folder with --train-image-root")
    leaks = find_leaks(dict.fromkeys(e.image for e in examples), images)
    return LeakSearch(leaks, f"{len(leaks)} found among the {counted(len(images), 'image')} of {source}")
