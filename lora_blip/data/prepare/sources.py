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
OWN = ("jsonl", "tsv", "csv", "xlsx", "folder")  # written by the user, who can fix a line; the others are downloaded
MOST_REASONS = 20  # reasons that are printed


@dataclass(frozen=True)
class Source:
    """A file to read. `entries` yields locations and entries. `split` is the split that the file name contains, or "".

    unpack: like `entries`, for a file that contains images. It writes them to a folder. `entries` then raises DataError.
    """

    path: Path
    format: str
    entries: Callable[[], Iterator[Located]]
    split: str = ""
    unpack: Callable[[Path], Iterator[Located]] | None = None

    @property
    def encoding(self) -> str:
        """A line about the encoding of the file, if it is not UTF-8, or ""."""
        return (
            formats.describe_encoding(self.path, self.format in ("csv", "tsv"))
            if self.format != "xlsx" and self.unpack is None and self.path.is_file()
            else ""
        )

    @property
    def downloaded(self) -> bool:
        return self.format not in OWN

    @property
    def root(self) -> Path:
        """The default folder of its images: the folder of the file, or the parent of a data set's folder of texts."""
        if self.path.is_dir():
            return self.path
        texts = re.fullmatch(r"annotations|flicke?r8k_text", self.path.absolute().parent.name, re.IGNORECASE)
        return self.path.parent.absolute().parent if self.downloaded and texts else self.path.parent


def find_sources(where: str, form: str = "auto", keys: Keys = NO_KEYS, template: str = "") -> list[Source]:
    """Return the sources of a file, of several files separated by commas, or of a folder. Raise DataError if there are none.

    keys: the names of the columns or keys, if they are not common ones.
    template: the caption of an image in a class folder, with {class} for the folder's name.
    """
    paths = [Path(where)] if _exists(Path(where)) else [Path(part.strip()) for part in where.split(",") if part.strip()]
    if missing := [path for path in paths if not _exists(path)]:
        raise DataError(
            f"source {str(missing[0])!r} does not exist; give a file, several files separated by commas, or a folder"
        )
    folders = [source for path in paths if path.is_dir() and (source := _layout_source(path, form, template))]
    laid_out = {source.path for source in folders}
    files = chain.from_iterable(_files_of(path, form) if path.is_dir() else [path] for path in paths if path not in laid_out)
    loaded = {path: _load(path, form) for path in dict.fromkeys(chain.from_iterable(map(_with_partner, files)))}
    answers = {path: found for path, (kind, found) in loaded.items() if kind == "vqa" and "questions" not in found}
    sources = [
        Source(path, kind, partial(refuse_packed, where), split_of(path), partial(PACKED[kind], path, keys))
        if kind in PACKED
        else _source(path, kind, found, answers, keys)
        for path, (kind, found) in loaded.items()
        if path not in answers
    ]
    if not sources and not folders:
        raise DataError(f"{where}: VQAv2's answers without its questions; give both files, separated by a comma")
    return folders + sources


def _layout_source(folder: Path, form: str, template: str) -> Source | None:
    """Return the source of a folder that has images and no annotation file with a known name, or None.

    With a template or the format "folder", its annotation files are ignored.
    """
    if form != "folder" and not template and (form != "auto" or known_files(folder, form)):
        return None
    layout = layout_of(folder)
    if layout.captioned and not template:
        return Source(folder, "img2dataset" if layout.downloads else "folder", partial(captioned_entries, layout))
    if not layout.images or (form == "auto" and not template and (folder / META_CAP).exists()):
        return None
    refuse_without_template(layout, template)
    return Source(folder, "folder", partial(class_entries, layout, template))


def _source(path: Path, kind: str, found: Any, answers: dict[Path, Any], keys: Keys) -> Source:
    side = year[1].lower() if (year := YEAR.search(path.name)) else SPLITS.get(path.stem, "")  # captions_train2017.json
    folder = SPLITS.get(path.absolute().parent.name, "") if path.name.startswith("metadata.") else ""
    if kind in TABLES:
        return Source(path, kind, partial(TABLES[kind], path, keys), folder)
    if kind in LINES:
        return Source(path, kind, partial(with_keys, partial(LINES[kind], path), keys), folder)
    if kind in DOCUMENTS:
        read = partial(with_keys, partial(DOCUMENTS[kind], path, found), keys)
        return Source(path, kind, read, side if kind == "coco" else "")
    subset = published.subset_of(path, found)
    fitting = [other for other in answers if published.subset_of(other, answers[other]) == subset]
    if not fitting:
        raise DataError(f"{path}: VQAv2's questions without their answers; give both files, separated by a comma")
    return Source(path, kind, partial(published.vqa_entries, path, found, fitting[0], answers[fitting[0]]), side)


