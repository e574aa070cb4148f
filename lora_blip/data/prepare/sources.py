"""Find the files to read, and detect the format of each."""

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from lora_blip.data import formats, tables
from lora_blip.data.entries import IMAGE_KEYS, SPLITS
from lora_blip.data.formats import NO_KEYS, Keys, LeftOut, Located, Location
from lora_blip.data.prepare import exports, published
from lora_blip.data.prepare.folder_layouts import (
    META_CAP,
    captioned_entries,
    class_entries,
    known_files,
    layout_of,
    refuse_without_template,
)
from lora_blip.data.prepare.json_lists import is_json_list, json_entries
from lora_blip.data.prepare.packed import PACKED, packed_files, packed_kind, refuse_packed, split_of
from lora_blip.data.prepare.published import TOKEN, YEAR
from lora_blip.data.prepare.web_addresses import refuse_addresses
from lora_blip.data.workbook import SIGNATURES, workbook_entries
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import cut, open_regular, parsed, printable, why

TABLES: dict[str, Callable[[Path, Keys], Iterator[Located]]] = {
    "tsv": tables.tsv_entries,
    "csv": tables.csv_entries,
    "xlsx": workbook_entries,
}
LINES: dict[str, Callable[[Path], Iterator[Located]]] = {
    "jsonl": formats.jsonl_entries,
    "flickr8k": published.flickr8k_entries,
    "flickr30k": published.flickr30k_entries,
}
DOCUMENTS: dict[str, Callable[[Path, Any], Iterator[Located]]] = {
    "json": json_entries,
    "coco": published.coco_entries,
    "karpathy": published.karpathy_entries,
    "textcaps": exports.textcaps_entries,
    "llava": exports.llava_entries,
    "labelstudio": exports.studio_entries,
    "labelstudio_min": exports.studio_min_entries,
    "kohya": exports.kohya_entries,
}
FORMATS = (*LINES, *TABLES, *DOCUMENTS, *PACKED, "vqa", "folder")
USER_FORMATS = ("jsonl", "tsv", "csv", "xlsx", "folder")  # the user wrote the file and can fix it; other files are downloaded
MOST_REASONS = 20  # printed reasons why entries are left out


@dataclass(frozen=True)
class Source:
    """A file or folder to read.

    entries: returns an iterator of (location, entry), or of (location, reason) for an invalid entry.
    split: the split that the file name contains, such as "val", or "".
    unpack: replaces `entries` for a file that contains images: it also writes them to the given folder. `entries` then raises
    DataError. None: the file contains no images.
    """

    path: Path
    format: str
    entries: Callable[[], Iterator[Located]]
    split: str = ""
    unpack: Callable[[Path], Iterator[Located]] | None = None

    @property
    def encoding_note(self) -> str:
        """Return a message that names the encoding of a text file, or "" for UTF-8 and for other files."""
        return (
            formats.describe_encoding(self.path, self.format in ("csv", "tsv"))
            if self.format != "xlsx" and self.unpack is None and self.path.is_file()
            else ""
        )

    @property
    def downloaded(self) -> bool:
        """True if the file comes from a published data set or a program, so that the user cannot easily fix its lines."""
        return self.format not in USER_FORMATS

    @property
    def root(self) -> Path:
        """The default folder of its images: the folder of the file, or the parent of `annotations/` and `Flickr8k_text/`."""
        if self.path.is_dir():
            return self.path
        texts = re.fullmatch(r"annotations|flicke?r8k_text", self.path.absolute().parent.name, re.IGNORECASE)
        return self.path.parent.absolute().parent if self.downloaded and texts else self.path.parent


