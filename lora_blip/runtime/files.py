"""Write files and folders atomically: completely or not at all."""

import csv
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from lora_blip.errors import ConfigError, FileError, OutputError
from lora_blip.runtime import system_errors
from lora_blip.runtime.system_errors import sync, sync_folder, writing
from lora_blip.runtime.untrusted import UNPRINTABLE

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space on the disk or in the quota, or the limit of the file size

FREE_SPACE = "free some space, then "
PAUSES = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds before Windows is asked again to rename a file that is open

# A spreadsheet may start a cell at the start of a text or of a line, and after a semicolon or tab. Each match of START
# is such a place. Its group is the first character of the cell after spaces and invisible characters.
INVISIBLE = f"\\s\u00ad\u180e\u200b-\u200d\u2060{UNPRINTABLE}"
START = re.compile(f"(?:^(?![;\t\n])|[;\t\n])(?=(?:(?![\t\n])[{INVISIBLE}])*(.?))")
SIGNS = "=+-\u2212@"  # also as ＝, ﹢ or ⁻, which some programs read as the plain sign


def write_whole(path: Path, content: bytes, synced: bool = True) -> None:
    """Write a file atomically: write a temporary file, sync it and rename it.

    Without `synced`, the file is not synced: it may be incomplete after a power failure, but not after a killed process. Use
    that only for content with a checksum.
    """
    temporary = _unfinished(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                if synced:
                    file.flush()
                    sync(file.fileno())
            _replace(temporary, path)
        finally:
            with suppress(OSError):  # it has been renamed, or the disk is gone
                temporary.unlink()
    if synced:
        sync_folder(path.parent)


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV that a spreadsheet does not execute: a text that starts with a sign of a formula gets an apostrophe.

    A spreadsheet may also split a text at semicolons and tabs. So "a;=1" becomes "a;'=1". Numbers are not changed.
    Use this function for every CSV file that people open.
    """
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return file.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, int | float):
        return value
    text = str(value).replace("\r\n", "\n").replace("\r", "\n")  # csv does not quote a carriage return, which ends a row
    text = START.sub(lambda match: f"{match[0]}'" if _is_sign(match[1]) else match[0], text)
    return f"'{text}" if text.startswith(("\t", "\n")) else text


def _is_sign(character: str) -> bool:
    return unicodedata.normalize("NFKC", character) in [*SIGNS]


def cache_folder() -> Path:
    """Return the folder of the user's cache for this package. Raise RuntimeError if the user has no home folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_blip"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_whole(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create a folder atomically: `fill` writes into a temporary one, which is synced and renamed.

    Raise OSError (EEXIST or ENOTEMPTY) if the folder exists; it is not changed.
    """
    temporary = _unfinished(folder)
    with writing(folder):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            for path in filter(Path.is_file, temporary.iterdir()):
                with path.open("rb") as file:
                    sync(file.fileno())
            sync_folder(temporary)
            _replace(temporary, folder)
        finally:
            remove(temporary)
    sync_folder(folder.parent)


def _replace(source: Path, target: Path) -> None:
    """Rename a file or folder. Windows refuses this for a moment if a virus scanner or a reader has it open: try again."""
    for seconds in (*PAUSES, None):
        try:
            source.replace(target)
            return
        except PermissionError:
            if seconds is None or not system_errors.WINDOWS:
                raise
            time.sleep(seconds)


def make_folder(folder: Path, exist_ok: bool = True) -> None:
    """Create a folder and those above it. Raise FileError if the system refuses it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=exist_ok)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that has no reader yet, such as one in the temporary folder of `make_whole`."""
    with writing(path):
        path.write_bytes(content)


def open_to_append(path: Path) -> FileIO:
    """Open a file whose lines are each appended by one system call. Raise FileError if the system refuses it."""
    with writing(path):
        return path.open("ab", buffering=0)


def remove(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that no process finds an incomplete folder under the name."""
    if folder.exists():
        with writing(folder):
            doomed = folder if folder.name.startswith(".") else folder.replace(_unfinished(folder))
        shutil.rmtree(doomed, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files of killed processes from a folder. No other process may write in the folder."""
    for path in folder.glob(".*.tmp") if folder.is_dir() else ():
        with suppress(OSError):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    """Return a unique temporary name in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def link_or_copy(source: Path, target: Path) -> None:
    """Create `target` with the content of `source`: a hard link, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def unused_path(path: Path) -> Path:
    """Return the path, or the same with a number if it exists, so that two runs in one second have their own names."""
    path = path if path.name not in ("", "..") else path.absolute()  # "." has no name
    for number in range(1, 1000 if path.name else 1):
        name = path if number == 1 else path.with_name(f"{path.name}_{number}")
        if not os.path.lexists(name):
            return name
    raise ConfigError(f"{path} and 998 numbered names exist; give another output_dir (--output-dir)")


def refuse_unwritable(folder: str, fix: str = "give a folder that can be written (--output-dir)") -> None:
    """Raise ConfigError, whose message ends with `fix`, if a folder cannot be created or written. Leave no file behind."""
    path = Path(folder).absolute()
    existing, reason = path, ""
    try:
        existing, status = next(filter(None, map(_with_status, (path, *path.parents))))
        if stat.S_ISLNK(status.st_mode):
            status = existing.stat()  # raises FileNotFoundError or ELOOP for a broken link
        if not stat.S_ISDIR(status.st_mode):
            reason = "it is not a folder"
        else:
            with tempfile.TemporaryFile(dir=existing):  # a test, because permissions do not show read-only file systems
                pass
    except FileNotFoundError:
        reason = "it is a link to a missing folder" if existing.is_symlink() else "no file can be created in it"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        name = "" if existing == path else f"{existing}: "
        raise ConfigError(f"output_dir = {folder!r}: {name}{reason}; {fix}")


def _with_status(path: Path) -> tuple[Path, os.stat_result] | None:
    """Return a path with its status, without following a link, or None if it does not exist."""
    try:
        return path, path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def room_for(folder: Path, error_class: type[Exception], advice: str) -> Iterator[None]:
    """Raise `error_class`, with a message that ends with `advice`, if the system refuses to write, as on a full disk.

    In `advice`, "{first}" becomes "free some space, then " for a full disk or quota.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            message = f"no room left to write in {folder} ({error.strerror}){advice.replace('{first}', FREE_SPACE)}"
            raise error_class(message) from None
        if isinstance(error, FileError):  # its message has a fix
            raise error_class(f"{error}{advice.replace('{first}', '')}") from None
        raise


def refuse_full(folder: Path) -> None:
    """Raise OutputError if a folder exists and contains something, or if the path is a file."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        problem = "is not empty" if folder.is_dir() else "exists already and is not a folder"
        new = system_errors.quoted_for_shell(str(unused_path(folder)))
        raise OutputError(f"output_dir = {str(folder)!r}: it {problem}; give a new folder: --output-dir {new}")
