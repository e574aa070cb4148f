"""A cache on disk for tensors that are slower to compute than to read: decoded images and states of the frozen ViT."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from time import time
from typing import Any, BinaryIO, cast
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from lora_blip.data.images import LARGEST_FILE
from lora_blip.errors import ImageError
from lora_blip.runtime.files import FULL, remove, write_whole
from lora_blip.runtime.system_errors import missing_file
from lora_blip.runtime.untrusted import UnreadableError, open_regular, os_error_reason, parsed, printable

try:
    import fcntl
except ImportError:  # Windows: a folder with an open file cannot be renamed, which has the same effect as a lock
    fcntl = None  # type: ignore[assignment]

KIND = re.compile(r"[0-9a-f]{16}")  # the name of a kind's folder
BEING_REMOVED = re.compile(r"\.[0-9a-f]{16}\.[0-9]+\.[0-9a-f]{8}\.tmp")  # the name of a kind's folder while it is removed
KEY = re.compile(r"[0-9a-f]{2}[0-9a-z_-]{0,120}")
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
LARGEST = 2**28  # largest number of bytes of a value; an image or the states of an image have about one million
LONGEST_HEADER = 4096
PAGE = 4096
ABANDONED = 3600  # seconds after which an unfinished temporary file is removed
RECOUNTS = 50  # how often the folder is counted while it fills, because other processes write too
DIGESTS = 2**20  # largest number of digests in memory, at about 300 bytes each


class Store:
    """A map from keys to tensors on disk. A kind is a group of values with the same settings, and has its own folder.

    `kind` contains everything that a value depends on besides the image, such as the stage and the size.

    `limit` bounds the bytes of all kinds together. When it is reached, other kinds that no process has open are removed,
    beginning with the longest unused. Otherwise a run with new settings would find the cache full. If there is still no room,
    nothing more is stored: each value of this kind is read once per epoch, so replacing one by another gains nothing. Any
    number of processes may read and write at the same time, and may be killed. The first stored value creates the folder.
    """

    def __init__(self, folder: Path, kind: dict[str, Any], limit: int) -> None:
        self.root, self.kind, self.limit = Path(folder), kind, limit
        self.values = self.root / hashlib.sha256(self._kind_json.encode()).hexdigest()[:16]
        self.full = ""  # the reason why nothing more is stored; "" if there is room
        self.used = -1  # bytes of all kinds; -1: not counted yet (reading does not need it)
        self.uncounted = 0  # bytes that were written since the count
        self.lock_file: BinaryIO | None = None

    def get(self, key: str) -> Tensor | None:
        """Return the stored value, or None. Delete a damaged value."""
        path = self._path(key)
        try:
            with open_regular(path, LARGEST + LONGEST_HEADER) as file:
                content = np.empty(os.fstat(file.fileno()).st_size, dtype=np.uint8)
                whole = cast(BufferedReader, file).readinto(content.data) == len(content)
        except FileNotFoundError:
            return None
        except UnreadableError:
            whole = False
        except OSError:
            return None
        self.lock_file = self.lock_file or self._open_lock_file()
        value = value_of(content, key) if whole else None
        if value is None:
            with suppress(OSError):
                path.unlink()
        return value

    def put(self, key: str, value: Tensor) -> bool:
        """Store a value if there is room, and return True if it is stored. Raise no error: the value can be computed again."""
        if self.full or key in self:
            return key in self
        self.lock_file = self.lock_file or self._open_lock_file()
        content = content_of(key, value)
        if self.full:
            return False
        try:
            if not self._has_room(len(content)):
                return self._stop(f"it has reached its limit of {self.limit / 1e9:.1f} GB")
            write_whole(self._path(key), content, synced=False)
        except OSError as error:
            return self._stop("the disk is full" if error.errno in FULL else os_error_reason(error))
        self.used, self.uncounted = self.used + len(content), self.uncounted + len(content)
        return True

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"lock_file": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def _kind_json(self) -> str:
        return json.dumps(self.kind, sort_keys=True, indent=1)

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a valid key: expected two hex digits, then at most 120 of 0-9 a-z _ -")
        return self.values / key[:2] / f"{key}.safetensors"

    def _open_lock_file(self) -> BinaryIO | None:
        """Open kind.json, and keep it locked while this object exists. Other processes do not remove a locked kind."""
        path = self.values / "kind.json"
        try:
            while True:
                self.values.mkdir(parents=True, exist_ok=True)
                file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "r+b")
                _flock(file, exclusive=False)
                if path.is_file() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
                file.close()  # another process has removed the file meanwhile
            file.write(self._kind_json.encode())  # the old content is the same, unless a power failure truncated it
            file.truncate()
            file.flush()
            os.utime(path)
        except OSError as error:
            self._stop("the disk is full" if error.errno in FULL else os_error_reason(error))
            return None
        return file

    # ---- room

    def _has_room(self, size: int) -> bool:
        """Return True if `size` more bytes are within the limit. Remove other kinds if necessary."""
        if self.used < 0 or self.used + size > self.limit or self.uncounted > self.limit / RECOUNTS:
            self._count()
            for kind in self._kinds():
                if self.used + size > self.limit and kind != self.values:
                    _clear(kind)
                    self._count()  # other processes remove kinds too
        return self.used + size <= self.limit

    def _count(self) -> None:
        """Count the bytes of all kinds. Delete kinds whose removal was interrupted."""
        for path in self.root.glob(".*.tmp"):  # a kind whose removal was interrupted
            if BEING_REMOVED.fullmatch(path.name) and _modification_time(path) < time() - ABANDONED:
                remove(path)
        self.used, self.uncounted = sum(map(bytes_in, self._kinds())), 0

    def _kinds(self) -> list[Path]:
        """Return the folders of all kinds, the longest unused first. Other files in the root are ignored."""
        folders = [path for path in self.root.iterdir() if KIND.fullmatch(path.name) and (path / "kind.json").is_file()]
        return sorted(folders, key=lambda path: _modification_time(path / "kind.json"))

    def _stop(self, reason: str) -> bool:
        """Store nothing more, print the reason, and return False."""
        self.full = reason
        message = (
            f"warning: nothing more is cached in {self.root}: {reason}; values that are not in the cache are computed each time"
        )
        tqdm.write(printable(message))
        return False


def content_of(key: str, value: Tensor) -> bytes:
    """Return a value as a safetensors file with its key and checksum. Raise ValueError for an unsupported dtype or size."""
    value = value.detach().cpu().contiguous()
    if value.dtype not in DTYPES.values() or not 0 < value.nbytes <= LARGEST:
        raise ValueError(f"a {value.dtype} of {value.nbytes:,} bytes cannot be cached")
    metadata = {"key": key, "sum": checksum(value.reshape(-1).view(torch.uint8).numpy())}
    return save({"value": value}, metadata)


def value_of(content: NDArray[np.uint8], key: str) -> Tensor | None:
    """Return the value in a file's content without a copy, or None if the file is damaged or has another key."""
    try:
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        if start > 8 + LONGEST_HEADER or start % 8:
            return None
        header = parsed(content[8:start].tobytes().decode())
        metadata, entry, data = header["__metadata__"], header["value"], content[start:]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        size = math.prod(shape) * dtype.itemsize if all(type(side) is int and side > 0 for side in shape) else -1
        if metadata == {"key": key, "sum": checksum(data)} and entry["data_offsets"] == [0, size] and size == len(data):
            return torch.frombuffer(content, dtype=dtype, offset=start).view(shape)
    except (ValueError, KeyError, TypeError, RuntimeError):  # an invalid header
        return None
    return None


