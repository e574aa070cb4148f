"""Find the files to read in a file, a list of files or a folder."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lora_blip.data import formats
from lora_blip.data.columns import key_flag, renamed
from lora_blip.data.conversions import converted, needs_conversion
from lora_blip.data.entries import SPLITS, Located
from lora_blip.data.formats import NO_KEYS, Keys
from lora_blip.data.image_folders import walk
from lora_blip.data.image_paths import used_root
from lora_blip.data.prepare import published
from lora_blip.data.prepare.detection import DOCUMENTS, LINES, TABLES, load
from lora_blip.data.prepare.folder_layouts import (
    META_CAP,
    captioned_entries,
    class_entries,
    files_in_split_folders,
    known_files,
    layout_of,
    lone_files,
    refuse_without_template,
)
from lora_blip.data.prepare.inline_images import LONGEST, unpacked
from lora_blip.data.prepare.packed import PACKED, packed_files, refuse_packed, split_of
from lora_blip.data.prepare.published import YEAR
from lora_blip.data.prepare.split_names import (
    as_one_value,
    likely_for_training,
    splits_of_files,
    splits_of_list,
    with_folder_splits,
    with_split,
    without_split,
)
from lora_blip.data.several_files import chosen
from lora_blip.data.several_texts import several
from lora_blip.data.summary import source_line
from lora_blip.data.tables import table_delimiter
from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell as quote
from lora_blip.runtime.user_paths import exists, paths_of, suggestion

USER_FORMATS = ("jsonl", "tsv", "csv", "xlsx", "folder")  # the user wrote the file and can fix it; other files are downloaded
PUBLISHED = ("vqa", "karpathy", "flickr8k", "flickr30k", "textcaps")  # data sets whose downloads may lack images
WITH_KEYS = ("jsonl", "json", "llava", "tsv", "csv", "xlsx", "parquet", "shard")  # the user can name their keys or columns
SHOWN = 5  # files in a message
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "|"}


@dataclass(frozen=True)
class Source:
    """A file or folder to read.

    entries: returns an iterator of (location, entry), or of (location, reason) for an invalid entry.
    split: the split that the file name contains, such as "val", or "".
    unpack: replaces `entries` for a file that contains images: it also writes them to the given folder. `entries` then raises
    DataError. None: the file contains no images.
    keys: the names of the columns, if they are not common names.
    notes: texts for the table of what was read. `entries` may add some.
    folder_splits: whether the first folders of the images, such as train/ and test/, are their splits.
    """

    path: Path
    format: str
    entries: Callable[[], Iterator[Located]]
    split: str = ""
    unpack: Callable[[Path], Iterator[Located]] | None = None
    keys: Keys = NO_KEYS
    notes: list[str] = field(default_factory=list)
    folder_splits: bool = False

    def describe(self, entries: int, root: Path) -> list[str]:
        """Return texts for the table of what was read: format, delimiter, folder of the images, encoding, unused flags.

        entries: number of its entries. root: the folder of the images.
        """
        format_text, note = self.format, ""
        if self.unpack is None and self.format != "xlsx" and self.path.is_file():
            is_table = self.format in ("csv", "tsv")
            encoding, note = formats.describe_encoding(self.path, is_table or self.format in ("flickr8k", "flickr30k"))
            delimiter = table_delimiter(self.path, self.format, encoding, self.keys) if is_table else ""
            format_text += f", {DELIMITERS.get(delimiter, repr(delimiter))} between columns" if delimiter else ""
        flags = ", ".join(map(key_flag, self.keys.named))
        has = "has" if len(self.keys.named) == 1 else "have"
        unused = f"{flags} {has} no effect: the keys of {self.format} are fixed" * bool(flags and self.format not in WITH_KEYS)
        return [source_line(self.path, entries, format_text, root), *filter(None, [note, unused, *self.notes])]

    def split_entries(self) -> Iterator[Located]:
        """Yield the entries. An entry without a split gets the split of the file or of its folder, if there is one."""
        if self.folder_splits:
            return with_folder_splits(self.entries())
        if not self.split:
            return self.entries()
        return ((at, with_split(entry, self.split) if isinstance(entry, dict) else entry) for at, entry in self.entries())

    @property
    def downloaded(self) -> bool:
        """Return True if the file comes from a published data set or a program, which the user cannot easily fix."""
        return self.format not in USER_FORMATS

    @property
    def may_lack_images(self) -> bool:
        """Return True for a published data set. In any other source, a missing image is an error."""
        return self.format in PUBLISHED or (self.format == "coco" and bool(YEAR.search(self.path.name)))

    def image_root(self, given: str) -> Path:
        """Return the folder of the images: `given`, or the default. The images of a folder with captions are in that folder."""
        unused = f"--images has no effect: the images are in {self.path}"
        return used_root(self.path, self.root, given, lambda _: self.notes.append(unused))

    @property
    def root(self) -> Path:
        """Return the default folder of the images: that of the file, or the parent of `annotations/` and `Flickr8k_text/`."""
        if self.path.is_dir():
            return self.path
        texts = re.fullmatch(r"annotations|flicke?r8k_text", self.path.absolute().parent.name, re.IGNORECASE)
        return self.path.parent.absolute().parent if self.downloaded and texts else self.path.parent


def find_sources(
    source: str, requested: str = "auto", keys: Keys = NO_KEYS, template: str = "", flag: str = "--source"
) -> list[Source]:
    """Return the sources in `source`: a file, several files separated by commas, or a folder. Raise DataError if it has none.

    requested: the format of all files; "auto": detect it.
    keys: the names of the columns or keys, if they are not common names.
    template: the caption of each image of a folder; {class} becomes the name of its folder, and {name} the name of its file.
    flag: the flag of the command that gives the source, for the messages.
    """
    paths = paths_of(source)
    if missing := [path for path in paths if not exists(path)]:
        raise DataError(
            f"source {str(missing[0])!r} does not exist; {suggestion(missing[0])}give a file, several files separated by "
            f"commas, or a folder: {flag} captions.csv"
        )
    folders = [one for path in paths if path.is_dir() and (one := _layout_source(path, requested, template, flag))]
    layout_folders = {one.path for one in folders}
    others = (path for path in paths if path not in layout_folders)
    files = chain.from_iterable(_files_in(path, requested, flag) if path.is_dir() else [path] for path in others)
    loaded = {path: load(path, requested) for path in dict.fromkeys(chain.from_iterable(map(published.with_partner, files)))}
    vqa_files = {path: document for path, (file_format, document) in loaded.items() if file_format == "vqa"}
    answer_files = {path: document for path, document in vqa_files.items() if "questions" not in document}
    sources = [
        Source(path, file_format, partial(refuse_packed, source), split_of(path), partial(PACKED[file_format], path, keys))
        if file_format in PACKED
        else _unpacked_source(source, _source(path, file_format, document, answer_files, keys, flag))
        for path, (file_format, document) in loaded.items()
        if path not in answer_files
    ]
    if not sources and not folders:
        raise DataError(f"{source} has VQAv2's answers, but no questions; give both: {flag} questions.json,annotations.json")
    splits = _splits_of([one.path for one in sources if not one.split])
    sources = folders + [replace(one, split=one.split or splits.get(one.path, "")) for one in sources]
    return [replace(one, keys=keys) for one in sources]


def _splits_of(paths: list[Path]) -> dict[Path, str]:
    """Return {file: the split of its name}, or {} if the names have no splits.

    Raise DataError if only a part of the names has one: the other lines could be for training, or for a test.
    """
    splits = splits_of_list(paths)
    if without := [path for path in splits if not splits[path]]:
        others = ", ".join(path.name for path in splits if splits[path])
        raise DataError(
            f"the name of {without[0]} has no split, and other names have one ({others}); rename the file, for example "
            f"train_{without[0].name} if it is for training, or give only the files for training"
        )
    return splits


def _layout_source(folder: Path, requested: str, template: str, flag: str) -> Source | None:
    """Return the source of a folder whose layout gives the captions, or None if its annotation files must be read instead.

    If a template or the format "folder" is given, annotation files in the folder are ignored.
    """
    if requested != "folder" and not template and (requested != "auto" or known_files(folder, requested)):
        return None
    layout = layout_of(folder)
    if layout.captioned and not template:
        kind, notes = "img2dataset" if layout.downloads and layout.texts else "folder", list[str]()
        entries = partial(captioned_entries, layout, notes)
        return Source(folder, kind, entries, notes=notes, folder_splits=layout.split_folders)
    has_table = (folder / META_CAP).exists() or _is_one_data_set(lone_files(folder))
    if not layout.images or (requested == "auto" and not template and has_table):
        return None
    refuse_without_template(layout, template, flag)
    return Source(folder, "folder", partial(class_entries, layout, template))


def _source(path: Path, file_format: str, document: Any, answer_files: dict[Path, Any], keys: Keys, flag: str) -> Source:
    """Return the source of a file that contains no images. answer_files: VQAv2's files of answers, {file: document}."""
    split = year[1].lower() if (year := YEAR.search(path.name)) else SPLITS.get(path.stem, "")  # captions_train2017.json
    is_metadata = path.name.startswith("metadata.")  # a file of the datasets library, in which folders are splits
    folder = SPLITS.get(path.absolute().parent.name, "") if is_metadata else ""
    by_folder = with_folder_splits if is_metadata and not folder else iter
    raw = {"raw": True} if keys.named and file_format in ("jsonl", "json", "llava") else {}
    if file_format in TABLES:
        return Source(path, file_format, lambda: by_folder(TABLES[file_format](path, keys)), folder, keys=keys)
    if file_format in LINES:
        lines = partial(LINES[file_format], path, **raw)
        return Source(path, file_format, lambda: by_folder(with_our_keys(lines, keys) if raw else lines()), folder, keys=keys)
    if file_format in DOCUMENTS:
        entries = partial(DOCUMENTS[file_format], path, document, **raw)
        entries = partial(with_our_keys, entries, keys) if raw else entries
        return Source(path, file_format, entries, split if file_format == "coco" else "")
    subset = published.subset_of(path, document)
    matching = [other for other in answer_files if published.subset_of(other, answer_files[other]) == subset]
    if not matching:
        raise DataError(f"{path} has VQAv2's questions, but no answers; give both: {flag} questions.json,annotations.json")
    entries = partial(published.vqa_entries, path, document, matching[0], answer_files[matching[0]])
    return Source(path, file_format, entries, split)


