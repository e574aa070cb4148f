"""Where images are: a folder, a glob, a list or tar shards, gone through one by one in an order that does not change."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from lora_blip.data.annotations import plain
from lora_blip.data.example import Example
from lora_blip.data.formats import IMAGE_KEYS, TOO_LONG, as_text, jsonl_entries, numbered_lines
from lora_blip.data.images import HEAD, LARGEST_FILE, SUFFIXES, is_picture, open_image
from lora_blip.errors import ImageError
from lora_blip.runtime.untrusted import cut, open_regular, printable, quoted, why

SHARD = ".tar"
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBERS = re.compile(r"(\d+)\.\.(\d+)")
MOST_LISTED, MOST_KINDS = 8, 100  # kinds of files that are no images: printed, and counted apart
EXTENSIONS = (b"x", b"g", b"X", b"L", b"K")  # types of headers before a member's own: PAX, Solaris, long names of GNU
LONGEST_HEADER, LONG_NUMBER = 2**20, re.compile(rb"\d{200}")  # bytes of a name or of attributes; digits in a row
PADDING = 2**20  # bytes that may follow the end of a tar, if they are empty; most programs write less than 10 KB


@dataclass(frozen=True, slots=True)
class Member(Example):
    """An image in a shard: `size` bytes of it from `offset` on."""

    shard: str = ""
    offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True)
class Missing(Example):
    """Stands where images should be and nothing can be read: in a shard that is cut off, a folder that is closed."""

    reason: str = ""


class Images:
    """The images that a setting names, each an example without text, as often as they are gone through; none is kept.

    A folder with its subfolders; a glob; a list, .txt with a path a line or .jsonl with the key "image", relative to
    the list; tar shards as WebDataset has them: a file, a folder of them, or a pattern such as
    'shards/{0000..0031}.tar'. What is an image is decided by `images.is_picture`; `others` are the files beside them,
    counted by suffix, after all images were gone through. Raises ImageError when there is no image.
    """

    def __init__(self, where: str | Path) -> None:
        self.where = str(where)
        self.others: Counter[str] = Counter()
        problem = ""
        for example in self:
            if not isinstance(example, Missing):
                return
            problem = problem or f" ({example.reason})"
        problem = problem or f" ({self.others_line()})" * bool(self.others)
        raise ImageError(
            f"no image found at {self.where!r}{printable(problem)}; give a file, a folder, a glob such as 'photos/*.jpg', a "
            "list (.txt, .jsonl) or shards such as 'shards/{0000..0031}.tar'"
        )

    def __iter__(self) -> Iterator[Example]:
        others: Counter[str] = Counter()
        yield from self._every(others)
        self.others = others

    def _every(self, others: Counter[str]) -> Iterator[Example]:
        path = Path(self.where)
        if path.is_dir():
            return in_folder(path, others)
        if path.is_file():
            return LISTS.get(path.suffix.lower(), in_file)(path, others)
        if BRACES.search(self.where) and path.suffix == SHARD:
            return chain.from_iterable(members(shard, others) for shard in expanded(self.where))
        return in_glob(self.where, others)

    def others_line(self) -> str:
        """How many files are no images, by suffix; "" if there are none."""
        if not self.others:
            return ""
        kinds = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        some = [f"{count:,} {quoted(kind)[1:-1]}" for kind, count in kinds[:MOST_LISTED]]
        some += ["…"] * (len(self.others) > MOST_LISTED)
        return f"not images, left out: {self.others.total():,} file(s) ({', '.join(some)})"


def example_of(image: str | Path, question: str = "") -> Example:
    return Example(Path(image), "", str(image), 0, question=question)


def open_picture(example: Example) -> Image.Image:
    """The picture of an example, wherever it lies. Raises ImageError as `open_image` does."""
    if isinstance(example, Missing):
        raise ImageError(printable(example.reason))
    return _unpacked(example) if isinstance(example, Member) else open_image(example.image)


def place_of(example: Example) -> Any:
    """Equal for two examples of one picture."""
    return (example.shard, example.offset) if isinstance(example, Member) else example.image


# ---------------------------------------------------------------- files, folders, globs


def in_file(path: str | Path, others: Counter[str]) -> Iterator[Example]:
    """The image that the file is, or those of a shard."""
    return members(str(path), others) if str(path).endswith(SHARD) else iter((example_of(path),))


def in_glob(pattern: str, others: Counter[str]) -> Iterator[Example]:
    """The images and shards that match."""
    for path in globbed(pattern):
        if path.endswith(SHARD) or is_picture(Path(path).name, partial(_head, path)):
            yield from in_file(path, others)
        else:
            _count(Path(path).name, others)


def in_folder(folder: Path, others: Counter[str]) -> Iterator[Example]:
    """The images of a folder and its subfolders, or of its shards if there is nothing else to look at in it."""
    try:
        images, shards, folders, rest = _names(str(folder))
    except OSError:
        return walked(str(folder), others)  # which says why
    if shards and not images and not folders:
        others.update(rest)
        return chain.from_iterable(members(str(folder / name), others) for name in shards)
    return walked(str(folder), others)


def walked(folder: str, others: Counter[str]) -> Iterator[Example]:
    """Image files by name, folder within folder. A link to a folder is not followed: it may lead in a circle."""
    below = [_entries(folder, others)]
    while below:
        entry = next(below[-1], None)
        if entry is None:
            below.pop()
        elif isinstance(entry, Example):
            yield entry
        else:
            below.append(_entries(entry, others))


def _entries(folder: str, others: Counter[str]) -> Iterator[Example | str]:
    """The images of one folder and the paths of its subfolders, by name."""
    try:
        images, shards, folders, rest = _names(folder)
    except OSError as error:
        yield missing(folder, f"{folder} cannot be listed ({why(error)})")
        return
    others.update(rest + Counter({SHARD: len(shards)}))
    inner = set(folders)
    for name in sorted(images + folders):
        path = str(Path(folder) / name)
        yield path if name in inner else example_of(path)


def _names(folder: str) -> tuple[list[str], list[str], list[str], Counter[str]]:
    """Image files, shards and subfolders; of the rest, how many there are of each suffix."""
    others: Counter[str] = Counter()
    images: list[str] = []
    shards: list[str] = []
    folders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            dot = entry.name.rfind(".")  # a Path for each of a million names would take seconds
            suffix = entry.name[dot:].lower() if dot > 0 else ""
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.is_dir():
                others["links to folders"] += 1
            elif suffix == SHARD:
                shards.append(entry.name)
            elif (suffix in SUFFIXES and entry.name[0] != ".") or is_picture(entry.name, partial(_head, entry.path)):
                images.append(entry.name)
            else:
                _count(entry.name, others)
    return images, sorted(shards), folders, others


def _head(path: str) -> bytes:
    """The first bytes of a file, none of one that cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(HEAD)
    except OSError:
        return b""


