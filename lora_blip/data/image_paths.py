"""Find the image file for a path that was written on another machine, or with backslashes, ~ or $HOME."""

import difflib
import filecmp
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from lora_blip.data.images import SUFFIXES
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import missing_file, quoted_for_shell
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.runtime.user_paths import TEXT_FILES, local_path, relative_if_below, similar_without_suffix

MOST_FILES = 2_000_000  # largest number of files of an image root that are listed
SUGGESTED = 20  # missing images whose messages suggest an existing name
SAMPLE = 64  # images whose paths are searched before the first step if CHECK_IMAGES is "lazy"
COMPARED = 5000  # largest number of existing names that a suggestion compares
# the end of a reason: several files match
SEVERAL = "; write its folder too. If all images are in one of these folders, set IMAGE_ROOT to it, such as --image-root "
SHOWN = 3  # largest number of candidates in a message
COCO_2014 = re.compile(r"^COCO_(train|val|test)\d{4}_(?=\d{12}\.)")  # COCO 2017 has the same photos without this prefix
UPLOADED = re.compile(r"^[0-9a-f]{8}-(?=.)")  # the prefix of an uploaded file in Label Studio
SUFFIX_AFTER_JPG = re.compile(r"(\.jpe?g)\.\d+$")  # Flickr8k's text file contains 2258277193_586949ec62.jpg.1
ABSOLUTE = re.compile(r"[/\\~$]|[A-Za-z]:[/\\]")
COMMON_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".JPG", ".PNG", ".JPEG")  # of an image that a table names without one
ZEROS = re.compile(r"(?<!\d)0+(?=\d)")  # the zeros before a number
SPLIT_FOLDERS = re.compile(r"(train|val|valid|validation|test|dev)(20\d\d)?", re.IGNORECASE)

Folders = tuple[str, ...]  # names of the folders of a file, from the outermost to the innermost


