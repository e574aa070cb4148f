"""Tensors on a disk that cost more to compute than to read: decoded pictures, what a frozen ViT makes of them."""

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
from lora_blip.runtime.untrusted import UnreadableError, open_regular, parsed, printable, why

try:
    import fcntl
except ImportError:  # Windows, where a folder with an open file in it cannot be renamed, which is as good
    fcntl = None  # type: ignore[assignment]

KIND = re.compile(r"[0-9a-f]{16}")  # the name of a kind's folder
DOOMED = re.compile(r"\.[0-9a-f]{16}\.[0-9]+\.[0-9a-f]{8}\.tmp")  # the same, once it is being taken away
KEY = re.compile(r"[0-9a-f]{2}[0-9a-z_-]{0,120}")
DTYPES = {"U8": torch.uint8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}
LARGEST = 2**28  # bytes of a value; the pictures and states of a ViT have one million
LONGEST_HEADER = 4096
PAGE = 4096
ABANDONED = 3600  # seconds after which a file that was never finished is nobody's
RECOUNTS = 50  # times that a folder is counted while it fills: others write into it too
DIGESTS = 2**20  # images whose digest is remembered, at some 300 bytes each


class Store:
    """Values by key, in a folder of their own for each `kind`: all that a value depends on beside the image, in JSON.

    `limit` bounds the bytes of all kinds together. Where it is reached, kinds that no process has open make room, the
    longest unused first; then nothing more is taken, since to throw away what the next epoch reads would help nobody.
    Any number of processes may read and write at once, and die at it. Nothing is made before there is something to keep.
    """

    def __init__(self, folder: Path, kind: dict[str, Any], limit: int) -> None:
        self.root, self.kind, self.limit = Path(folder), kind, limit
        self.values = self.root / hashlib.sha256(self._about.encode()).hexdigest()[:16]
        self.full = ""  # why nothing more is taken
        self.used = -1  # bytes of all kinds; -1: not counted yet, which a store that is only read from never needs
        self.uncounted = 0  # bytes of them that were written since
        self.held: BinaryIO | None = None

    def get(self, key: str) -> Tensor | None:
        """A value as it was put; None if there is none. One that is damaged is taken away."""
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
        self.held = self.held or self._hold()
        value = value_of(content, key) if whole else None
        if value is None:
            with suppress(OSError):
                path.unlink()
        return value

    def put(self, key: str, value: Tensor) -> bool:
        """Keep a value, if there is room; whether it is kept now. Never an error: what is not kept is computed again."""
        if self.full or key in self:
            return key in self
        self.held = self.held or self._hold()
        content = content_of(key, value)
        if self.full:
            return False
        if not self._has_room(len(content)):
            return self._stop(f"it has reached its limit of {self.limit / 1e9:.1f} GB")
        try:
            write_whole(self._path(key), content, synced=False)
        except OSError as error:
            return self._stop("the disk is full" if error.errno in FULL else why(error))
        self.used, self.uncounted = self.used + len(content), self.uncounted + len(content)
        return True

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def _about(self) -> str:
        return json.dumps(self.kind, sort_keys=True, indent=1)

    def _path(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key: two hex digits, then at most 120 of 0-9 a-z _ -")
        return self.values / key[:2] / f"{key}.safetensors"

    def _hold(self) -> BinaryIO | None:
        """kind.json, open and locked for as long as this object lives: who makes room sees that the kind is in use."""
        path = self.values / "kind.json"
        try:
            while True:
                self.values.mkdir(parents=True, exist_ok=True)
                file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644), "r+b")
                _lock(file, alone=False)
                if path.is_file() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    break
                file.close()  # another process made room in between
            file.write(self._about.encode())  # over what is there, which is the same, or was cut off by a power cut
            file.truncate()
            file.flush()
            os.utime(path)
        except OSError as error:
            self._stop("the disk is full" if error.errno in FULL else why(error))
            return None
        return file

    # ---- room

    def _has_room(self, size: int) -> bool:
        """Whether `size` bytes more stay within the limit, after other kinds have made room."""
        if self.used < 0 or self.used + size > self.limit or self.uncounted > self.limit / RECOUNTS:
            self._count()
            for kind in self._kinds():
                if self.used + size > self.limit and kind != self.values:
                    _clear(kind)
                    self._count()  # others clear as well
        return self.used + size <= self.limit

    def _count(self) -> None:
        for path in self.root.glob(".*.tmp"):  # a kind that a process which died was about to take away
            if DOOMED.fullmatch(path.name) and _when(path) < time() - ABANDONED:
                remove(path)
        self.used, self.uncounted = sum(map(bytes_in, self._kinds())), 0

    def _kinds(self) -> list[Path]:
        """The folders of all kinds, the longest unused first. What else lies in the root is not ours."""
        found = [path for path in self.root.iterdir() if KIND.fullmatch(path.name) and (path / "kind.json").is_file()]
        return sorted(found, key=lambda path: _when(path / "kind.json"))

    def _stop(self, reason: str) -> bool:
        """Take nothing more, and say so once."""
        self.full = reason
        message = f"warning: nothing more is kept in {self.root}: {reason}; what is not there is computed each time"
        tqdm.write(printable(message))
        return False


