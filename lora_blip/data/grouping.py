"""Keep images that belong together in one part of a split: those of a group, such as a video, and those with equal bytes."""

import difflib
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_blip.data.entries import Located, Location, as_text
from lora_blip.errors import ConfigError, DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import sha256_of
from lora_blip.runtime.regex_limit import LimitedRegex
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import printable, quoted

FOLDER = "folder"
ENDS = 4096  # bytes at the start and at the end of a file; if they are equal, the whole files are compared
SHOWN = 12  # columns in a message
SECONDS = 60.0  # time limit for matching the regex against all paths together
Image = TypeVar("Image", bound=Hashable)
Link = tuple[Image, Hashable]  # an image, and the group or the bytes that it shares with others


class Groups:
    """Collects the group of each image by the setting `group_by`: "folder", a column, or a regex with parentheses."""

    def __init__(self, group_by: str) -> None:
        """Raise ConfigError if `group_by` is not a valid regex."""
        self.group_by = group_by.strip()
        try:
            self.pattern = LimitedRegex(self.group_by, SECONDS) if "(" in self.group_by else None
        except re.error as error:
            raise ConfigError(
                f'group_by = {group_by!r} is not a valid regex ({error}); for example, --group-by "(video\\d+)"'
            ) from None
        self.column = "" if self.pattern or self.group_by == FOLDER else self.group_by
        self.folders: dict[str, str] = {}  # folder → its real path: two lines may spell it differently
        self.links: list[tuple[Any, Hashable]] = []
        self.example = ""  # the first path, for the message
        self.columns: dict[str, None] = {}  # the columns of the first entry, for the message

    def add(self, image: Hashable, name: str, path: str | Path, entry: dict[str, Any] | None = None) -> None:
        """Store the group of an image, if it has one. name: its path as written. entry: its line, for a column."""
        self.example = self.example or name
        if self.pattern:
            match = self._search(self.pattern, name.replace("\\", "/"))
            group: Hashable = next(filter(None, match[1:]), match[0]) if match else None
        elif self.column:
            self.columns = self.columns or dict.fromkeys(entry or ())
            self._folder_of(path)  # for the message
            group = self.value_in(entry or {}) or None
        else:
            group = self._folder_of(path) if self.group_by else None
        if group is not None:
            self.links.append((image, ("group", group)))

    def value_in(self, entry: dict[str, Any]) -> str:
        """Return the value of the column in a line without the spaces around it, or ""."""
        return (as_text(entry.get(self.column_in(entry))) or "").strip()

    def column_in(self, entry: dict[str, Any]) -> str:
        """Return the column as a line spells it: the names of a table's columns are in lower case with underscores."""
        return self.column if self.column in entry else re.sub(r"[\s-]+", "_", self.column.lower())

    def _search(self, pattern: LimitedRegex, name: str) -> Sequence[str | None] | None:
        try:
            return pattern.search(name)
        except TimeoutError:
            raise ConfigError(
                f"group_by = {self.group_by!r}: the regex takes more than {SECONDS:g} s, at the path {quoted(name)}; change it "
                "so that it has no repetition inside a repetition, such as (a+)+ (--group-by)"
            ) from None

    def _folder_of(self, path: str | Path) -> str:
        folder = os.path.dirname(path)  # noqa: PTH120  # a str or a Path
        if folder not in self.folders:
            self.folders[folder] = os.path.realpath(folder)
        return self.folders[folder]

    def note_unused(self, reason: str) -> None:
        """Print that `group_by` has no effect, and why, if it is set. Call this for data that are not split at random."""
        if self.group_by:
            print(printable(f"group_by = {self.group_by!r} has no effect: {reason}"))

    def require_found(self) -> None:
        """Raise DataError if `group_by` is set and no image has a group."""
        if not self.group_by or self.links:
            return
        if self.pattern:
            example = f"such as {quoted(self.example)}"
            raise DataError(f"group_by = {self.group_by!r}: the regex matches no image path, {example}; change it (--group-by)")
        columns = ", ".join(quoted(column) for column in list(self.columns)[:SHOWN])
        near = difflib.get_close_matches(self.group_by.casefold(), {str(each).casefold() for each in self.columns}, 1)
        meant = next((str(each) for each in self.columns if [str(each).casefold()] == near), "")
        did = f"did you mean --group-by {quoted_for_shell(meant)}? Otherwise " if meant else ""
        by_folder = "the folders of the images (--group-by folder), " * (len(set(self.folders.values())) > 1)
        raise DataError(
            f"group_by = {self.group_by!r}: no line has a value in this column; the columns of the first line are {columns}; "
            f'{did}give one of them, {by_folder}or a regex of the path (--group-by "(video\\d+)"). For no groups: --group-by ""'
        )