class ImageFinder:
    """Finds the images of a source under the folder `root`."""

    def __init__(self, root: Path, plain: Callable[[str], str] | None = None) -> None:
        """plain: returns the form of a name in which two names are compared; None: NFC, and if no file matches, any case."""
        self.root = root.absolute()
        self.plain = plain or _plain
        self.moved: dict[str, str] = {}  # path as written → its path under the root, if the two differ
        self.names: dict[str, list[Folders]] | None = None  # file name → folders under the root that contain it
        self.complete = True  # False if the root has more than MOST_FILES files
        # leading folders as written, and the folders under the root that replace them; all paths of a source must agree
        self.prefix: list[tuple[Folders, Folders]] = []
        self.by_name: dict[str, str] = {}  # name of a file that was found only by its name → path as written
        self.suggestions = 0
        self.any_case: ImageFinder | None = None
        if plain is None:
            self.any_case = ImageFinder(root, lambda name: _plain(name).casefold())
            # paths that are found in different ways must agree too
            self.any_case.prefix, self.any_case.by_name = self.prefix, self.by_name
            self.any_case.suggestions = SUGGESTED

    def find(self, written: str) -> tuple[str, str]:
        """Return (path, "") for a path that is written in a source, or ("", reason) if no file or several files match.

        If the path exists, return it. Otherwise compare it, from its end, with the paths of all files below the root, and
        return the file with the most equal parts at its end. An equal name alone is enough in three cases: (1) the written
        path has no folder; (2) the file is directly in the root, and no other file has this name; (3) it is of COCO 2014.
        """
        for path in self._spellings(written):
            if os.path.lexists(path):
                return path, ""
        path, reason = self._search(local_path(written))
        if not path and self.any_case:
            self.any_case.names = self.any_case.names or self._index_in_any_case()
            path, other_reason = self.any_case._search(local_path(written))
            reason = other_reason if SEVERAL in other_reason else reason
        if not path:
            return "", reason
        self.moved[written] = path
        return str(self.root / path), ""

    def _search(self, written: str) -> tuple[str, str]:
        """Return (path below the root, "") for a path that does not exist as it is written, or ("", reason)."""
        names = [name for name in re.split(r"[/\\]+", written) if name not in ("", ".")]
        folders = tuple(self.plain(name) for name in names[:-1] if not re.fullmatch("[A-Za-z]:", name))
        if not names or ".." in folders:
            return "", self._missing(written, ())
        fits, name = [], ""
        for name in _names_of(names[-1]):
            fits = self._best(name, folders, bool(ABSOLUTE.match(written)))
            if fits:
                break
        if len(fits) > 1:
            folder = quoted_for_shell(relative_if_below(self.root.joinpath(*fits[0])))
            several = f"{_listed(self._relative(name, fit) for fit in fits)}{SEVERAL}{folder}"
            return "", f"{quoted(written)} may be {several}"
        if not fits or not self._is_consistent(written, name, folders, fits[0]):
            return "", self._missing(written, folders)
        return self._relative(name, fits[0]), ""

    def describe(self) -> str:
        """Return a message about the paths that were found by their last parts, with an example, or "" if there are none."""
        if not self.moved:
            return ""
        written, path = next(iter(self.moved.items()))
        count = counted(len(self.moved), "image path", "were")
        return f"{count} found in {self.root} by the last parts: {quoted(written)} is {path}"

    def _spellings(self, written: str) -> Iterator[str]:
        """Yield the paths that a written path may mean: as it is, with slashes, and with ~ and variables expanded."""
        yield str(self.root / written)
        if (local := local_path(written)) != written:
            yield str(self.root / local)
        if "\\" in written:
            written = written.replace("\\", "/")
            yield str(self.root / written)
        if written.startswith("~") or "$" in written:
            yield str(self.root / os.path.expandvars(os.path.expanduser(written)))  # noqa: PTH111  # a bare ~x stays

    def _best(self, name: str, folders: Folders, absolute: bool) -> list[Folders]:
        """Return the folders of the files with this name that have the most parts in common with the end of `folders`.

        A file is left out if its other folders contradict `folders`, such as train/ and val/.
        """
        best = -1
        result: list[Folders] = []
        for candidate in self._index().get(self.plain(name), ()):
            count, replaced, rest = self._compared(folders, candidate)
            other_prefix = absolute and count > 0 and not _are_splits(replaced, rest)
            fits = not rest or not replaced or other_prefix or COCO_2014.match(name)
            if fits and count >= best:
                result = [*(result if count == best else []), candidate]
                best = count
        return result

    def _is_consistent(self, written: str, name: str, folders: Folders, candidate: Folders) -> bool:
        """Return False if this file contradicts the file of an earlier path of the source."""
        count, replaced, rest = self._compared(folders, candidate)
        if COCO_2014.match(name) or not replaced:
            return True
        if rest:
            pair = _folded(replaced), _folded(rest)
            self.prefix[:] = self.prefix or [pair]
            return self.prefix == [pair]
        unique = len(self._index()[self.plain(name)]) == 1
        return count > 0 or (unique and self.by_name.setdefault(name.casefold(), written) == written)

    def _compared(self, folders: Folders, candidate: Folders) -> tuple[int, Folders, Folders]:
        """Return the number of equal parts at the end of both, and the remaining parts of each.

        The root and the folders above it are compared too: C:/data/img/1.png is in the root /home/me/img.
        """
        under = tuple(map(self.plain, candidate))
        count = _common(folders, (*map(self.plain, self.root.parts), *under))
        return count, folders[: len(folders) - count], under[: max(len(under) - count, 0)]

    def _index(self) -> dict[str, list[Folders]]:
        """Return {file name: its folders under the root}. Hidden folders are not searched."""
        if self.names is None:
            self.names, count = {}, 0
            for folder, below, files in os.walk(self.root):
                below[:] = sorted(name for name in below if not name.startswith("."))
                parts = Path(folder).relative_to(self.root).parts
                for file in files:
                    self.names.setdefault(self.plain(file), []).append(parts)
                count += len(files)
                if count > MOST_FILES:
                    self.complete = False
                    break
        return self.names

    def _index_in_any_case(self) -> dict[str, list[Folders]]:
        """Return `_index` with the names in lower case."""
        result: dict[str, list[Folders]] = {}
        for name, places in self._index().items():
            result.setdefault(name.casefold(), []).extend(places)
        return result

    def _relative(self, name: str, folders: Folders) -> str:
        """Return the path of a file, relative to the root, with its name as the file system spells it."""
        plain, folder = self.plain(name), self.root.joinpath(*folders)
        if (name.isascii() and self.any_case) or (folder / name).exists():
            return "/".join((*folders, name))
        return "/".join((*folders, next(file for file in os.listdir(folder) if self.plain(file) == plain)))  # noqa: PTH208

    def _missing(self, written: str, folders: Folders) -> str:
        """Return the reason for a missing file. The first SUGGESTED reasons contain the nearest existing name."""
        message = missing_file(self.root / written)
        if not self.complete:
            message += f" (only the first {MOST_FILES:,} files of {self.root} were searched)"
        self.suggestions += 1
        if self.suggestions > SUGGESTED:
            return message
        name = self.plain(re.split(r"[/\\]", written)[-1])
        index = self._index()
        if name in index:
            others = _listed("/".join((*candidate, name)) for candidate in index[name])
            return f"{message}; another folder has a file of this name: {others}"
        images = [file for file in index if Path(file).suffix.lower() not in TEXT_FILES]
        same = [file for file in images if folders in index[file]] or images
        near = _nearest(name, same[:COMPARED])
        if not near:
            return message
        place = folders if folders in index[near] else index[near][0]
        return f"{message}; the nearest existing name is {quoted('/'.join((*place, near)))}"


