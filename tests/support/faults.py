"""System errors at a chosen call: the audit events of Python name each file that is opened, renamed, linked or removed."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WATCHED = (
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.listdir",
    "os.scandir", "os.utime", "shutil.copyfile",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True)
class Access:
    """One access to a file. Random and timed parts of the name are replaced, so that two runs can be compared."""

    event: str
    name: str
    writes: bool


@dataclass
class Watch:
    """Record the accesses below a folder. Raise OSError(number) at each access that equals `broken`."""

    folder: Path
    broken: Access | None = None
    number: int = errno.EROFS
    accesses: list[Access] = field(default_factory=list)
    raised: int = 0

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        path = args[0]
        if event not in WATCHED or not isinstance(path, str | bytes | os.PathLike):
            return
        text = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        if not text.startswith(f"{self.folder}{os.sep}"):
            return
        writes = event not in ("os.listdir", "os.scandir") and (event != "open" or bool((args[2] or 0) & WRITING))
        access = Access(event, steady(text.removeprefix(f"{self.folder}{os.sep}")), writes)
        self.accesses.append(access)
        if access == self.broken:
            self.raised += 1
            raise OSError(self.number, os.strerror(self.number), os.fsdecode(path))


def steady(name: str) -> str:
    """Return a path in which each part that contains a time or a random number is cut."""
    parts = []
    for part in Path(name).parts:
        is_temporary = part.startswith(".") and part.endswith(".tmp")
        core = part[1:].split(".tmp")[0].rsplit(".", 2)[0] if is_temporary else part
        core = "RUN" if core[:2] == "20" and "_" in core else "VALUE" if len(core) > 30 and core.isascii() else core
        parts.append(f".{core}.tmp" if is_temporary else core)
    return "/".join(parts)


_watches: list[Watch] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _watches and args:
        _watches[-1].note(event, args)


@contextmanager
def watched(folder: Path, broken: Access | None = None, number: int = errno.EROFS) -> Iterator[Watch]:
    """Watch the accesses below a folder inside the block, and break one of them."""
    if not hasattr(sys, "_lora_blip_watched"):
        sys.addaudithook(_hook)  # a hook cannot be removed; without a watch, it does nothing
        sys._lora_blip_watched = True  # type: ignore[attr-defined]
    watch = Watch(folder.resolve(), broken, number)
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)
