"""Name the columns of several files in one setting: IMAGE_KEY = "Bild|Foto" is for files with different columns.

`image`, `text`, `question` and `answer` stand for the usual names: "Bild|image" is Bild, or a usual name if Bild is missing.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_blip.data.columns import COMMON, flag_of, key_flag
from lora_blip.data.entries import KeyFault, Location, SomeLinesError, in_all_lines
from lora_blip.data.formats import Keys
from lora_blip.data.several_texts import numbered_of
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import printable

SEPARATOR = "|"
USUAL = {"image": "image", "text": "text", "question": "question", "answers": "answer"}  # our key → what stands for usual names
FLAGS = r"""(?P<flags>(?: --\w+-key (?:"[^"]*"|'[^']*'|\S+?))+)"""
FIX = re.compile(
    r"(?P<start>(?:\n|; )(?:did you mean|(?:otherwise )?name the (?:columns|right one):|if the file has no such \w+:))"
    rf"{FLAGS}(?P<end>\??)(?=\s|$)"
)
OURS = {key_flag(ours): ours for ours in COMMON}
EXPLAINED = "\na name after | is for the files that lack the name before it"


def chosen(named: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return {our key: the first of its names that a file has}. named: {our key: names with SEPARATOR between them}.

    names: the columns or keys of the file. If it has none of the names, leave out a key that may have a usual name, and return
    the other names unchanged: they are unknown.
    """
    if not any(SEPARATOR in each for each in named.values()):
        return dict(named)
    names = [*names]
    known = {name.strip().casefold() for name in names}
    result = {}
    for ours, value in named.items():
        choices = [value.strip(), *(choice.strip() for choice in value.split(SEPARATOR))]
        found = (each for each in choices if each.casefold() in known or numbered_of(names, ours, each))
        if (name := next(found, "")) or USUAL[ours] not in choices:
            result[ours] = name or value
    return result


def with_usual_names(keys: Keys) -> Keys:
    """Return the same names, each with the usual ones after it: for a file that may have other columns than another file."""
    pairs = zip((keys.image, keys.text, keys.question, keys.answer), USUAL.values(), strict=True)
    return Keys(*(f"{name}{SEPARATOR}{usual}" if name else "" for name, usual in pairs))


@contextmanager
def of_several_files(keys: Keys, several: bool = True) -> Iterator[None]:
    """Change the flags in an error about columns, so that they add names: the settings name the columns of other files too.

    keys: the names that the user gives. several: False for a single file, whose error does not change.
    """
    try:
        yield
    except SomeLinesError:
        raise
    except DataError as error:
        if not several or not FIX.search(str(error)):
            raise
        raise DataError(FIX.sub(lambda fix: _added(fix, keys), str(error)) + EXPLAINED) from None


def refuse_unknown_keys(source: Path, faults: Sequence[tuple[Location, str]], lines: int) -> None:
    """Raise DataError if all lines of one of several files lack the known keys: the other files would be used without it.

    faults: the invalid lines, with their reasons. lines: the number of all lines.
    """
    if faults and len(faults) == lines and all(isinstance(reason, KeyFault) for _, reason in faults):
        at, reason = faults[0]
        raise DataError(printable(f"{source}:{at}: {in_all_lines(reason)} (all lines of this file)"))


def _added(fix: re.Match[str], keys: Keys) -> str:
    """Return the flags of a message with the names that the user gives, or else the usual ones, before the new names."""
    with suppress(ValueError, KeyError):  # a text from a strange file
        words = shlex.split(fix["flags"])
        pairs = [(OURS[flag], name) for flag, name in zip(words[::2], words[1::2], strict=True)]
        names = {ours: (keys.named.get(ours, USUAL[ours]), name or USUAL[ours]) for ours, name in pairs}
        flags = " ".join(flag_of(ours, SEPARATOR.join(dict.fromkeys(both))) for ours, both in names.items())
        return f"{fix['start']} {flags}{fix['end']}"
    return fix[0]