def _unpacked_source(source: str, one: Source) -> Source:
    """Return a source. If its JSON contains images, training must not read it, and `prepare` unpacks them."""
    if one.format not in ("jsonl", "json", "llava") or not formats.has_inline_images(one.path):
        return one
    raw = bool(one.keys.named)
    lines = partial(formats.jsonl_entries, one.path, LONGEST, raw) if one.format == "jsonl" else None
    entries = partial(with_our_keys, lines, one.keys) if lines and raw else lines or one.entries
    return replace(one, entries=partial(refuse_packed, source), unpack=lambda target: unpacked(entries(), target))


def with_our_keys(entries: Callable[[], Iterator[Located]], keys: Keys) -> Iterator[Located]:
    """Yield entries that have the keys of a file with image, text, question and answers in place of the names in `keys`.

    An entry without a key that the user names is replaced by a reason.
    """
    for at, raw in entries():
        entry = renamed(raw, chosen(keys.named, raw)) if isinstance(raw, dict) else raw
        if not isinstance(entry, dict):
            yield at, entry
            continue
        yield from (converted(at, entry) if needs_conversion(entry) else several(at, entry))


def _files_in(folder: Path, requested: str, flag: str) -> list[Path]:
    """Return the files of the data set in a folder. Raise DataError if the folder contains none, or several data sets."""
    files = known_files(folder, requested)
    if not files and requested in ("auto", "kohya") and (folder / META_CAP).exists():
        files["kohya"] = [folder / META_CAP]
    if not files and requested in ("auto", *PACKED) and (packed := packed_files(folder)):
        return packed
    names = [path.relative_to(folder).as_posix() for hits in files.values() for path in hits]
    if not names:
        return _lone_files(folder, flag)
    if len(files) > 1 or len({without_split(Path(name).name) for name in names}) > 1:
        raise DataError(
            f"{folder} contains several data sets ({', '.join(names)}); give the files of one, separated by "
            f"commas: {flag} {folder / names[0]}"
        )
    return next(iter(files.values()))


def _lone_files(folder: Path, flag: str) -> list[Path]:
    """Return the file of a folder that may contain texts, or its file for each split.

    Raise DataError if the folder contains none, or files of several data sets.
    """
    files = lone_files(folder) or files_in_split_folders(folder)
    if not files:
        lacks = "no annotations" if next(walk(str(folder), Counter()), None) else "neither images nor annotations"
        raise DataError(f"{folder} contains {lacks}; give the file that lists images and texts, such as {flag} captions.csv")
    if not _is_one_data_set(files):
        names = ", ".join(path.relative_to(folder).as_posix() for path in files[:SHOWN]) + ", …" * (len(files) > SHOWN)
        value, how_many = as_one_value(files), "all"
        if not value:
            value, how_many = str(likely_for_training(files)), "one"
        raise DataError(f"{folder} contains several files ({names}); give {how_many} of them: {flag} {quote(value)}")
    return files


def _is_one_data_set(files: list[Path]) -> bool:
    """Return True for one file, or for files whose names differ only in the split, such as train.jsonl and test.jsonl."""
    return len(files) == 1 or bool(splits_of_files(files))
