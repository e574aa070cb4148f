"""`python -m lora_blip prepare`: convert data to train.jsonl, val.jsonl and test.jsonl, split by image."""

import json
import math
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lora_blip.data.annotations import LISTED, many_objects
from lora_blip.data.entries import NOT_UTF8, SPLITS, Entry, canonical
from lora_blip.data.formats import Keys, LeftOut, Location
from lora_blip.data.prepare.folder_layouts import CLASS
from lora_blip.data.prepare.folders import Folder, ImageFile
from lora_blip.data.prepare.packed import removed_on_error
from lora_blip.data.prepare.sources import Source, find_sources
from lora_blip.errors import ConfigError, DataError
from lora_blip.runtime.files import refuse_unwritable, write_whole
from lora_blip.runtime.progress import phase
from lora_blip.runtime.settings import check, require, setting
from lora_blip.runtime.terminal import encodable_output
from lora_blip.runtime.untrusted import printable

SIDES = ("train", "val", "test")
DROPPED, IMAGES = "dropped.jsonl", "images"  # IMAGES: what a Parquet file or a shard contained
encode = json.JSONEncoder(ensure_ascii=False).encode
WHY = {
    "missing": "whose image is missing: the downloads of published data sets lack some images",
    "unlisted": "whose image is in no split of its data set (--own-splits false uses it)",
    "left out": "that are no usable examples:",
    "fault": "invalid lines or entries:",
}
NO_SIDE = "it has no split (train, val or test), but other lines have; add it, or draw all splits (--own-splits false)"


@dataclass(frozen=True)
class PrepareConfig:
    """All settings of `prepare`."""

    source: str = setting(
        "", "what to read: a file, several files separated by commas, or the folder of a data set", path="always"
    )
    images: str = setting(
        "", "folder of the images; empty: the source's folder, or the folder above a data set's texts", path="always"
    )
    template: str = setting("", 'caption of an image in a class folder, such as "a photo of a {class}"')
    output_dir: str = setting(
        "prepared", "folder of train.jsonl, val.jsonl and test.jsonl; no file is overwritten", path="always"
    )
    format: Literal[
        "auto", "jsonl", "json", "tsv", "csv", "xlsx", "coco", "vqa", "karpathy", "flickr8k", "flickr30k", "textcaps", "llava",
        "labelstudio", "labelstudio_min", "kohya", "folder", "parquet", "shard",
    ] = setting("auto", "format of the source; auto: detect it from the content")  # fmt: skip
    image_key: str = setting("", "column or key of the image path; empty: a common name, such as image or file_name")
    text_key: str = setting("", "column or key of the text; empty: a common name, such as text or caption")
    question_key: str = setting("", "column or key of the question; empty: question")
    answer_key: str = setting("", "column or key of the answers; empty: answers or answer")
    splits: str = setting("0.9,0.05,0.05", "fractions of the images for train, val and test; 1: only train")
    own_splits: bool = setting(True, "use the splits of the data set, if it has any; false: draw random splits")
    seed: int = setting(0, "seed of the random splits")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "if a line or entry is invalid")

    def __post_init__(self) -> None:
        check(self)
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        shares_of(self.splits)
        require(not self.template or CLASS in self.template, "template", self.template, f"a text that contains {CLASS}")
        if not self.source.strip():
            raise ConfigError("source is empty; give a file or the folder of a data set: --source captions.tsv")
        if self.images and not Path(self.images).is_dir():
            raise ConfigError(f"images = {self.images!r}: expected the folder of the images")


class Row(NamedTuple):
    """A valid line as it will be written, and its origin."""

    source: Source
    at: Location
    picture: ImageFile
    side: str | None  # its split in the data set; "": no split contains it; None: the data set has no splits
    line: bytes


@dataclass(frozen=True)
class Dropped:
    """A line that is left out. A "fault" is an error of the data. The others are normal for published data sets."""

    source: Source
    at: Location
    why: Literal["fault", "missing", "unlisted", "left out"]
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.source.path}:{'' if isinstance(self.at, int) else ' '}{self.at}: {self.reason}")


@dataclass
class Gathered:
    """The lines of all sources."""

    base: str  # the output folder with a slash; image paths below it are written relative to it
    rows: list[Row] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    names: dict[object, str] = field(default_factory=dict)  # image → its alphabetically first name in the lines
    kind: str = ""  # "captions" or "questions"; both at once is an error


@encodable_output()
@many_objects()  # garbage collection would take a third of the time
def prepare(config: PrepareConfig) -> dict[str, Path]:
    """Read, check, split and write the data, and return split → file. Write nothing if there is an error."""
    output = Path(config.output_dir)
    refuse_existing(output)
    with removed_on_error(output / IMAGES):
        return _prepare(config, output)