def _count(name: str, others: Counter[str]) -> None:
    """One more file that is no image."""
    kind = "hidden" if name.startswith(".") else Path(name).suffix.lower() or "without a suffix"
    others[kind if kind in others or len(others) < MOST_KINDS else "of other kinds"] += 1


def globbed(pattern: str) -> list[str]:
    """The files that match, in the order of a walk. Raises ImageError for what is no glob."""
    path = Path(pattern)
    root = Path(path.anchor) if path.is_absolute() else Path()
    try:
        found = [str(p) for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file()]
    except ValueError as error:
        raise ImageError(
            printable(f"{pattern!r} is no glob ({error}); give a file, a folder or one such as 'photos/*.jpg'")
        ) from None
    return sorted(found, key=lambda name: name.replace(os.sep, "\0"))


def missing(name: str | Path, reason: str) -> Missing:
    return Missing(Path(name), "", str(name), 0, reason=reason)


# ---------------------------------------------------------------- lists


def in_text(path: Path, others: Counter[str]) -> Iterator[Example]:
    """A path a line, relative to the list's folder."""
    for number, line in numbered_lines(path):
        if line is None:
            yield missing(f"{path}:{number}", f"{path}:{number}: {TOO_LONG}")
        else:
            yield from in_file(path.parent / line.strip(), others)


def in_jsonl(path: Path, others: Counter[str]) -> Iterator[Example]:
    """A JSON object a line, whose key "image" is a path relative to the list's folder; it may have a "prompt"."""
    for number, entry in jsonl_entries(path):
        found = entry if isinstance(entry, str) else next((entry[key] for key in IMAGE_KEYS if key in entry), None)
        if isinstance(entry, str) or not isinstance(found, str) or not found.strip():
            reason = entry if isinstance(entry, str) else f"no image: expected one of the keys {', '.join(IMAGE_KEYS)}"
            yield missing(f"{path}:{number}", f"{path}:{number}: {reason}")
        else:
            prompt = plain(as_text(entry.get("prompt")) or "")
            some = in_file(path.parent / found, others)
            yield from (replace(example, prompt=prompt) for example in some) if prompt else some


