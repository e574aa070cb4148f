"""A lock that allows one writer per folder. The system releases it when the process ends, also if it is killed."""

import errno
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_blip.errors import LockedError
from lora_blip.runtime.system_errors import writing

NAME = ".lock"
PROBE = 0.3  # seconds; `is_held` in another process has the lock for a shorter time
HELD: set[Path] = set()  # folders whose locks this process holds


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder inside the block. Raise LockedError if another process holds it."""
    path = folder / NAME
    with writing(path):
        file = path.open("a+b")
    with file:
        if not _lock(file):
            time.sleep(PROBE)
            if not _lock(file):
                raise LockedError(
                    f"another run is writing into {folder}; wait until it ends, or give another output_dir (--output-dir)"
                )
        HELD.add(folder.resolve())
        try:
            yield
        finally:
            HELD.discard(folder.resolve())


def is_held(folder: Path) -> bool:
    """Return True if this or another process holds the lock of a folder."""
    if folder.resolve() in HELD:  # do not open the file: closing it would release the lock of this process
        return True
    try:
        with writing(folder / NAME):
            file = (folder / NAME).open("r+b")
        with file:
            if not _lock(file):
                return True
            _set_lock(file, taken=False)
    except OSError:  # there is no lock, or it cannot be written
        pass
    return False


def _lock(file: IO[bytes]) -> bool:
    """Take the lock of an open file. Return False if another process has it."""
    try:
        _set_lock(file, taken=True)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks: continue without one
    return True


def _set_lock(file: IO[bytes], taken: bool) -> None:
    """Take or release a POSIX record lock, or a lock of Windows. Raise OSError if another process has it.

    A lock of flock would be inherited by loader workers, which may outlive a killed parent. On Windows, a lock must be released
    before the file is closed, because Windows may release it some time later.
    """
    if sys.platform == "win32":
        import msvcrt

        windows: Any = msvcrt
        file.seek(0)
        windows.locking(file.fileno(), windows.LK_NBLCK if taken else windows.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB if taken else fcntl.LOCK_UN)
