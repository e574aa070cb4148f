"""One writer a folder: a lock that the system takes back when its process dies, however it dies."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from lora_blip.errors import LockedError

NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside the block no other process can hold the same folder. Raises LockedError if one does."""
    path = folder / NAME
    with path.open("a+b") as file:
        if not _lock(file):
            raise LockedError(f"another run is writing into {folder}; wait for its end, or give another output_dir")
        yield


def _lock(file: IO[bytes]) -> bool:
    """A POSIX record lock, not flock's: loader workers would inherit that one, and outlive a killed parent with it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            windows: Any = msvcrt
            file.seek(0)
            windows.locking(file.fileno(), windows.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system without locks stops nobody
    return True