LISTS: dict[str, Callable[[Path, Counter[str]], Iterator[Example]]] = {".txt": in_text, ".jsonl": in_jsonl}


# ---------------------------------------------------------------- shards


class Strict(tarfile.TarInfo):
    """Headers that are broken are errors: tarfile takes one for the archive's end, and all images behind it were lost."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Strict":
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the block of zeros that every archive ends with
                raise
            raise tarfile.ReadError("its end is not there" if not buf else str(error)) from None

    def _proc_member(self, archive: Any) -> Any:
        """Refuse headers that fill the memory, or take hours: before Python 3.11.10, the square of a number's digits."""
        if self.type in EXTENSIONS:
            place = archive.fileobj.tell()
            sound = 0 <= self.size <= LONGEST_HEADER and not LONG_NUMBER.search(archive.fileobj.read(self.size))
            archive.fileobj.seek(place)
            if not sound:
                raise tarfile.ReadError(f"a header of {self.size:,} bytes that no program writes")
        return super()._proc_member(archive)  # type: ignore[misc]


def members(shard: str, others: Counter[str]) -> Iterator[Example]:
    """The images of a tar file, in its order, by name `shard.tar/000123.jpg`; what else is in it is counted.

    Only headers are read here. A shard that is damaged ends in a Missing that says where, and is not silently shorter.
    """
    last = ""
    try:
        with (
            open_regular(shard) as file,
            tarfile.open(fileobj=file, mode="r:", tarinfo=Strict, encoding="utf-8", errors="surrogateescape") as archive,
        ):
            size = os.fstat(file.fileno()).st_size
            while (info := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # which it would keep all of
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > size):
                    raise tarfile.ReadError(f"{quoted(info.name)} is cut off")
                if not info.isdir():
                    name = info.name.rpartition("/")[2]
                    if is_picture(name, partial(_head_of_member, file, info)):
                        yield _member(shard, info)
                    else:
                        _count(name, others)
                last = info.name
            _refuse_rest(archive, file)
    except Exception as error:  # of whatever kind a broken header makes it
        told = why(error) if isinstance(error, OSError) else cut(str(error))
        yield missing(shard, f"{shard} cannot be read {f'beyond {quoted(last)}' if last else 'as a tar archive'} ({told})")


def _head_of_member(file: BinaryIO, info: tarfile.TarInfo) -> bytes:
    """The first bytes of a file in an archive. tarfile finds its next header wherever `file` is."""
    if not info.isreg() or info.issparse():
        return b""
    file.seek(info.offset_data)
    return file.read(min(HEAD, info.size))


def _member(shard: str, info: tarfile.TarInfo) -> Example:
    name = f"{shard}/{info.name}"
    if not info.isreg() or info.issparse():
        return missing(name, f"{name} is a link, or a file with holes; pack the shard anew with plain files")
    return Member(Path(name), "", name, 0, shard=shard, offset=info.offset_data, size=info.size)


def _refuse_rest(archive: tarfile.TarFile, file: BinaryIO) -> None:
    """ReadError when there is more than padding behind the archive's end: another archive, or a download with a hole."""
    file.seek(archive.offset)
    rest = file.read(PADDING + 1)
    if len(rest) > PADDING or rest.strip(b"\0"):
        raise tarfile.ReadError("there is more behind its end: archives put together, or a hole in a download")


def _unpacked(member: Member) -> Image.Image:
    if not 0 < member.size <= LARGEST_FILE:
        told = f"it has {member.size:,} bytes, more than {LARGEST_FILE:,}" if member.size else "it is empty"
        raise ImageError(printable(f"{member.image} is no image: {told}"))
    try:
        with open_regular(member.shard) as shard:
            shard.seek(member.offset)
            content = shard.read(member.size)
    except OSError as error:
        raise ImageError(printable(f"{member.image} cannot be read ({why(error)})")) from None
    return open_image(member.image, BytesIO(content))


def expanded(pattern: str) -> Iterator[str]:
    """`a{0..2}.tar` → a0.tar, a1.tar, a2.tar; `{x,y}.tar` → x.tar, y.tar. Leading zeros are kept."""
    found = BRACES.search(pattern)
    if not found:
        yield pattern
        return
    numbers = NUMBERS.fullmatch(found[1])
    width = len(numbers[1]) if numbers else 0
    inside = (
        (f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1))
        if numbers
        else iter(found[1].split(","))
    )
    for part in inside:
        yield from expanded(f"{pattern[: found.start()]}{part}{pattern[found.end() :]}")