def find_sources(source: str, requested: str = "auto", keys: Keys = NO_KEYS, template: str = "") -> list[Source]:
    """Return the sources in `source`: a file, several files separated by commas, or a folder. Raise DataError if it has none.

    requested: the format of all files; "auto": detect it.
    keys: the names of the columns or keys, if they are not common names.
    template: the caption of each image in a class folder; {class} becomes the name of the folder.
    """
    paths = [Path(source)] if _exists(Path(source)) else [Path(part.strip()) for part in source.split(",") if part.strip()]
    if missing := [path for path in paths if not _exists(path)]:
        raise DataError(
            f"source {str(missing[0])!r} does not exist; give a file, several files separated by commas, or a folder: "
            "--source captions.csv"
        )
    folders = [one for path in paths if path.is_dir() and (one := _layout_source(path, requested, template))]
    layout_folders = {one.path for one in folders}
    others = (path for path in paths if path not in layout_folders)
    files = chain.from_iterable(_files_in(path, requested) if path.is_dir() else [path] for path in others)
    loaded = {path: _load(path, requested) for path in dict.fromkeys(chain.from_iterable(map(published.with_partner, files)))}
    vqa_files = {path: document for path, (file_format, document) in loaded.items() if file_format == "vqa"}
    answer_files = {path: document for path, document in vqa_files.items() if "questions" not in document}
    sources = [
        Source(path, file_format, partial(refuse_packed, source), split_of(path), partial(PACKED[file_format], path, keys))
        if file_format in PACKED
        else _source(path, file_format, document, answer_files, keys)
        for path, (file_format, document) in loaded.items()
        if path not in answer_files
    ]
    if not sources and not folders:
        raise DataError(f"{source} has VQAv2's answers, but no questions; give both: --source questions.json,annotations.json")
    return folders + sources


def _layout_source(folder: Path, requested: str, template: str) -> Source | None:
    """Return the source of a folder whose layout gives the captions, or None if its annotation files must be read instead.

    If a template or the format "folder" is given, annotation files in the folder are ignored.
    """
    if requested != "folder" and not template and (requested != "auto" or known_files(folder, requested)):
        return None
    layout = layout_of(folder)
    if layout.captioned and not template:
        return Source(folder, "img2dataset" if layout.downloads else "folder", partial(captioned_entries, layout))
    if not layout.images or (requested == "auto" and not template and (folder / META_CAP).exists()):
        return None
    refuse_without_template(layout, template)
    return Source(folder, "folder", partial(class_entries, layout, template))


def _source(path: Path, file_format: str, document: Any, answer_files: dict[Path, Any], keys: Keys) -> Source:
    """Return the source of a file that contains no images. answer_files: VQAv2's files of answers, {file: document}."""
    split = year[1].lower() if (year := YEAR.search(path.name)) else SPLITS.get(path.stem, "")  # captions_train2017.json
    folder = SPLITS.get(path.absolute().parent.name, "") if path.name.startswith("metadata.") else ""
    if file_format in TABLES:
        return Source(path, file_format, partial(TABLES[file_format], path, keys), folder)
    if file_format in LINES:
        return Source(path, file_format, partial(with_our_keys, partial(LINES[file_format], path), keys), folder)
    if file_format in DOCUMENTS:
        entries = partial(with_our_keys, partial(DOCUMENTS[file_format], path, document), keys)
        return Source(path, file_format, entries, split if file_format == "coco" else "")
    subset = published.subset_of(path, document)
    matching = [other for other in answer_files if published.subset_of(other, answer_files[other]) == subset]
    if not matching:
        raise DataError(f"{path} has VQAv2's questions, but no answers; give both: --source questions.json,annotations.json")
    entries = partial(published.vqa_entries, path, document, matching[0], answer_files[matching[0]])
    return Source(path, file_format, entries, split)


def usable_entries(path: Path, entries: Callable[[], Iterator[Located]]) -> Iterator[Located]:
    """Yield the entries except those that are left out. At the end, print the number of those for each reason."""
    counts: dict[str, tuple[int, Location]] = {}
    for at, entry in entries():
        if isinstance(entry, LeftOut):
            count, first = counts.get(entry, (0, at))
            counts[entry] = count + 1, first
        else:
            yield at, entry
    for reason, (count, first) in list(counts.items())[:MOST_REASONS]:
        print(printable(f"{path}: {count:,} left out; the first is {first}: {reason}"))


def with_our_keys(entries: Callable[[], Iterator[Located]], keys: Keys) -> Iterator[Located]:
    """Yield the entries with the keys image, text, question and answers in place of the names in `keys`."""
    named = {name: ours for ours, name in keys.named.items()}
    for at, entry in entries():
        if named and isinstance(entry, dict):
            yield (
                at,
                {key: value for key, value in entry.items() if key not in named.values()}
                | {named[key]: value for key, value in entry.items() if key in named},
            )
        else:
            yield at, entry