def usable_entries(path: Path, entries: Callable[[], Iterator[Located]]) -> Iterator[Located]:
    """Yield the entries that are not left out, and print how many are, by reason."""
    counts: dict[str, tuple[int, Location]] = {}
    for at, entry in entries():
        if isinstance(entry, LeftOut):
            count, first = counts.get(entry, (0, at))
            counts[entry] = count + 1, first
        else:
            yield at, entry
    for reason, (count, first) in list(counts.items())[:MOST_REASONS]:
        print(printable(f"{path}: left out {count:,}, first {first}: {reason}"))


def with_keys(entries: Callable[[], Iterator[Located]], keys: Keys) -> Iterator[Located]:
    """Yield the entries with our names instead of those that the user gives."""
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


def _load(path: Path, form: str) -> tuple[str, Any]:
    """Return the format of a file, detected if `form` is "auto", and its JSON if it is one document."""
    try:
        with open_regular(path) as file:
            head = file.read(8192)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({why(error)})") from None
    if (kind := packed_kind(path, head)) and form in ("auto", kind):
        return kind, None
    if form == "auto" and head.startswith(SIGNATURES):
        form = "xlsx"
    wide = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    lines = head.decode("utf-16" if wide else "utf-8-sig", errors="replace").splitlines()
    if form == "auto":
        form = _line_format(path, next((line.strip() for line in lines if line.strip() and not line.startswith("#")), ""))
    found = None if form in LINES or form in TABLES else published.document(path)
    if form != "xlsx":
        refuse_addresses(path, form, lines, found)
    if form in LINES or form in TABLES:
        return form, None
    kind = _document_format(found) if form == "document" else form
    if not kind or (kind == "vqa" and not isinstance(found, dict)):
        keys = f"its keys are {cut(', '.join(list(found)[:8]))}" if isinstance(found, dict) else "it is not an object or list"
        raise DataError(f"{path}: a JSON file of an unknown format ({keys}); {_known()}")
    return kind, found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a file name, such as several files separated by commas
        return False


def _line_format(path: Path, first: str) -> str:
    """Return the format of a file from its suffix and first line: "document" for one JSON."""
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
    raise DataError(f"{path}: the format is unknown: it begins with {first[:60]!r}; {_known()}")


def _is_object(line: str) -> bool:
    """Return True if the first line is a complete JSON object with an image, as in JSONL."""
    try:
        entry = parsed(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and any(key in entry for key in IMAGE_KEYS)


def _document_format(found: Any) -> str:
    if kind := exports.document_format(found):
        return kind
    if isinstance(found, list):
        return "json"
    keys = found.keys() if isinstance(found, dict) else set()
    if "images" in keys:
        return "coco" if "annotations" in keys else "karpathy"
    if is_json_list(found) and "questions" not in keys:
        return "json"
    return "vqa" if keys & {"questions", "annotations"} else ""


def _files_of(folder: Path, form: str) -> list[Path]:
    """Return the files of the data set in a folder. Raise DataError if there is none, or several."""
    found = known_files(folder, form)
    if not found and form in ("auto", "kohya") and (folder / META_CAP).exists():
        found["kohya"] = [folder / META_CAP]
    if not found and form in ("auto", *PACKED) and (packed := packed_files(folder)):
        return packed
    names = [path.relative_to(folder).as_posix() for hits in found.values() for path in hits]
    if not names:
        raise DataError(f"{folder}: no file with a known name in this folder; give the file itself as source")
    if len(found) > 1 or len({re.sub("train|val|test", "", Path(name).name) for name in names}) > 1:
        raise DataError(
            f"{folder} contains several data sets ({', '.join(names)}); give the files of one as source, separated by commas"
        )
    return next(iter(found.values()))


def _with_partner(path: Path) -> list[Path]:
    """Return the file with its partner, if it is one of VQAv2's questions or answers and both are in the folder."""
    if path.name.endswith("_questions.json"):
        other = path.with_name(re.sub("OpenEnded_|MultipleChoice_", "", path.name).replace("_questions", "_annotations"))
    elif path.name.endswith("_annotations.json"):
        other = path.with_name(path.name.replace("v2_", "v2_OpenEnded_").replace("_annotations", "_questions"))
    else:
        return [path]
    return [path, other] if other.is_file() else [path]


def _known() -> str:
    return f"set format (--format) to one of {', '.join(FORMATS)}"
