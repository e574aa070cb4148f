"""Errors of the system (a read-only disk, a full quota, a lost share) as one line: the path, the reason, and a fix to paste."""

import errno
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

from lora_blip.errors import FileError
from lora_blip.runtime.untrusted import PointerError, printable

WINDOWS = os.name == "nt"
OTHER_PATHS = {"read": "copy it to another disk", "written": "give another folder (--output-dir)"}  # what {other} becomes
FIXES = {  # name of an errno → fix; {path} is quoted for the shell, and {other} depends on the action.
    "EACCES": "allow it: chmod u+rwX {path}; or {other}",
    "EPERM": "allow it: chmod u+rwX {path}; or {other}",
    "EROFS": "{other}",
    "ENOSPC": "free some space (df -h {path}), or {other}",
    "EDQUOT": "delete some of your files (quota -s lists your limits), or {other}",
    "EFBIG": "raise the limit (ulimit -f unlimited), or {other}",
    "ESTALE": "the share has changed on its server; mount it again, then run the command again",
    "EIO": "the disk or the share has failed; check it (dmesg), then run the command again",
    "ETIMEDOUT": "the share does not answer; check the network, then run the command again",
    "EHOSTDOWN": "the share does not answer; check the network, then run the command again",
    "EHOSTUNREACH": "the share does not answer; check the network, then run the command again",
    "ENOTCONN": "the share is not connected; mount it again, then run the command again",
    "EREMOTEIO": "the share has failed; mount it again, then run the command again",
    "ENOTDIR": "a part of this path is a file; give another path",
    "EISDIR": "it is a folder; give the path of a file",
    "ENOENT": "it does not exist; check the path: ls -ld {path}",
    "EEXIST": "it exists already; give another path",
    "ENOTEMPTY": "other files are in it; give another path",
    "ELOOP": "its links lead to themselves; remove the link, or give another path",
    "ENAMETOOLONG": "give a shorter path",
    "EINVAL": "the file system does not allow this name or operation; give a path on another disk",
    "EMFILE": "allow more open files: ulimit -n 4096",
    "ENFILE": "the system has too many open files; close other programs",
    "EBUSY": "another program uses it; close that program, then run the command again",
    "ETXTBSY": "another program uses it; close that program, then run the command again",
    "ENODEV": "the share cannot map files into memory; copy the file to a local disk",
    "ENOLCK": "the share has no file locks; give a folder on a local disk",
    "ENOTSUP": "the file system does not support this; give a folder on a local disk",
    "ENOSYS": "the file system does not support this; give a folder on a local disk",
    "EXDEV": "the two paths are on different disks; give a folder on one disk",
    "EMLINK": "the file system allows no more links; give another folder",
}  # fmt: skip
NUMBERS = {getattr(errno, name): fix for name, fix in FIXES.items() if hasattr(errno, name)}
OPEN_ON_WINDOWS = "close the program that has it open (also a sync client or a virus scanner), then run the command again"
LONGEST_ON_WINDOWS = 259  # characters of a path that Windows finds unless long paths are allowed
ALLOW_LONG = r"reg add HKLM\SYSTEM\CurrentControlSet\Control\FileSystem /v LongPathsEnabled /t REG_DWORD /d 1 /f"
IN_TEXT = re.compile(r"\(os error (\d+)\)")
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # fsync on some network shares


def file_error(error: OSError, path: str | Path = "", action: str = "used") -> FileError:
    """Return an OSError as FileError: "PATH cannot be written: Read-only file system; …". It keeps errno and strerror.

    path: what the message names; empty: the file name of the error.
    action: "read", "written" or "used".
    """
    if isinstance(error, FileError):
        return error
    name = str(path) or (os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "")
    reason = error.strerror or str(error)
    result = FileError(printable(f"{name or 'a file'} cannot be {action}: {reason}; {fix_of(error, name, action)}"))
    result.errno, result.strerror, result.filename = error.errno, reason, name
    return result


def fix_of(error: OSError, path: str | Path, action: str = "read") -> str:
    """Return what the user can do about an OSError at this path."""
    if WINDOWS and error.errno in (errno.EACCES, errno.EPERM, errno.EBUSY):
        return OPEN_ON_WINDOWS
    if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENAMETOOLONG) and (advice := long_path_advice(path)):
        return advice
    fix = NUMBERS.get(error.errno or 0, "check the disk, then run the command again")
    return fix.replace("{other}", OTHER_PATHS.get(action, "give another path")).replace("{path}", quoted_for_shell(str(path)))


def missing_file(path: str | Path) -> str:
    """Return the message that a file does not exist. On Windows, a path that is too long has its own reason and fix."""
    advice = long_path_advice(path)
    return f"{path} does not exist" + f", or cannot be found: {advice}" * bool(advice)


def long_path_advice(path: str | Path) -> str:
    """Return what to do about a path that Windows does not find because of its length, or "" for any other path."""
    length = len(os.path.abspath(path)) if WINDOWS else 0  # noqa: PTH100  # a str or a Path
    if length <= LONGEST_ON_WINDOWS:
        return ""
    return (
        f"the path has {length} characters, and Windows finds at most {LONGEST_ON_WINDOWS}; use a folder with a shorter path, "
        f"or allow long paths once, as an administrator: {ALLOW_LONG}"
    )


def reason_and_fix(error: Exception, path: str | Path) -> str:
    """Return "Input/output error; check …" if a system error, also one of safetensors, prevents that a file is read.

    Return the message of a PointerError, which contains its fix, and "" for another error.
    """
    if isinstance(error, PointerError):
        return str(error)
    if number := IN_TEXT.search(str(error)):  # the libraries that are written in Rust
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    return f"{error.strerror}; {fix_of(error, path)}" if is_system_error(error) else ""


def is_system_error(error: BaseException) -> TypeGuard[OSError]:
    """Return True for an OSError of the system about a file. An error of the program has no such number."""
    return isinstance(error, OSError) and error.errno in NUMBERS and not isinstance(error, ConnectionError)


def writing(path: str | Path) -> AbstractContextManager[None]:
    """Raise FileError if the system refuses what the block writes to `path`. Each write of this package is in such a block."""
    return _accessing(path, "written")


def reading(path: str | Path) -> AbstractContextManager[None]:
    """Raise FileError if the system refuses what the block reads from `path`."""
    return _accessing(path, "read")


@contextmanager
def _accessing(path: str | Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_system_error(error):
            raise
        raise file_error(error, path, action) from None


def sync(descriptor: int) -> None:
    """Put the content of an open file on the disk. Do nothing on a file system that cannot do this."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Put a rename in a folder on the disk. Do nothing if the system cannot do this: the rename itself is complete."""
    if WINDOWS:
        return
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def quoted_for_shell(text: str) -> str:
    """Return a text as one argument of a command to paste: quoted for the shell of this system."""
    return subprocess.list2cmdline([text]) if WINDOWS else shlex.quote(text)


def command_line(arguments: list[str]) -> str:
    """Return a command to paste into the shell of this system."""
    return subprocess.list2cmdline(arguments) if WINDOWS else shlex.join(arguments)