def checksum(data: NDArray[np.uint8]) -> str:
    """Return one CRC-32 over the sums of the complete pages, followed by the bytes after them.

    It detects changed bits and swapped pages.
    """
    end = len(data) // PAGE * PAGE  # the end of the last complete page
    pages = np.frombuffer(data, dtype=np.uint64, count=end // 8).reshape(-1, PAGE // 8)
    return f"{crc32(data[end:].tobytes(), crc32(pages.sum(1).tobytes())):08x}"


def bytes_in(folder: Path) -> int:
    """Return the bytes of the files in a kind's folder. Delete old temporary files."""
    total = 0
    for entry in _files(str(folder)):
        with suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".tmp") and status.st_mtime < time() - ABANDONED:
                Path(entry.path).unlink()
            else:
                total += status.st_size
    return total


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    """Yield the files of a folder and its subfolders."""
    with suppress(OSError), os.scandir(folder) as entries:  # another process may have removed the folder
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                yield entry


def _clear(kind: Path) -> None:
    """Remove a kind unless a process has it open. Rename it under a lock, so that no process can open it meanwhile."""
    with suppress(OSError):  # already removed
        with (kind / "kind.json").open("rb") as file:
            unused = _flock(file, exclusive=True)
            if unused and fcntl is not None:
                remove(kind)
        if fcntl is None:  # Windows does not rename a folder that contains an open file
            remove(kind)


def _flock(file: BinaryIO, exclusive: bool) -> bool:
    """Lock a file by flock, and return True if that succeeds. Also return True on a file system without locks.

    Forked workers share this lock, unlike the lock of `runtime.lock`.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX | fcntl.LOCK_NB) if exclusive else fcntl.LOCK_SH)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
    return True


def _modification_time(path: Path) -> float:
    """Return the time of the last change, or infinity if the file does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


# ---------------------------------------------------------------- images


def image_digest(path: Path) -> str:
    """Return the SHA-256 of a file, 32 hex digits. Read the file once per process, unless its size or time changes.

    Raise ImageError if it cannot be read.
    """
    try:
        status = path.stat()
        return _digest(path, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        raise ImageError(printable(missing_file(path))) from None
    except UnreadableError as error:
        raise ImageError(printable(f"{path} is not a usable image: {error}")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise ImageError(
            printable(f"{path} cannot be read ({os_error_reason(error) if isinstance(error, OSError) else error})")
        ) from None


@lru_cache(maxsize=DIGESTS)
def _digest(path: Path, size: int, time_ns: int) -> str:  # noqa: ARG001
    with open_regular(path, LARGEST_FILE) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()[:32]
