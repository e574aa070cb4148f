"""Read folders without an annotation file: a text or JSON file next to each image, img2dataset's output, or class folders."""

import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

from lora_blip.data.entries import SPLITS, LeftOut, Located
from lora_blip.data.formats import CP1252, LONGEST, TOO_LONG, from_cp1252, open_text
from lora_blip.data.image_folders import first_bytes
from lora_blip.data.images import is_picture
from lora_blip.data.prepare.sidecars import TRIED, entry_of_sidecar, image_of, sidecar_of
from lora_blip.data.prepare.split_names import as_one_value, likely_for_training, splits_of_files
from lora_blip.errors import DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import quoted_for_shell as quote
from lora_blip.runtime.untrusted import os_error_reason, parsed, printable, quoted

CAPTION_SUFFIXES = (".txt", ".caption")  # used by kohya's scripts and img2dataset
DEEPEST_FOLDER = 20  # largest number of levels of subfolders that are searched
TABLES = ("*.csv", "*.tsv", "*.json", "*.jsonl", "*.xlsx", "*/*.csv", "*/*.json")  # files that may contain captions
ONE_PER_LINE = 'if each line is a caption, write JSONL: {"image": "1.jpg", "captions": ["a cat", "a black cat"]}'
TEMPLATE = "a photo of a {class}"
GENERIC = ("images", "image", "imgs", "img", "photos", "pictures", "data", "jpg", "jpeg", "png", "frames")  # no classes
CLASS, NAME = "{class}", "{name}"  # in a template: the name of the folder, and of the file
PLACEHOLDER = re.compile(f"{CLASS}|{NAME}")
REPEATS, NUMBER = re.compile(r"\d+_(?=.)"), re.compile(r"(?<=.)_\d+$")

# written by the datasets library
NOT_ANNOTATIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
TEXT_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xlsx")
META_CAP = "meta_cap.json"  # written by kohya's scripts
KNOWN_NAMES = {  # format → names of its annotation files; the files of the first name that exists are used
    "flickr30k": ("results_*.token", "results.csv"),
    "flickr8k": ("Flickr8k.token.txt", "captions.txt"),
    "textcaps": ("TextCaps_*.json",),
    "karpathy": ("dataset_*.json",),
    "coco": ("captions_*.json", "annotations/captions_*.json", "annotations/[tv][ra]*.json"),  # the last: VizWiz
    "vqa": ("v2_*_questions.json",),
    # the last two: Roboflow
    "jsonl": ("metadata.jsonl", "*/metadata.jsonl", "annotations.jsonl", "*/annotations.jsonl", "_annotations.*.jsonl"),
    "csv": ("metadata.csv", "*/metadata.csv"),
    "tsv": ("annotations.tsv",),
    "parquet": ("metadata.parquet", "*/metadata.parquet"),  # of the datasets library, with the names of the image files
}