def _prepare(config: PrepareConfig, output: Path) -> dict[str, Path]:
    print(printable(f"reading {config.source} …"), flush=True)
    gathered = Gathered(f"{output.absolute()}{os.sep}")
    for source in find_sources(config.source, config.format, keys_of(config), config.template):
        folder = Folder(Path(config.images) if config.images else source.root)
        with phase(lambda: f"reading {source.path}: {len(gathered.rows):,} lines"):  # called in this turn
            gather(source, folder, gathered)
    sides = own_sides(gathered) if config.own_splits else {}
    refuse_faults(gathered, config.on_bad_data)
    sides = sides or drawn_sides(gathered, config.splits, config.seed)
    rows = {side: [row for row in gathered.rows if sides[row.picture.identity] == side] for side in SIDES}
    with phase(f"writing {len(gathered.rows):,} lines to {output}"):
        files = write(output, rows, gathered.dropped)
    report(files, rows, gathered)
    return {side: files[side] for side in SIDES if side in files}


def keys_of(config: PrepareConfig) -> Keys:
    return Keys(config.image_key, config.text_key, config.question_key, config.answer_key)


def refuse_existing(output: Path) -> None:
    """Raise ConfigError if a file would be overwritten, or the folder cannot be written."""
    refuse_unwritable(str(output))
    if existing := [name for name in (*(f"{side}.jsonl" for side in SIDES), DROPPED) if os.path.lexists(output / name)]:
        raise ConfigError(
            f"{output / existing[0]} already exists and is not overwritten; choose another output_dir (--output-dir)"
        )


def gather(source: Source, folder: Folder, into: Gathered) -> None:
    """Add each entry of a source to the rows of `into`, or to the dropped lines with its reason."""
    before, dropped = len(into.rows), len(into.dropped)
    for at, found in source.unpack(Path(into.base, IMAGES)) if source.unpack else source.entries():
        result = examine(source, at, found, folder, into)
        if isinstance(result, Row):
            into.rows.append(result)
        else:
            into.dropped.append(result)
    if folder.known and all(isinstance(found, str) and "does not exist" in found for found in folder.known.values()):
        example = next(iter(folder.known))
        raise DataError(
            f"{source.path}: none of its images ({len(folder.known):,}) is in {folder.root}; {example!r} does not exist there; "
            "set images (--images) to the folder of the images"
        )
    entries = len(into.rows) - before + len(into.dropped) - dropped
    print(printable(f"{source.path}: {entries:,} entries ({source.format}), images in {folder.root}"))
    if source.encoding:
        print(printable(source.encoding))
    if moved := folder.finder.describe():
        print(printable(moved))


def examine(source: Source, at: Location, found: Entry | str, folder: Folder, into: Gathered) -> Row | Dropped:
    """Return the row of an entry, or the reason why it is dropped."""
    entry = canonical(found) if isinstance(found, dict) else found
    if isinstance(entry, str):
        return Dropped(source, at, "left out" if isinstance(entry, LeftOut) else "fault", entry)
    kind = "questions" if "question" in entry else "captions"
    into.kind = into.kind or kind
    if kind != into.kind:
        return Dropped(source, at, "fault", f"it belongs to {kind}, and the first line to {into.kind}; prepare them separately")
    picture = folder.find(entry["image"])
    if isinstance(picture, str):
        return Dropped(source, at, "missing" if source.downloaded and "does not exist" in picture else "fault", picture)
    name, side = entry["image"], entry.pop("split", source.split or None)
    into.names[picture.identity] = min(name, into.names.get(picture.identity, name))
    entry["image"] = str(picture.path).removeprefix(into.base).replace(os.sep, "/")
    try:
        line = encode(entry).encode()
    except UnicodeEncodeError:
        return Dropped(source, at, "fault", NOT_UTF8)
    return Row(source, at, picture, side if side or source.downloaded else None, line)


def own_sides(gathered: Gathered) -> dict[object, str]:
    """Return the split of each image in its data set, and drop lines without a split. Return {} if no image is in train."""
    if not any(_side(row) == "train" for row in gathered.rows):
        return {}
    sides: dict[object, str] = {}
    kept = []
    for row in gathered.rows:
        side = _side(row)
        if side and sides.setdefault(row.picture.identity, side) == side:
            kept.append(row)
        elif row.side == "":
            gathered.dropped.append(
                Dropped(row.source, row.at, "unlisted", f"{row.picture.path} is in no split of its data set")
            )
        else:
            reason = f"its image is in {side} here and in {sides[row.picture.identity]} before" if side else NO_SIDE
            gathered.dropped.append(Dropped(row.source, row.at, "fault", reason))
    gathered.rows[:] = kept
    return sides


