"""Read images in tar shards, as WebDataset writes them. Listing a shard reads only its headers."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from lora_blip.data.example import Example
from lora_blip.data.image_folders import count_other, missing
from lora_blip.data.images import HEAD, LARGEST_FILE, is_picture, open_image
from lora_blip.errors import ImageError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import open_regular, os_error_reason, printable, quoted, shorten

BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
EXTENSIONS = (b"x", b"g", b"X", b"L", b"K")  # types of extra headers before a member: PAX, Solaris, GNU's long names
LONGEST_HEADER = 2**20  # largest number of bytes of an extra header
LONG_NUMBER = re.compile(rb"\d{200}")  # a number with too many digits
PADDING = 2**20  # largest number of bytes of zeros after the end of an archive; most programs write less than 10 KB


@dataclass(frozen=True, slots=True)
class ShardImage(Example):
    """An image in a shard: `size` bytes, starting at `offset`."""

    shard: str = ""
    offset: int = 0
    size: int = 0


class StrictTarInfo(tarfile.TarInfo):
    """A tar header that raises ReadError if it is damaged. tarfile treats such a header as the end, and drops later images."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "StrictTarInfo":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the blocks of zeros at the end of an archive
                raise
            raise tarfile.ReadError("its end is missing" if not buf else str(error)) from None

    def _proc_member(self, archive: Any) -> Any:
        """Raise ReadError for a header that could fill the memory, or take hours in Python < 3.11.10, which parses slowly."""
        if self.type in EXTENSIONS:
            start = archive.fileobj.tell()
            is_valid = 0 <= self.size <= LONGEST_HEADER and not LONG_NUMBER.search(archive.fileobj.read(self.size))
            archive.fileobj.seek(start)
            if not is_valid:
                raise tarfile.ReadError(f"a header in it has {self.size:,} bytes, which no program writes")
        return super()._proc_member(archive)  # type: ignore[misc]


def images_in_shard(shard: str, others: Counter[str]) -> Iterator[Example]:
    """Yield the images of a tar file in their order in it, named `shard.tar/000123.jpg`. Count other files in `others`.

    If the shard is damaged, the last item is a MissingImage whose reason names the last good member.
    """
    last = ""
    try:
        with (
            open_regular(shard) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo, encoding="utf-8", errors="surrogateescape") as archive,
        ):
            size = os.fstat(file.fileno()).st_size
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > size):
                    raise tarfile.ReadError(f"{quoted(info.name)} is cut off")
                if not info.isdir():
                    name = info.name.rpartition("/")[2]
                    if is_picture(name, partial(_first_bytes, file, info)):
                        yield _shard_image(shard, info)
                    else:
                        count_other(name, others)
                last = info.name
            _refuse_rest(archive, file)
    except Exception as error:  # a broken header can raise any error
        reason = os_error_reason(error) if isinstance(error, OSError) else shorten(str(error))
        yield missing(shard, f"{shard} cannot be read {f'after {quoted(last)}' if last else 'as a tar archive'} ({reason})")


def _first_bytes(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    """Return the first bytes of a member. Moving the position of `file` does not disturb tarfile."""
    if not info.isreg() or info.issparse():
        return b""
    file.seek(info.offset_data)
    return file.read(min(HEAD, info.size))


def _shard_image(shard: str, info: tarfile.TarInfo) -> Example:
    """Return the ShardImage of a member, or a MissingImage if it is a link or a sparse file."""
    name = f"{shard}/{info.name}"
    if not info.isreg() or info.issparse():
        return missing(name, f"{name} is a link or a sparse file; pack the shard again with plain files")
    return ShardImage(Path(name), "", name, 0, shard=shard, offset=info.offset_data, size=info.size)


def _refuse_rest(archive: tarfile.TarFile, file: BinaryIO) -> None:
    """Raise ReadError if data follows the end of the archive: another archive, or the rest of a download with a gap."""
    file.seek(archive.offset)
    rest = file.read(PADDING + 1)
    if len(rest) > PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError("data follows its end: download it again, or give joined archives as separate files")


def open_shard_image(member: ShardImage) -> Image.Image:
    """Return the decoded image. Raise ImageError as `open_image` does."""
    if not 0 < member.size <= LARGEST_FILE:
        reason = f"it has {counted(member.size, 'byte')}, more than {LARGEST_FILE:,}" if member.size else "it is empty"
        raise ImageError(printable(f"{member.image} is not a usable image: {reason}"))
    try:
        with open_regular(member.shard) as shard:
            shard.seek(member.offset)
            content = shard.read(member.size)
    except OSError as error:
        raise ImageError(printable(f"{member.image} cannot be read ({os_error_reason(error)})")) from None
    return open_image(member.image, BytesIO(content))


def expanded(pattern: str) -> Iterator[str]:
    """Expand braces: `a{0..2}.tar` → a0.tar, a1.tar, a2.tar; `{x,y}.tar` → x.tar, y.tar. Keep leading zeros."""
    match = BRACES.search(pattern)
    if not match:
        yield pattern
        return
    numbers = NUMBERS.fullmatch(match[1])
    width = len(numbers[1]) if numbers else 0
    parts = (
        (f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1))
        if numbers
        else iter(match[1].split(","))
    )
    for part in parts:
        yield from expanded(f"{pattern[: match.start()]}{part}{pattern[match.end() :]}")