def _folded(folders: Folders) -> Folders:
    return tuple(map(str.casefold, folders))


def _nearest(name: str, names: list[str]) -> str:
    """Return the name that differs only in the zeros before its numbers and in a missing suffix, or else the most similar one.

    A spreadsheet program makes 1 of 0001.jpg if the name is written without its suffix. Return "" if no name is similar.
    """
    forms = {ZEROS.sub("", each) for each in _names_of(name)}
    equal = (other for other in names if ZEROS.sub("", other) in forms)
    similar = (other for other in names if similar_without_suffix(name, other))
    return next(equal, "") or next(iter(difflib.get_close_matches(name, similar, 1, 0.4)), "")


def _names_of(name: str) -> Iterator[str]:
    """Yield a file name, its names in other releases of its data set, and, if it has no suffix, those with a common one."""
    yield from dict.fromkeys((name, COCO_2014.sub("", name), SUFFIX_AFTER_JPG.sub(r"\1", name), UPLOADED.sub("", name)))
    if Path(name).suffix.lower() not in SUFFIXES:
        yield from (name + suffix for suffix in COMMON_SUFFIXES)


def _are_splits(first: Folders, second: Folders) -> bool:
    """Return True if both paths end with a folder of a split, such as train/ and val/, whose images differ."""
    return bool(SPLIT_FOLDERS.fullmatch(first[-1]) and SPLIT_FOLDERS.fullmatch(second[-1])) if first and second else False


def _common(first: Folders, second: Folders) -> int:
    """Return the number of equal parts at the end of both."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _plain(name: str) -> str:
    """Return a name in Unicode form NFC, because macOS writes é as two characters."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _listed(paths: Iterator[str]) -> str:
    """Return the first paths as one text: a or b or c or 4 more."""
    some = list(paths)
    more = f" or {len(some) - SHOWN} more" if len(some) > SHOWN else ""
    return " or ".join(quoted(path) for path in some[:SHOWN]) + more


def used_root(source: Path, own_root: Path, image_root: str | Path, report: Callable[[str], object]) -> Path:
    """Return the folder of the images of a source: IMAGE_ROOT, or its own folder. Report if IMAGE_ROOT is not used.

    It is not used for a folder with captions, which contains their images. Images of another folder can have the same names.
    """
    if not image_root or not source.is_dir():
        return Path(image_root) if image_root else own_root
    if Path(image_root).resolve() != source.resolve():
        report(printable(f"{source}: IMAGE_ROOT is not used, because the images are in this folder"))
    return own_root


def same_names(root: Path, own_root: Path, written: Iterable[str]) -> str:
    """Return a warning if the first images are in IMAGE_ROOT and, with other content, also in the usual folder. Otherwise "".

    own_root: the folder of the images if IMAGE_ROOT were empty. written: their paths in the source. IMAGE_ROOT is often that
    of another file, whose images have the same names.
    """
    if own_root.resolve() == root.resolve():
        return ""
    pairs = [(root / name, own_root / name) for name in islice(written, SAMPLE) if not os.path.isabs(name)]  # noqa: PTH117
    try:
        if not pairs or any(filecmp.cmp(*pair) for pair in pairs):
            return ""
    except OSError:  # one of the files does not exist
        return ""
    return (
        f"WARNING: {own_root.absolute()} has images of the same names, and IMAGE_ROOT is used instead: {root.absolute()}. If "
        'the texts belong to the first ones, set IMAGE_ROOT = "" (--image-root "")'
    )


def moved_images(
    written: Iterable[tuple[str, str]], root: Path, all_of_them: bool, report: Callable[[str], object]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return {missing file: existing file} and {missing file: reason} for pairs (path as written, file).

    If `all_of_them` is False, only the first SAMPLE files are searched, and the others only if one of these has moved.
    report: called with a message about the number of moved images.
    """
    pairs, finder = iter(written), ImageFinder(root)
    results = _find_missing(islice(pairs, None if all_of_them else SAMPLE), finder)
    if any(path for path, _ in results.values()):
        results |= _find_missing(pairs, finder)
    if message := finder.describe():
        report(message)
    moved = {file: path for file, (path, _) in results.items() if path}
    return moved, {file: reason for file, (path, reason) in results.items() if not path}


def _find_missing(pairs: Iterable[tuple[str, str]], finder: ImageFinder) -> dict[str, tuple[str, str]]:
    """Return {file: result of `finder.find`} for the files that do not exist."""
    return {file: finder.find(name) for name, file in pairs if not os.path.lexists(file)}