@dataclass
class Layout:
    """The files of a folder and its subfolders, as sorted paths relative to it."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)  # text files, which may contain captions
    sidecars: dict[str, str] = field(default_factory=dict)  # name of an image, perhaps without its suffix → its JSON file
    downloads: list[str] = field(default_factory=list)  # img2dataset's .json files, without their suffix

    @cached_property
    def captions(self) -> dict[str, str]:
        """Return {image: its text file}. For a.jpg: a.txt, a.caption, a.jpg.txt or a.jpg.caption.

        Names that differ only in their case match (IMG_1.TXT for IMG_1.jpg) if one image and one text file have this name.
        """
        found = {image: name for image in self.images if (name := _first(_names_of_caption(image), self.texts))}
        folded, stems = dict[str, list[str]](), Counter(_stem(image).casefold() for image in self.images if image not in found)
        for name in self.texts.difference(found.values()):
            folded.setdefault(name.casefold(), []).append(name)
        single = {name: others[0] for name, others in folded.items() if len(others) == 1}
        for image in self.images if single else ():
            if image not in found and stems[_stem(image).casefold()] == 1:
                name = _first(map(str.casefold, _names_of_caption(image)), single)
                found |= {image: single[name]} if name else {}
        return found

    @property
    def captioned(self) -> bool:
        """Return True if at least one image has a text file of the same name, or a JSON file with a text."""
        if self.captions:
            return True
        files = (sidecar_of(image, self.sidecars) for image in self.images)
        some = islice(filter(None, files), TRIED)
        return any(isinstance(entry_of_sidecar(name, self.folder / name), dict) for name in some)

    @property
    def split_folders(self) -> bool:
        """Return True if each image is below a folder such as train/ or val/, and one of at least two splits is train."""
        splits = {SPLITS.get(image.partition("/")[0].lower(), "") if "/" in image else "" for image in self.images}
        return len(splits) > 1 and "train" in splits and "" not in splits

    @property
    def class_folders(self) -> bool:
        """Return True if each image is in a subfolder."""
        return bool(self.images) and all("/" in image for image in self.images)

    @property
    def classes(self) -> set[str]:
        """Return the names of the folders of the images that may be classes, and not splits or "images"."""
        names = {Path(image).parent.name for image in self.images}
        return {name for name in names if name.lower() not in (*SPLITS, *GENERIC)}


def known_files(folder: Path, requested: str) -> dict[str, list[Path]]:
    """Return {format: the files of a folder with the format's known names}. requested: "auto", or the only format to return."""
    files: dict[str, list[Path]] = {}
    for file_format, patterns in KNOWN_NAMES.items():
        named = (sorted(path for path in folder.glob(pattern) if path.name not in NOT_ANNOTATIONS) for pattern in patterns)
        hits = next(filter(None, named), [])
        if hits and requested in ("auto", file_format):
            files[file_format] = hits
    if "flickr30k" in files:
        files.pop("flickr8k", None)  # here, captions.txt is a copy of results.csv's captions
    return files


def text_files(folder: Path) -> list[Path]:
    """Return the files in a folder that may contain texts."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in paths if path.suffix.lower() in TEXT_SUFFIXES and path.is_file()]
    return [path for path in files if path.name not in NOT_ANNOTATIONS and not path.name.startswith(".")]


def files_in_split_folders(folder: Path) -> list[Path]:
    """Return the files that may contain texts in the subfolders train/, val/ and test/."""
    return [path for below in sorted(folder.iterdir()) if below.name.lower() in SPLITS for path in text_files(below)]


def lone_files(folder: Path) -> list[Path]:
    """Return the files of a folder that may contain texts, whatever their names. VQAv2's two files count as one.

    If the folder has none, return those in its subfolders train/, val/ and test/ whose paths differ only in the split.
    """
    files = text_files(folder)
    if not files:  # a file in each of train/, val/ and test/
        files = files_in_split_folders(folder)
        return files if splits_of_files(files) else []
    is_pair = [path.name.lower() for path in files] == ["annotations.json", "questions.json"]
    return files[:1] if is_pair else [path for path in files if not path.name.endswith("_stats.json")]  # of img2dataset


def layout_of(folder: Path) -> Layout:
    """Return the layout of a folder and its subfolders. Hidden folders and images are ignored."""
    layout = Layout(folder)
    for path, below, files in os.walk(folder):
        parts = Path(path).relative_to(folder).parts
        below[:] = sorted(name for name in below if not name.startswith(".")) if len(parts) < DEEPEST_FOLDER else []
        for name in sorted(files):
            relative, suffix = "/".join((*parts, name)), Path(name).suffix.lower()
            if suffix in CAPTION_SUFFIXES:
                layout.texts.add(relative)
            elif suffix == ".json":
                layout.sidecars[image_of(relative)] = relative
                if Path(name).stem.isdecimal():
                    layout.downloads.append(relative.removesuffix(Path(name).suffix))
            elif is_picture(name, partial(first_bytes, str(Path(path, name)))):
                layout.images.append(relative)
    return layout


def _stem(image: str) -> str:
    """Return the path of an image without its suffix."""
    return image[: -len(suffix)] if (suffix := Path(image).suffix) else image


def _names_of_caption(image: str) -> Iterator[str]:
    """Yield the paths that the text file of an image may have, the usual one first."""
    return (name + suffix for name in (_stem(image), image) for suffix in CAPTION_SUFFIXES)


def _first(names: Iterable[str], known: Container[str]) -> str:
    """Return the first name that is known, or ""."""
    return next((name for name in names if name in known), "")


def captioned_entries(layout: Layout, notes: list[str]) -> Iterator[Located]:
    """Yield an entry for each image, or a reason if it has no text file.

    Text files without an image are left out, and so are img2dataset's failed downloads. notes: gets texts about files that
    are not UTF-8, and about files with several lines.
    """
    other_encoding: list[str] = []
    several_lines: list[str] = []
    with_image, without_image = set(), set(layout.texts)
    for image in layout.images:
        with_image.add(image.removesuffix(Path(image).suffix))
        name = layout.captions.get(image, "")
        without_image.discard(name)
        if not name and (sidecar := sidecar_of(image, layout.sidecars)):
            yield sidecar, entry_of_sidecar(image, layout.folder / sidecar)
            continue
        if not name:
            yield image, f"it has no caption; write one to {Path(image).with_suffix('.txt').as_posix()}"
            continue
        try:
            with open_text(layout.folder / name) as file:
                text = file.read(LONGEST + 1)
            if (decoded := from_cp1252(text)) is not None:
                text = decoded
                other_encoding.append(name)
            if "\n" in text.strip():
                several_lines.append(name)
        except OSError as error:
            yield name, f"this file cannot be read ({os_error_reason(error)}); it should contain the caption of {image}"
        else:
            yield name, {"image": image, "text": text} if len(text) <= LONGEST else TOO_LONG
    files = counted(len(other_encoding), "text file")
    notes[:] = [f"{files}, such as {quoted(other_encoding[0])}: read as {CP1252}"] if other_encoding else []
    if several_lines:
        files = counted(len(several_lines), "text file")
        notes.append(
            f"{files} with several lines, such as {quoted(several_lines[0])}: each file is one caption; {ONE_PER_LINE}"
        )
    for name in sorted(without_image):
        yield name, LeftOut("a text file without an image")
    for stem in sorted(layout.downloads):
        if stem not in with_image:
            status = _status(layout.folder / f"{stem}.json")
            yield f"{stem}.json", LeftOut(f"img2dataset did not download this image ({status})")


def _status(path: Path) -> str:
    """Return the status in a .json file of img2dataset, such as failed_to_download."""
    try:
        with open_text(path) as file:
            metadata = parsed(file.read(LONGEST))
    except (OSError, ValueError):
        return "no status"
    return printable(str(metadata.get("status")))[:60] if isinstance(metadata, dict) else "no status"


def class_entries(layout: Layout, template: str) -> Iterator[Located]:
    """Yield an entry for each image. Its text is the template. A first folder train/ above class folders is a split.

    {class} becomes the name of the folder, without kohya's number of repeats ("10_sks dog") if all folders have one.
    {name} becomes the name of the file without its suffix and a number at its end ("a red dog_001.jpg").
    """
    folders = [Path(image).parent.name for image in layout.images]
    has_repeats = all(map(REPEATS.match, folders))
    for image, folder in zip(layout.images, folders, strict=True):
        parents = image.split("/")[:-2]
        split = SPLITS.get(parents[0].lower(), "") if parents else ""
        words = {CLASS: REPEATS.sub("", folder) if has_repeats else folder, NAME: NUMBER.sub("", Path(image).stem)}
        text = PLACEHOLDER.sub(lambda match, words=words: words[match[0]].replace("_", " "), template)  # type: ignore[misc]
        yield image, {"image": image, "text": text} | ({"split": split} if split else {})


def _table_advice(folder: Path, flag: str) -> str:
    """Return the flag for a file in or beside a folder that may contain the captions of its images, or "".

    Files that differ only in their split are given together. A file of a test or validation split comes last.
    """
    inside = sorted(path for pattern in TABLES for path in folder.glob(pattern))
    beside = sorted(path for pattern in TABLES if "/" not in pattern for path in folder.parent.glob(pattern))
    tables = [path for path in inside or beside if path.is_file()]
    if not tables:
        return ""
    if files := as_one_value(tables):
        return f"; if these files contain the captions: {flag} {quote(files)}"
    table = likely_for_training(tables)
    return f"; if {printable(str(table))} contains the captions: {flag} {quote(str(table))}"


def refuse_without_template(layout: Layout, template: str, flag: str) -> None:
    """Raise DataError if the images have no captions and there is no usable template. flag: the flag that gives the source."""
    folder, first = layout.folder, layout.images[0]
    one_folder = len({Path(image).parent for image in layout.images}) == 1
    if template and (NAME in template or (layout.class_folders if CLASS in template else one_folder)):
        return
    prepare = f'lora-blip prepare --source "{folder}"'
    table_advice = _table_advice(folder, flag)
    if template and layout.class_folders:
        raise DataError(
            f"template = {template!r}: the images are in several folders and would all have this caption; give a template with "
            f'{CLASS}, the name of the folder, or {NAME}, the name of the file: --template "{TEMPLATE}"'
        )
    loose = [image for image in layout.images if "/" not in image]
    if CLASS in template and loose and not one_folder:
        where = f"{counted(len(loose), 'image', 'are')} directly in {folder}, such as {loose[0]}, so the class is unknown"
        raise DataError(f"template = {template!r}: {where}; move each image into the folder of its class, or elsewhere")
    if not layout.class_folders or one_folder or not (template or layout.classes):
        name, same = (f'{prepare} --template "{each}"' for each in (NAME, "a photo of my dog"))
        raise DataError(
            f"{folder} has {counted(len(layout.images), 'image')} without captions; write each caption to a text file next "
            f"to its image ({Path(first).with_suffix('.txt').as_posix()} for {first}), "
            f"or give a file that contains the captions instead of the folder{table_advice}; if the names of the files are the "
            f"captions: {name}; for one caption of all images: {same}; if the images contain their captions (XMP): "
            f"cd {quote(str(folder))} && exiftool -csv -r -Description . > captions.csv"
        )
    if not template:
        first = next(image for image in layout.images if Path(image).parent.name in layout.classes)
        name = first.split("/")[-2].replace("_", " ")
        raise DataError(
            f"{folder} has {counted(len(layout.images), 'image')} in class folders, without captions; make captions from the "
            f'names of the folders: {prepare} --template "{TEMPLATE}" '
            f'(the caption of {first} is then "{TEMPLATE.replace(CLASS, name)}"){table_advice}'
        )
