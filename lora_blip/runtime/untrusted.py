"""Handle untrusted files and texts: open files without blocking, parse JSON strictly, and print texts safely."""

import json
import os
import re
import reprlib
import stat
from pathlib import Path
from typing import Any, BinaryIO

from lora_blip.runtime.counts import counted

DEEPEST = 100  # nested brackets of a JSON; Python's own limit, about a thousand, depends on the depth of the call
LONGEST_LINE = 450  # characters of a line in a list of problems
LONGEST_PASTE = 280  # characters of a corrected line in a message
LONGEST_QUOTE = 160  # characters of a value in a message
LONGEST_PATH = 3000  # bytes of a path; systems allow 4,096, including the working folder
LONGEST_NAME = 255  # bytes of one name in a path
# C0 and C1 controls (ANSI escapes start with one), bidirectional controls, line separators, invisible tags, half surrogates
UNPRINTABLE = (
    r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
IN_A_LINE, IN_LINES = re.compile(f"[{UNPRINTABLE}]"), re.compile(f"(?!\n)[{UNPRINTABLE}]")
CURSOR_UP = re.compile(r"(?:\x1b\[A)+")  # what tqdm writes between two bars
HALF_PAIR = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which JSON can write, and which is no character
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # NUL ends a path, the others move a terminal's cursor
LFS = b"version https://git-lfs.github.com/spec/"  # the start of the pointer that Git stores in place of a large file
LONGEST_POINTER = 1024  # bytes, by the specification of Git LFS
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# flags of os.open that this system has; with O_NONBLOCK, a pipe cannot block the call
OPEN_FLAGS = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))
QUOTE = reprlib.Repr()
QUOTE.maxstring = QUOTE.maxother = QUOTE.maxlong = LONGEST_QUOTE
QUOTE.maxlevel = 3


class UnreadableError(OSError):
    """The path exists but is not a readable file. The message says what it is."""


class PointerError(UnreadableError):
    """The file is a pointer of Git LFS. The message contains the command that gets the file."""


def open_regular(path: str | Path, largest: int | None = None) -> BinaryIO:
    """Open a regular file that is not empty and has at most `largest` bytes, for reading. Raise OSError for any other.

    A pointer of Git LFS is an error too: a clone without Git LFS has one in place of each large file. A pipe would wait for a
    writer, a device has no end, and files of /proc claim to be empty. The type is checked before the file is opened, because
    opening a device may have effects, and again afterwards.
    """
    try:
        _refuse_irregular(os.stat(path), largest)  # noqa: PTH116  # a str or Path of any characters
        file = os.fdopen(os.open(path, os.O_RDONLY | OPEN_FLAGS), "rb")
    except UnicodeError:
        raise UnreadableError("its name contains half of a character (of a surrogate pair)") from None
    except ValueError:
        raise UnreadableError("its name contains a NUL character") from None
    try:
        status = os.fstat(file.fileno())
        _refuse_irregular(status, largest)
        if status.st_size <= LONGEST_POINTER:
            _refuse_pointer(file)
    except OSError:
        file.close()
        raise
    return file


def _refuse_pointer(file: BinaryIO) -> None:
    """Raise PointerError if a file is a pointer of Git LFS. Otherwise its position is the start, as before."""
    if file.read(len(LFS)) == LFS:
        raise PointerError("it is a pointer of Git LFS, not the file; install Git LFS, and run in its folder: git lfs pull")
    file.seek(0)