def drawn_sides(gathered: Gathered, splits: str, seed: int) -> dict[object, str]:
    """Return a random split for each image. It depends on the seed, not on the order of lines or the spelling of paths."""
    pictures = {row.picture.identity: row.picture.path for row in gathered.rows}
    images = sorted(pictures, key=lambda image: (gathered.names[image], pictures[image]))
    random.Random(seed).shuffle(images)
    sizes = [max(1, round(share * len(images))) if share else 0 for share in shares_of(splits)]
    largest = max(range(len(sizes)), key=lambda n: sizes[n])
    sizes[largest] += len(images) - sum(sizes)
    if sizes[largest] < 1:
        raise DataError(
            f"{len(images)} image(s) are too few for splits = {splits!r}; give fewer fractions, such as 1 or 0.8,0.2"
        )
    return dict(zip(images, (side for side, size in zip(SIDES, sizes, strict=True) for _ in range(size)), strict=True))


def shares_of(splits: str) -> list[float]:
    """Return the fractions of train, val and test. Raise ConfigError if they are invalid."""
    try:
        shares = [float(part) for part in splits.split(",")]
    except ValueError:
        shares = []
    whole = len(shares) <= len(SIDES) and all(share >= 0 for share in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)
    require(whole, "splits", splits, "fractions for train, val and test with the sum 1, such as 0.9,0.05,0.05")
    return shares + [0.0] * (len(SIDES) - len(shares))


def refuse_faults(gathered: Gathered, on_bad_data: str) -> None:
    """Raise DataError if there are invalid lines and `on_bad_data` is "stop", or if no line is left."""
    faults = [dropped for dropped in gathered.dropped if dropped.why == "fault"]
    listed = "\n".join(listing(faults))
    if faults and on_bad_data == "stop":
        elsewhere = ", or set images (--images) to the folder of the images" * any(
            "does not exist" in fault.reason for fault in faults
        )
        skip = 'or leave them out with on_bad_data = "skip" (--on-bad-data skip)'
        raise DataError(f"{listed}\nnothing was written; fix these lines{elsewhere}, {skip}")
    if not gathered.rows:
        raise DataError(f"no usable line in the source; nothing was written\n{listed}".strip())


def listing(dropped: list[Dropped]) -> list[str]:
    more = len(dropped) - LISTED
    return [str(one) for one in dropped[:LISTED]] + [f"… and {more:,} more"] * (more > 0)


def by_reason(dropped: list[Dropped]) -> list[str]:
    """Return a line for each reason, with its number of entries and the first of them."""
    firsts = {one.reason: one for one in reversed(dropped)}
    counts = Counter(one.reason for one in dropped)
    lines = [f"{count:,} × {firsts[reason]}" for reason, count in counts.most_common(LISTED)]
    return lines + [f"… and {len(counts) - LISTED:,} more reasons"] * (len(counts) > LISTED)


def write(output: Path, rows: dict[str, list[Row]], dropped: list[Dropped]) -> dict[str, Path]:
    """Write a file for each split that has lines, and one for the dropped lines."""
    reasons = [{"file": str(one.source.path), "at": one.at, "why": one.why, "reason": one.reason} for one in dropped]
    files = {DROPPED: b"".join(json.dumps(one).encode() + b"\n" for one in reasons)}
    files |= {f"{side}.jsonl": b"".join(row.line + b"\n" for row in rows[side]) for side in SIDES}
    refuse_existing(output)  # again: another run may have written files since the first check
    for name, content in files.items():
        if content:
            write_whole(output / name, content)
    return {name.removesuffix(".jsonl"): output / name for name, content in files.items() if content}


def report(files: dict[str, Path], rows: dict[str, list[Row]], gathered: Gathered) -> None:
    """Print the numbers of lines and images of each split, and of dropped lines with their reasons."""
    for side in (side for side in SIDES if rows[side]):
        images = len({row.picture.identity for row in rows[side]})
        print(printable(f"{side:7} {len(rows[side]):9,} {gathered.kind} of {images:,} images → {files[side]}"))
    if not gathered.dropped:
        return
    total = len(gathered.dropped) + len(gathered.rows)
    print(printable(f"dropped {len(gathered.dropped):9,} of {total:,} → {files['dropped']}"))
    for why, title in WHY.items():
        if these := [dropped for dropped in gathered.dropped if dropped.why == why]:
            print(f"  {len(these):,} {title}")
            lines = listing(these) if why == "fault" else by_reason(these) if why == "left out" else [f"first {these[0]}"]
            print("\n".join(f"    {line}" for line in lines))


def _side(row: Row) -> str | None:
    return SPLITS.get(str(row.side).lower())
