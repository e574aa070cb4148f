"""Check the columns of the files in the settings of a command, before torch is imported, which takes seconds."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_blip.data.annotations import TABLES, sources_of
from lora_blip.data.formats import Keys, keys_of
from lora_blip.data.several_files import of_several_files
from lora_blip.runtime.user_paths import is_file

SMALL = 2**26  # bytes of a table whose columns are checked early; the encoding of all lines is read for it


def check_columns(config: Any, *settings: str) -> None:
    """Call `refuse_unknown_columns` for the files in these settings of a command."""
    for setting in settings:
        if source := getattr(config, setting):
            with of_several_files(
                keys_of(config), setting == "val_annotations" or (setting == "references" and two_files(config))
            ):
                refuse_unknown_columns(source, keys_of(config), setting)


def two_files(config: Any) -> bool:
    """Return True if the settings of columns are those of REFERENCES and of another file: QUESTION or TRAIN_ANNOTATIONS."""
    question = getattr(config, "question", "")
    return bool(question and is_file(question, "question")) or getattr(config, "train_annotations", "") not in ("", "none")


def refuse_unknown_columns(source: str | Path, keys: Keys, setting: str = "annotations") -> None:
    """Raise the error of `annotations.read` for a table without known columns. Read only its first lines, and no image."""
    path = Path(source)
    if path.suffix.lower() not in TABLES or not path.is_file() or path.stat().st_size > SMALL:
        return
    with suppress(OSError):  # `read` names the problem
        for _, _, entries, _ in sources_of(path, keys, setting, use_splits=False):
            next(iter(entries()), None)