def _load(path: Path, requested: str) -> tuple[str, Any]:
    """Return (format, parsed JSON document), or (format, None) for a file that is not one JSON document.

    requested: the format; "auto": detect it. Raise DataError if it cannot be detected, or the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            head = file.read(8192)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({why(error)})") from None
    if (file_format := packed_kind(path, head)) and requested in ("auto", file_format):
        return file_format, None
    if requested == "auto" and head.startswith(SIGNATURES):
        requested = "xlsx"
    is_utf16 = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    lines = head.decode("utf-16" if is_utf16 else "utf-8-sig", errors="replace").splitlines()
    if requested == "auto":
        requested = _line_format(path, next((line.strip() for line in lines if line.strip() and not line.startswith("#")), ""))
    document = None if requested in LINES or requested in TABLES else published.load_json(path)
    if requested != "xlsx":
        refuse_addresses(path, requested, lines, document)
    if requested in LINES or requested in TABLES:
        return requested, None
    file_format = _document_format(document) if requested == "document" else requested
    if not file_format or (file_format == "vqa" and not isinstance(document, dict)):
        keys = f"it has the keys {cut(', '.join(list(document)[:8]))}" if isinstance(document, dict) else "it is not an object"
        raise DataError(f"{path}: the format of this JSON file is unknown ({keys}); {_format_advice()}")
    return file_format, document


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a file name, such as several files separated by commas
        return False


def _line_format(path: Path, first: str) -> str:
    """Return the format of a file by its suffix and first line, or "document" for a file that is one JSON document."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if TOKEN.fullmatch(first):
        return "flickr8k"
    if published.FLICKR30K.fullmatch(first):
        return "flickr30k"
    if suffix in (".tsv", ".csv"):
        return suffix[1:]
    if suffix == ".json" or first.startswith(("{", "[")):
        return "jsonl" if _is_object(first) else "document"
    if tables.is_header(re.split(r"[,;\t|]", first)):
        return "flickr8k" if (path.name, first.lower()) == ("captions.txt", "image,caption") else "csv"
    if "\t" in first:
        return "tsv"
    raise DataError(f"{path}: the format of this file is unknown; its first line is {first[:60]!r}; {_format_advice()}")


def _is_object(line: str) -> bool:
    """Return True if the first line is a complete JSON object with an image, as in JSONL."""
    try:
        entry = parsed(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and any(key in entry for key in IMAGE_KEYS)


def _document_format(document: Any) -> str:
    """Return the format of a parsed JSON document, or "" if it is unknown."""
    if file_format := exports.document_format(document):
        return file_format
    if isinstance(document, list):
        return "json"
    keys = document.keys() if isinstance(document, dict) else set()
    if "images" in keys:
        return "coco" if "annotations" in keys else "karpathy"
    if is_json_list(document) and "questions" not in keys:
        return "json"
    return "vqa" if keys & {"questions", "annotations"} else ""


def _files_in(folder: Path, requested: str) -> list[Path]:
    """Return the files of the data set in a folder. Raise DataError if the folder contains none, or several data sets."""
    files = known_files(folder, requested)
    if not files and requested in ("auto", "kohya") and (folder / META_CAP).exists():
        files["kohya"] = [folder / META_CAP]
    if not files and requested in ("auto", *PACKED) and (packed := packed_files(folder)):
        return packed
    names = [path.relative_to(folder).as_posix() for hits in files.values() for path in hits]
    if not names:
        raise DataError(
            f"{folder} has no annotation file with a known name; give the file itself: --source {folder}/captions.csv"
        )
    if len(files) > 1 or len({re.sub("train|val|test", "", Path(name).name) for name in names}) > 1:
        raise DataError(
            f"{folder} contains several data sets ({', '.join(names)}); give the files of one, separated by "
            f"commas: --source {folder / names[0]}"
        )
    return next(iter(files.values()))


def _format_advice() -> str:
    """Return the advice for a file of an unknown format."""
    return f"set format (--format) to one of {', '.join(FORMATS)}"
