"""Add the commands that convert files to an error about the columns of VAL_ANNOTATIONS: a flag names those of both files."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_blip.data.columns import COMMON, flag_of, key_flag
from lora_blip.data.entries import SomeLinesError, plain_name
from lora_blip.data.formats import keys_of
from lora_blip.errors import DataError
from lora_blip.runtime.files import unused_path
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import open_regular

FLAGS = r"""(?P<flags>(?: --\w+-key (?:"[^"]*"|'[^']*'|\S+?))+)"""
FIX = re.compile(
    rf"(?:\n|; )(?:did you mean|(?:otherwise )?name the (?:columns|right one):|if the file has no such \w+:){FLAGS}\??(?=\s|$)"
)
UNKNOWN = re.compile(r"""name the (?:columns|right one):|no column has the name|it has no ['"]""")
OURS = {key_flag(ours): ours for ours in COMMON}
LONGEST_LINE = 2**16  # bytes of the first line of ANNOTATIONS that are read


@contextmanager
def of_two_files(source: str | Path, setting: str = "val_annotations", config: Any = None) -> Iterator[None]:
    """Add to an error about the columns of the validation file how to convert files, because the flags name those of both.

    setting: the setting that names the file. If it is not val_annotations, the error does not change.
    """
    try:
        yield
    except SomeLinesError:
        raise
    except DataError as error:
        if setting != "val_annotations" or not UNKNOWN.search(str(error)):
            raise
        raise DataError(_with_commands(str(error), str(source), config)) from None


def _with_commands(message: str, source: str, config: Any) -> str:
    """Return the message with the commands that convert the files to the usual columns, so that no column must be named."""
    given = keys_of(config).named if config else {}
    fix = FIX.search(message)
    # of the columns of the validation file
    names = {ours: value for ours, value in (given | _columns_of(fix)).items() if value}
    files = []  # (setting, file, the names of its columns, the converted file, the fractions of train and val)
    if given and not _has_usual_keys(config.annotations):
        files.append(("ANNOTATIONS", config.annotations, given, unused_path(Path("prepared")) / "train.jsonl", "1"))
    if not given or any(plain_name(value) not in COMMON[ours] for ours, value in names.items()):
        files.append(("VAL_ANNOTATIONS", source, names, unused_path(Path("prepared_val")) / "val.jsonl", "0,1"))
    message = message.replace(fix[0], "") if fix else message  # its flags would name the wrong columns of ANNOTATIONS
    if given:
        none = " and ".join(f'{key_flag(ours)[2:].replace("-", "_").upper()} = ""' for ours in given)
        start = f"the columns that you name are also those of ANNOTATIONS; if this file has other columns, name none ({none})"
    else:
        start = "do not name these columns with a flag: it would name those of ANNOTATIONS too; convert this file"
    settings = " and ".join(f'{setting} = "{converted.as_posix()}"' for setting, _, _, converted, _ in files)
    start += f", {'convert the files below, ' * bool(given)}and set {settings}" * bool(files)
    root = getattr(config, "image_root", "")
    images = f" --images {quoted_for_shell(root)}" * bool(root)
    commands = [
        f"lora-blip prepare --source {quoted_for_shell(path)}{images} --splits {splits} --output-dir "
        + " ".join([quoted_for_shell(str(converted.parent)), *(flag_of(ours, value) for ours, value in columns.items())])
        for _, path, columns, converted, splits in files
    ]
    return "\n".join([message, f"{start}:" if commands else start, *commands])


def _columns_of(fix: re.Match[str] | None) -> dict[str, str]:
    """Return the columns that the flags of a message name, {our key: column}, or {} if its text comes from a strange file."""
    with suppress(ValueError, KeyError):
        words = shlex.split(fix["flags"]) if fix else []
        return {OURS[flag]: value for flag, value in zip(words[::2], words[1::2], strict=True)}
    return {}


def _has_usual_keys(annotations: str) -> bool:
    """Return True if the first line of ANNOTATIONS is that of a JSONL file with the usual keys, such as one of `prepare`."""
    with suppress(OSError, ValueError), open_regular(annotations) as file:
        line = json.loads(file.readline(LONGEST_LINE))
        return isinstance(line, dict) and "image" in line and ("text" in line or "question" in line)
    return False