def observed(
    entries: Callable[[], Iterator[Located]], columns: dict[Location, dict[str, Any]], groups: Groups
) -> Iterator[Located]:
    """Yield the entries. Store {location: {column: value}} in `columns`, for the column that gives the group of an entry."""
    for at, entry in entries():
        if groups.column and isinstance(entry, dict):
            groups.columns = groups.columns or dict.fromkeys(entry)
            columns[at] = {groups.column_in(entry): groups.value_in(entry)}
        yield at, entry


def components(images: Sequence[Image], links: Iterable[tuple[Image, Hashable]]) -> list[list[Image]]:
    """Return lists of images that share a group or their bytes, directly or through other images.

    The lists are in the order of their first images.
    """
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        while (above := parent.setdefault(node, node)) != node:
            parent[node] = node = parent[above]
        return node

    for image, link in links:
        parent[root(("image", image))] = root(link)
    result: dict[Hashable, list[Image]] = {}
    for image in images:
        result.setdefault(root(("image", image)), []).append(image)
    return list(result.values())


def equal_files(files: Iterable[tuple[Image, str | Path]]) -> list[tuple[Image, Hashable]]:
    """Return a link for each image whose file has the same bytes as another file. A file that cannot be read is left out.

    Only files of one size with equal ends are read as a whole.
    """
    groups: dict[Hashable, list[tuple[Image, str | Path]]] = {0: list(files)}
    for key_of in (lambda path: os.stat(path).st_size, _ends_of, lambda path: sha256_of(Path(path))):  # noqa: PTH116  # a str or a Path
        narrower: dict[Hashable, list[tuple[Image, str | Path]]] = defaultdict(list)
        for key, members in groups.items():
            for image, path in members if len(members) > 1 else ():
                try:
                    narrower[key, key_of(path)].append((image, path))
                except OSError:
                    continue
        groups = narrower
    return [(image, ("bytes", key)) for key, members in groups.items() if len(members) > 1 for image, _ in members]


def _ends_of(path: str | Path) -> bytes:
    """Return a digest of the first and the last bytes of a file."""
    with open(path, "rb") as file:  # noqa: PTH123
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(ENDS, os.fstat(file.fileno()).st_size - ENDS))
        digest.update(file.read(ENDS))
    return digest.digest()


def draw(groups: Sequence[list[Image]], size: int) -> tuple[list[Image], list[list[Image]]]:
    """Take groups in their order for a part of about `size` images. Return the images of the part, and the other groups.

    Take a group if the number of images is then closer to `size`. If no group is taken in this way, take the smallest.
    """
    taken: list[Image] = []
    rest: list[list[Image]] = []
    for group in groups:
        if len(taken) < size and abs(len(taken) + len(group) - size) < size - len(taken):
            taken += group
        else:
            rest.append(group)
    if not taken and size and rest:
        smallest = min(range(len(rest)), key=lambda index: len(rest[index]))
        taken = rest.pop(smallest)
    return taken, rest


def joined(
    images: Sequence[Image], links: list[tuple[Image, Hashable]], equal: list[tuple[Image, Hashable]], parts: int,
    report: Callable[[str], object] = print,
) -> list[list[Image]]:  # fmt: skip
    """Return the groups of images for a split into `parts` parts, and report their numbers.

    equal: links of images with equal bytes. They are ignored, with a message, if the groups would be fewer than the parts.
    """
    named = components(images, links)
    groups = components(images, [*links, *equal]) if equal else named
    if len(groups) < parts and equal:
        same = counted(len(equal), "image", "have")
        report(f"WARNING: {same} the same bytes as another one, and cannot all be in one part of the split")
        equal, groups = [], named
    if equal:
        report(f"{counted(len(equal), 'image', 'have')} the same bytes as another one; copies are in one part of the split")
    if links and (alone := len(set(images) - {image for image, _ in links})):
        ungrouped = f"{alone:,} of {counted(len(images), 'image', 'have')} no group (--group-by)"
        report(f"WARNING: {ungrouped}, so the split does not keep them with others")
    if links:
        report(f"the split keeps {counted(len(named), 'group')} of {counted(len(images), 'image')} together")
    return groups
