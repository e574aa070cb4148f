"""Open text files in their encoding, and read JSONL. A reader yields (location, entry), or (location, reason) if invalid."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lora_blip.data.conversions import converted, needs_conversion
from lora_blip.data.entries import ANSWER_KEYS, TEXT_KEYS, Located, Location, WrittenFloat
from lora_blip.data.json_repair import STRICT, corrected_reason
from lora_blip.data.several_texts import numbered_names, several
from lora_blip.runtime.untrusted import DEEPEST, open_regular, parsed, refuse_constant

LONGEST = 2**20  # largest number of characters of a line; a line with a caption has about a hundred
TOO_LONG = f"it has more than {LONGEST:,} characters; put each example on its own line"

ESCAPED, NOT_ASCII = re.compile("[\udc80-\udcff]"), re.compile(r"[^\x00-\x7f]")  # invalid bytes, and all characters but ASCII

# five times as fast as STRICT, but does not detect repeated keys
QUICK = json.JSONDecoder(parse_float=WrittenFloat, parse_constant=refuse_constant)

CP1252 = "Windows-1252, and not UTF-8; if letters such as é are wrong, save the text as UTF-8"  # end of a message
HEAD = 2**20  # bytes at the start of a file that are searched for an image inside JSON
INLINE_IMAGE, ADDRESS = b"data:image/", b"http"
OUR_KEYS = {"image", "text", "question", "answers", "question_id", "prompt", "group", "split"}


@dataclass(frozen=True)
class Keys:
    """The names of the columns or keys of a source, as the user gives them. "": detect a common name."""

    image: str = ""
    text: str = ""
    question: str = ""
    answer: str = ""

    @property
    def named(self) -> dict[str, str]:
        """Return {key of an entry: its name in the source} for the names that are not empty."""
        pairs = (("image", self.image), ("text", self.text), ("question", self.question), ("answers", self.answer))
        return {ours: name for ours, name in pairs if name}


NO_KEYS = Keys()


def keys_of(config: Any) -> Keys:
    """Return the names of the columns in the settings of a command."""
    return Keys(config.image_key, config.text_key, config.question_key, config.answer_key)


def open_text(path: Path, newline: str | None = None, encoding: str = "") -> TextIO:
    """Open a text file in UTF-8, or in UTF-16 with a byte order mark. Raise OSError if it cannot be opened.

    Invalid bytes of UTF-8 become surrogates, which `entries.canonical` reports.
    """
    file = open_regular(path)
    head = file.read(2)
    file.seek(0)
    encoding = encoding or ("utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    errors = "replace" if encoding == "utf-16" else "surrogateescape"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline)


def table_encoding(path: Path) -> str:
    """Return the encoding of a table: "utf-16" if it has the byte order mark of UTF-16, otherwise "utf-8-sig" or "cp1252".

    cp1252, the encoding of Excel's "CSV" in western Europe and America, is returned if more characters outside ASCII are
    invalid than valid in UTF-8.
    """
    surplus = 0
    with open_text(path) as file:
        if file.encoding == "utf-16":
            return "utf-16"
        while part := file.read(LONGEST):
            surplus += _more_invalid(part)
    return "cp1252" if surplus > 0 else "utf-8-sig"


def from_cp1252(text: str) -> str | None:
    """Return a text of `open_text` decoded from cp1252, or None if `table_encoding` would not return cp1252 for it."""
    return text.encode("utf-8", "surrogateescape").decode("cp1252", "surrogateescape") if _more_invalid(text) > 0 else None


def _more_invalid(text: str) -> int:
    """Return the number of invalid bytes minus the number of valid characters outside ASCII."""
    return 0 if text.isascii() else 2 * len(ESCAPED.findall(text)) - len(NOT_ASCII.findall(text))


def describe_encoding(path: Path, table: bool) -> tuple[str, str]:
    """Return the encoding of a file, and a message that names the encoding ("" for UTF-8). table: test for cp1252 too."""
    with open_text(path) as file:
        encoding = table_encoding(path) if table else file.encoding
    message = {
        "utf-16": f"{path} is read as UTF-16",
        "cp1252": f"{path} is read as {CP1252}",
    }.get(encoding, "")
    return encoding, message


def numbered_lines(path: Path, longest: int = LONGEST, encoding: str = "") -> Iterator[tuple[int, str | None]]:
    """Yield (number, line) for each line that is not blank, or (number, None) if it is longer than `longest`."""
    with open_text(path, encoding=encoding) as file:
        for number, line in enumerate(bounded(file, longest), 1):
            if len(line) > longest:
                yield number, None
            elif not line.isspace():
                yield number, line


def bounded(file: TextIO, longest: int = LONGEST) -> Iterator[str]:
    """Yield the lines of a file. Of a line longer than `longest`, yield only the first longest + 1 characters."""
    while part := file.readline(longest + 1):
        yield part
        while len(part) > longest and part[-1] not in "\r\n":
            part = file.readline(longest + 1)


def jsonl_entries(path: Path, longest: int = LONGEST, raw: bool = False) -> Iterator[Located]:
    """Read a file with a JSON object per line.

    longest: the largest number of characters of a line. raw: yield each object as it is, because its keys will be renamed.
    """
    convert: Callable[[Location, Any], Iterator[Located]] | None = None
    is_first, is_numbered = True, False
    for number, line in numbered_lines(path, longest):
        if line is None:
            yield number, TOO_LONG
            continue
        try:
            entry = _object(line)
        except ValueError as error:
            yield number, corrected_reason(line, error) or f"it is not valid JSON ({error}): {line.strip()[:60]!r}"
            continue
        if is_first:
            is_first = False
            is_ours = raw or (type(entry) is dict and entry.keys() <= OUR_KEYS and type(entry.get("image")) is str)
            convert = None if is_ours or not needs_conversion(entry) else converted
            is_unknown = isinstance(entry, dict) and entry.keys().isdisjoint((*TEXT_KEYS, *ANSWER_KEYS))
            is_numbered = is_unknown and bool(numbered_names(list(entry), "question" in entry))
        if convert and isinstance(entry, dict | list):
            yield from convert(number, entry)
        elif not isinstance(entry, dict):
            yield number, f'expected an object {{"image": …, "text": …}}, got {line.strip()[:60]!r}'
        elif (is_numbered or ("[" in line and "question" not in entry)) and not raw:
            yield from several(number, entry)
        else:
            yield number, entry


def _object(line: str) -> Any:
    """Return `parsed(line, STRICT)`. This is faster for most lines.

    QUICK gives the same result if the object has as many keys as the line has colons, because then no key is repeated.
    """
    try:
        entry, end = QUICK.scan_once(line, 0)  # type: ignore[attr-defined]  # what `raw_decode` calls
    except (ValueError, RecursionError, StopIteration):
        return parsed(line, STRICT)  # raises the error with its reason
    flat = line[end:] in ("\n", "") and type(entry) is dict and len(entry) == line.count(":") and line.count("[") < DEEPEST - 1
    return entry if flat else parsed(line, STRICT)


def is_plain_jsonl(path: Path, keys: Keys) -> bool:
    """Return True for JSONL that needs no detection: no image inside a line, no web address in the first, no named keys."""
    if keys.named or path.suffix.lower() not in (".jsonl", ".ndjson"):
        return False
    head = _head(path)
    return INLINE_IMAGE not in head and ADDRESS not in head.partition(b"\n")[0]


def has_inline_images(path: Path) -> bool:
    """Return True if a file contains an image in its first HEAD bytes."""
    return INLINE_IMAGE in _head(path)


def _head(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(HEAD)
    except OSError:
        return b""  # the reader of the file reports the reason