def content_of(key: str, value: Tensor) -> bytes:
    """The file of a value: safetensors, with its key and a checksum in the header. ValueError for what cannot be kept."""
    value = value.detach().cpu().contiguous()
    if value.dtype not in DTYPES.values() or not 0 < value.nbytes <= LARGEST:
        raise ValueError(f"a {value.dtype} of {value.nbytes:,} bytes cannot be kept")
    told = {"key": key, "sum": checksum(value.reshape(-1).view(torch.uint8).numpy())}
    return save({"value": value}, told)


def value_of(content: NDArray[np.uint8], key: str) -> Tensor | None:
    """The value in a file's content, over the same memory; None unless it is whole, and of this key."""
    try:
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        if start > 8 + LONGEST_HEADER or start % 8:
            return None
        header = parsed(content[8:start].tobytes().decode())
        told, entry, data = header["__metadata__"], header["value"], content[start:]
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        size = math.prod(shape) * dtype.itemsize if all(type(side) is int and side > 0 for side in shape) else -1
        if told == {"key": key, "sum": checksum(data)} and entry["data_offsets"] == [0, size] and size == len(data):
            return torch.frombuffer(content, dtype=dtype, offset=start).view(shape)
    except (ValueError, KeyError, TypeError, RuntimeError):  # whatever a stranger's header makes of it
        return None
    return None


def checksum(data: NDArray[np.uint8]) -> str:
    """CRC-32 of the sums of its pages and of its tail: sees a bit, a page of zeros or two exchanged, at 20 GB/s."""
    whole = len(data) // PAGE * PAGE
    pages = np.frombuffer(data, dtype=np.uint64, count=whole // 8).reshape(-1, PAGE // 8)
    return f"{crc32(data[whole:].tobytes(), crc32(pages.sum(1).tobytes())):08x}"


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a kind's folder; those that were never finished are taken away when they are old."""
    total = 0
    for entry in _files(str(folder)):
        with suppress(OSError):
            about = entry.stat(follow_symlinks=False)
            if entry.name.endswith(".tmp") and about.st_mtime < time() - ABANDONED:
                Path(entry.path).unlink()
            else:
                total += about.st_size
    return total


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    with suppress(OSError), os.scandir(folder) as entries:  # gone in between: another process made room
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path)
            else:
                yield entry


def _clear(kind: Path) -> None:
    """Take a kind away unless a process has it open. None opens it meanwhile: it is renamed under the lock."""
    with suppress(OSError):  # gone already
        with (kind / "kind.json").open("rb") as file:
            unused = _lock(file, alone=True)
            if unused and fcntl is not None:
                remove(kind)
        if fcntl is None:  # Windows renames no folder that has an open file in it
            remove(kind)


def _lock(file: BinaryIO, alone: bool) -> bool:
    """flock's lock, which forked workers share; a file system without locks stops nobody."""
    if fcntl is not None:
        try:
            fcntl.flock(file, (fcntl.LOCK_EX | fcntl.LOCK_NB) if alone else fcntl.LOCK_SH)
        except OSError as error:
            return not isinstance(error, BlockingIOError)
    return True


def _when(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return math.inf


# ---------------------------------------------------------------- images


def image_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, 32 hex digits. While its size and time stay as they are, it is read once a process.

    Raises ImageError when it cannot be read.
    """
    try:
        about = path.stat()
        return _digest(path, about.st_size, about.st_mtime_ns)
    except FileNotFoundError:
        raise ImageError(printable(f"{path} does not exist")) from None
    except UnreadableError as error:
        raise ImageError(printable(f"{path} is no image: {error}")) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise ImageError(printable(f"{path} cannot be read ({why(error) if isinstance(error, OSError) else error})")) from None


@lru_cache(maxsize=DIGESTS)
def _digest(path: Path, size: int, time_ns: int) -> str:  # noqa: ARG001
    with open_regular(path, LARGEST_FILE) as file:
        return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()[:32]
