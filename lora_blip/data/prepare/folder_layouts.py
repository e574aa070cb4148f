"""Read folders whose layout gives the captions: a text file next to each image, img2dataset's output, or class folders."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lora_blip.data.entries import SPLITS
from lora_blip.data.formats import LONGEST, TOO_LONG, LeftOut, Located, open_text
from lora_blip.data.image_folders import first_bytes
from lora_blip.data.images import is_picture
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import parsed, printable, why

CAPTION_SUFFIXES = (".txt", ".caption")  # of kohya's scripts and img2dataset
DEEPEST_FOLDER = 20  # levels of subfolders
TABLES = ("*.csv", "*.tsv", "*.json", "*.jsonl", "*.xlsx", "*/*.csv", "*/*.json")  # files that may contain captions
TEMPLATE = "a photo of a {class}"
CLASS = "{class}"

DATASETS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json")  # of the datasets library
META_CAP = "meta_cap.json"  # of kohya's scripts
IN_A_FOLDER = {  # format → names of its files in a folder; the first that exists is used
    "flickr30k": ("results_*.token", "results.csv"),
    "flickr8k": ("Flickr8k.token.txt", "captions.txt"),
    "textcaps": ("TextCaps_*.json",),
    "karpathy": ("dataset_*.json",),
    "coco": ("captions_*.json", "annotations/captions_*.json", "annotations/[tv][ra]*.json"),  # the last: VizWiz
    "vqa": ("v2_*_questions.json",),
    "jsonl": ("metadata.jsonl", "*/metadata.jsonl", "annotations.jsonl"),
    "csv": ("metadata.csv", "*/metadata.csv"),
    "tsv": ("annotations.tsv",),
}


@dataclass
class Layout:
    """The files of a folder and its subfolders, as sorted paths relative to it."""

    folder: Path
    images: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)  # files that may be captions
    downloads: list[str] = field(default_factory=list)  # img2dataset's .json files, without the suffix

    @property
    def captioned(self) -> bool:
        """True if an image has a text file of the same name."""
        return any(caption_of(image, self.texts) for image in self.images)

    @property
    def class_folders(self) -> bool:
        """True if each image is in a subfolder."""
        return bool(self.images) and all("/" in image for image in self.images)


def known_files(folder: Path, form: str) -> dict[str, list[Path]]:
    """Return {format: files of a folder with a known name}."""
    found: dict[str, list[Path]] = {}
    for kind, patterns in IN_A_FOLDER.items():
        named = (sorted(path for path in folder.glob(pattern) if path.name not in DATASETS) for pattern in patterns)
        hits = next(filter(None, named), [])
        if hits and form in ("auto", kind):
            found[kind] = hits
    if "flickr30k" in found:
        found.pop("flickr8k", None)  # captions.txt has the same captions
    return found


def layout_of(folder: Path) -> Layout:
    """Return the images and texts of a folder and its subfolders. Hidden files are left out."""
    layout = Layout(folder)
    for path, below, files in os.walk(folder):
        parts = Path(path).relative_to(folder).parts
        below[:] = sorted(name for name in below if not name.startswith(".")) if len(parts) < DEEPEST_FOLDER else []
        for name in sorted(files):
            relative, suffix = "/".join((*parts, name)), Path(name).suffix.lower()
            if suffix in CAPTION_SUFFIXES:
                layout.texts.add(relative)
            elif suffix == ".json" and Path(name).stem.isdecimal():
                layout.downloads.append(relative.removesuffix(Path(name).suffix))
            elif is_picture(name, partial(first_bytes, str(Path(path, name)))):
                layout.images.append(relative)
    return layout


def caption_of(image: str, texts: set[str]) -> str:
    """Return the text file of an image, such as a.txt, a.caption or a.jpg.txt for a.jpg, or ""."""
    stem = image[: -len(suffix)] if (suffix := Path(image).suffix) else image
    names = (name + suffix for name in (stem, image) for suffix in CAPTION_SUFFIXES)
    return next((name for name in names if name in texts), "")


def captioned_entries(layout: Layout) -> Iterator[Located]:
    """Yield an entry for each image. One without a text file is an error. img2dataset's failed downloads are left out."""
    with_image = set()
    for image in layout.images:
        with_image.add(image.removesuffix(Path(image).suffix))
        name = caption_of(image, layout.texts)
        if not name:
            yield image, f"it has no caption; write it to {Path(image).with_suffix('.txt').as_posix()}"
            continue
        try:
            with open_text(layout.folder / name) as file:
                text = file.read(LONGEST + 1)
        except OSError as error:
            yield name, f"it cannot be read ({why(error)}); write the caption of {image} to it"
        else:
            yield name, {"image": image, "text": text} if len(text) <= LONGEST else TOO_LONG
    for stem in sorted(layout.downloads):
        if stem not in with_image:
            yield f"{stem}.json", LeftOut(f"img2dataset did not download it ({_status(layout.folder / f'{stem}.json')})")


def _status(path: Path) -> str:
    """Return img2dataset's status of an image, such as failed_to_download."""
    try:
        with open_text(path) as file:
            found = parsed(file.read(LONGEST))
    except (OSError, ValueError):
        return "no status"
    return printable(str(found.get("status")))[:60] if isinstance(found, dict) else "no status"


def class_entries(layout: Layout, template: str) -> Iterator[Located]:
    """Yield an entry for each image: the template with the name of the image's folder. train/ and val/ above it are splits."""
    for image in layout.images:
        *above, name, _ = image.split("/")
        side = SPLITS.get(above[0].lower(), "") if above else ""
        yield (
            image,
            {"image": image, "text": template.replace(CLASS, name.replace("_", " "))} | ({"split": side} if side else {}),
        )


def refuse_without_template(layout: Layout, template: str) -> None:
    """Raise DataError if the images have no captions and there is no usable template."""
    folder, first = layout.folder, layout.images[0]
    tables = sorted(path for pattern in TABLES for path in folder.glob(pattern))
    given = f"; if {tables[0]} has the captions, give it as source" if tables else ""
    if not layout.class_folders:
        raise DataError(
            f"{folder}: {len(layout.images):,} image(s) without captions; write the caption of each to a text file next to it "
            f"({Path(first).with_suffix('.txt').as_posix()} for {first}), or give a file of captions as source{given}"
        )
    if not template:
        name = first.split("/")[-2].replace("_", " ")
        raise DataError(
            f"{folder}: {len(layout.images):,} image(s) in class folders, without captions; make captions from the names of "
            f'the folders: lora-blip prepare --source "{folder}" --template "{TEMPLATE}" '
            f'({first} is then "{TEMPLATE.replace(CLASS, name)}"){given}'
        )