def _refuse_irregular(status: os.stat_result, largest: int | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableError(f"it is {KINDS.get(stat.S_IFMT(status.st_mode), 'not a file')}")
    if not status.st_size:
        raise UnreadableError("it is empty")
    if largest is not None and status.st_size > largest:
        raise UnreadableError(f"it has {counted(status.st_size, 'byte')}, more than {largest:,}")


def os_error_reason(error: OSError) -> str:
    """Return the reason of an OSError without the path, which the caller adds."""
    return error.strerror or str(error)


def is_path(path: object) -> bool:
    """Return True if a value is a text that can be a path, and has no control characters."""
    if not isinstance(path, str) or len(path) > LONGEST_PATH:
        return False
    if not path.isprintable() and CONTROL.search(path):  # the first test is fast but too strict
        return False
    if len(path) <= LONGEST_NAME // 4:
        return True
    return not is_too_long(path)


def is_too_long(path: str) -> bool:
    """Return True if a path is longer than a system allows. Functions of `pathlib` then raise OSError."""
    written = path.replace("\\", "/").encode(errors="surrogatepass")
    return len(written) > LONGEST_PATH or max(map(len, written.split(b"/"))) > LONGEST_NAME


# ---------------------------------------------------------------- JSON


def parsed(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """Return the value of a JSON text. Raise ValueError for a repeated key, NaN, Infinity, or nesting deeper than DEEPEST.

    Another `decoder` may accept repeated keys and constants.
    """
    try:
        value = (decoder or STRICT).decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[") + text.count("{") > DEEPEST and _deeper(value, DEEPEST):
        raise ValueError("nested too deeply")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return these pairs of a JSON object as a dict. Raise ValueError if a key occurs twice, because its value is ambiguous."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {quoted(next(key for key in entry if keys.count(key) > 1))} occurs twice; keep one")
    return entry


def refuse_constant(name: str) -> Any:
    """Raise ValueError for NaN or Infinity, which Python reads and writes but JSON does not have."""
    raise ValueError(f"{name} is not JSON; write null")


STRICT = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=refuse_constant)
WITH_NAN = json.JSONDecoder(object_pairs_hook=unique_keys)


def _deeper(value: Any, levels: int) -> bool:
    """Return True if lists and objects are nested deeper than `levels`. The search is not recursive."""
    containers: list[Any] = [[value]]
    while containers and levels >= 0:
        inside = (x.values() if isinstance(x, dict) else x for x in containers)
        containers, levels = [x for values in inside for x in values if isinstance(x, dict | list)], levels - 1
    return bool(containers)


def printable(text: object) -> str:
    """Return `str(text)` as one line that is safe to print.

    Escape each character that controls a terminal, ends a line, reorders or hides text, or cannot be encoded. Other characters,
    of any language, are unchanged. Call this before untrusted text is printed or written to a page: paths, captions, model
    names, config values, metadata, tokens.
    """
    return _escaped(IN_A_LINE, str(text))


def printable_lines(text: object) -> str:
    """Return `str(text)` escaped as in `printable`, but keep its line ends. Use it for our own text of several lines."""
    return _escaped(IN_LINES, str(text))


def for_terminal(text: str) -> str:
    """Return text as `printable_lines` does, but keep the codes with which a progress bar moves the cursor."""
    if CURSOR_UP.fullmatch(text):
        return text
    return "\r" + printable_lines(text[1:]) if text.startswith("\r") else printable_lines(text)


def _escaped(unsafe: re.Pattern[str], text: str) -> str:
    if text.isprintable():  # fast, and true for most texts
        return text
    return unsafe.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def quoted(value: object) -> str:
    """Return the repr of a value as one line: shortened, with control characters escaped."""
    try:
        text = QUOTE.repr(value)
    except ValueError:  # an int with more digits than Python converts
        text = f"{type(value).__name__} of many digits"
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]} …"


def shorten(text: str) -> str:
    """Return a text as one line, shortened and escaped as by `quoted`, but without quotes: for messages of other programs."""
    return quoted(text)[1:-1].replace("\\'", "'")


def pasteable(text: str) -> str:
    """Return a text that the user can copy from a message: as `printable` gives it, and cut after LONGEST_PASTE characters."""
    line = printable(text)
    return line if len(line) <= LONGEST_PASTE else f"{line[:LONGEST_PASTE]} …"


def line_of_list(text: str) -> str:
    """Return a line of a long list of problems with at most LONGEST_LINE characters: its middle is left out."""
    half = LONGEST_LINE // 2 - 2
    return text if len(text) <= LONGEST_LINE else f"{text[:half]} … {text[-half:]}"
