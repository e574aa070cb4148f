"""Standard output and error of the commands: safe characters, any encoding, and a reader that may be gone.

Every command runs inside `terminal_streams`. The functions of the Python API that print run inside `encodable_output`.
"""

import codecs
import errno
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO

from lora_blip.runtime.untrusted import for_terminal

ERRORS = "lora_blip_replace"  # the name of `replace_unprintable`, for `errors=` of a text stream
CLOSED = (errno.EPIPE, errno.EINVAL, errno.ESHUTDOWN)  # the reader is gone; Windows reports EINVAL
PLAIN = {  # what replaces a character of our own texts
    "→": "->", "←": "<-", "…": "...", "–": "-", "—": "-", "−": "-", "×": "x", "·": "-", "•": "*", "“": '"', "”": '"',
    "‘": "'", "’": "'", "≤": "<=", "≥": ">=", "≠": "!=", "α": "alpha", "Δ": "delta ", "±": "+-", "✓": "yes", "✗": "no",
    "\u00a0": " ", "\u202f": " ",
}  # fmt: skip


def replace_unprintable(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding does not have: "→" by "->", others by an escape such as "\\xe9"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(one, one.encode("ascii", "backslashreplace").decode()) for one in text), error.end


codecs.register_error(ERRORS, replace_unprintable)


@contextmanager
def terminal_streams() -> Iterator["list[TerminalStream]"]:
    """Make sys.stdout and sys.stderr TerminalStreams inside the block. Yield both."""
    reserve_descriptors()
    before = sys.stdout, sys.stderr
    with ExitStack() as closing:
        closing.enter_context(encodable_output())
        streams = [TerminalStream(stream or closing.enter_context(_nowhere())) for stream in before]
        sys.stdout, sys.stderr = streams
        try:
            yield streams
        finally:
            for stream in streams:
                stream.flush()
            sys.stdout, sys.stderr = before


@contextmanager
def encodable_output() -> Iterator[None]:
    """Make printing inside the block never raise UnicodeEncodeError: a code page such as cp1252 has no "→" and no Chinese.

    Output that is redirected to a file has the encoding of the console or of PYTHONIOENCODING. Files that we open are UTF-8.
    """
    with ExitStack() as closing:
        for stream in (sys.stdout, sys.stderr):
            before = getattr(stream, "errors", None)
            if before != ERRORS and hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=ERRORS)
                closing.callback(_restore, stream, before or "strict")
        yield


def _restore(stream: Any, errors: str) -> None:
    with suppress(OSError, ValueError):  # the stream is closed, or its reader is gone
        stream.reconfigure(errors=errors)


def _nowhere() -> TextIO:
    """Return a text stream that discards everything, for a program without a console (pythonw) or with closed streams."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: PTH123


def reserve_descriptors() -> None:
    """Open the null device as descriptors 0 to 2, if they are closed.

    Otherwise the next file would get one of them, and a library that prints to descriptor 2 would write into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


class TerminalStream:
    """A text stream to a terminal or a log. It escapes unsafe text, and a failed write does not end the program.

    If the reader is gone, as after `| head`, the rest is discarded. After another error, such as a full disk, the rest is
    discarded too, and `failure` is that error.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        self._discard_on_failure(lambda: self.stream.write(self._encodable(for_terminal(text))))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._discard_on_failure(self.stream.flush)

    def _encodable(self, text: str) -> str:
        encoding = getattr(self.stream, "encoding", None)
        if text.isascii() or not isinstance(encoding, str):
            return text
        with suppress(LookupError):  # the stream's encoding is unknown to Python
            return text.encode(encoding, ERRORS).decode(encoding)
        return text

    def _discard_on_failure(self, write: Callable[[], object]) -> None:
        """Call `write`. If it fails, send this and all later output nowhere."""
        try:
            write()
        except OSError as error:
            if error.errno not in CLOSED:
                self.failure = self.failure or error
            self._discard()

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, self.stream.fileno())
        except OSError:  # io.UnsupportedOperation: the stream has no descriptor
            self.stream = _nowhere()
        finally:
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def print_on_stderr(line: str) -> None:
    """Print a line on stderr: the caller's program may write results to stdout. A closed stderr is no error."""
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
