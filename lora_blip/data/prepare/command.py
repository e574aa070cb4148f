"""`python -m lora_blip prepare`: data as users have it → train.jsonl, val.jsonl and test.jsonl, split by image."""

import contextlib
import gc
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from lora_blip.config import check, refuse_unwritable, require, setting
from lora_blip.data.annotations import LISTED
from lora_blip.data.entries import NOT_UTF8, Entry, canonical
from lora_blip.data.formats import Location
from lora_blip.data.prepare.folders import Folder, ImageFile
from lora_blip.data.prepare.published import SPLITS
from lora_blip.data.prepare.sources import Source, find_sources
from lora_blip.errors import ConfigError, DataError
from lora_blip.runtime.files import write_whole
from lora_blip.runtime.untrusted import printable

SIDES = ("train", "val", "test")
DROPPED = "dropped.jsonl"
encode = json.JSONEncoder(ensure_ascii=False).encode
WHY = {
    "missing": "whose image is missing: published sets name images that their downloads lack",
    "unlisted": "whose image is on no side of its data set (own_splits = false would use it)",
    "fault": "bad lines or entries:",
}
NO_SIDE = "no split of train, val or test, which other lines have; add it, or set own_splits = false"


@dataclass(frozen=True)
class PrepareConfig:
    """Everything that decides what is prepared."""

    source: str = setting("", "what to read: a file, several with commas between, or a data set's folder")
    images: str = setting("", "folder where the images are; empty: the source's own, or the one above a data set's texts")
    output_dir: str = setting("prepared", "gets train.jsonl, val.jsonl and test.jsonl; nothing in it is written over")
    format: Literal["auto", "jsonl", "json", "tsv", "csv", "coco", "vqa", "karpathy", "flickr8k"] = setting(
        "auto", "how to read the source; auto: as its content says"
    )
    splits: str = setting("0.9,0.05,0.05", "shares of the images for train, val and test; 1: train alone")
    own_splits: bool = setting(True, "split as the data set itself does, where it does; false: by shares, from the seed")
    seed: int = setting(0, "decides which images go where")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "when a line or entry is no good")

    def __post_init__(self) -> None:
        check(self)
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        shares_of(self.splits)
        if not self.source.strip():
            raise ConfigError("source is empty; give what to read: --source captions.tsv, or a data set's folder")
        if self.images and not Path(self.images).is_dir():
            raise ConfigError(f"images = {self.images!r}: expected the folder where the images are")


class Row(NamedTuple):
    """A good line, as it will be written, and where it came from."""

    source: Source
    at: Location
    picture: ImageFile
    side: str | None  # where its data set puts it; "": on no side; None: it has no sides of its own
    line: bytes


@dataclass(frozen=True)
class Dropped:
    """A line that is left out. Only `fault` is the line's own: published sets name images that their downloads lack."""

    source: Source
    at: Location
    why: Literal["fault", "missing", "unlisted"]
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.source.path}:{'' if isinstance(self.at, int) else ' '}{self.at}: {self.reason}")


@dataclass
class Gathered:
    base: str  # the output folder with a slash: paths of images below are written without it
    rows: list[Row] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    names: dict[object, str] = field(default_factory=dict)  # image → the least of the names that its lines give it
    kind: str = ""  # captions or questions


@contextlib.contextmanager
def no_collecting() -> Iterator[None]:
    """Millions of live objects are no garbage; searching them again and again takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@no_collecting()
def prepare(config: PrepareConfig) -> dict[str, Path]:
    """Read, check, split and write; nothing is written unless all is well. What was written: side → file."""
    output = Path(config.output_dir)
    refuse_existing(output)
    gathered = Gathered(f"{output.absolute()}{os.sep}")
    for source in find_sources(config.source, config.format):
        folder = Folder(Path(config.images) if config.images else source.root, by_name=source.downloaded)
        gather(source, folder, gathered)
    sides = own_sides(gathered) if config.own_splits else {}
    refuse_faults(gathered, config.on_bad_data)
    sides = sides or drawn_sides(gathered, config.splits, config.seed)
    rows = {side: [row for row in gathered.rows if sides[row.picture.identity] == side] for side in SIDES}
    files = write(output, rows, gathered.dropped)
    report(files, rows, gathered)
    return {side: files[side] for side in SIDES if side in files}


def refuse_existing(output: Path) -> None:
    """ConfigError if a file would be written over, or if none could be written."""
    refuse_unwritable(str(output))
    if there := [name for name in (*(f"{side}.jsonl" for side in SIDES), DROPPED) if os.path.lexists(output / name)]:
        raise ConfigError(
            f"{output / there[0]} is there already and is not written over; choose another output_dir (--output-dir)"
        )


def gather(source: Source, folder: Folder, into: Gathered) -> None:
    """Every entry of a source becomes a row of `into`, or is dropped with its reason."""
    before, dropped = len(into.rows), len(into.dropped)
    for at, found in source.entries():
        made = examine(source, at, found, folder, into)
        if isinstance(made, Row):
            into.rows.append(made)
        else:
            into.dropped.append(made)
    if folder.known and not any(folder.known.values()):
        example = next(iter(folder.known))
        raise DataError(
            f"{source.path}: none of its images ({len(folder.known):,}) is in {folder.root}; {example!r} is not there; "
            "set images (--images) to the folder where they are"
        )
    entries = len(into.rows) - before + len(into.dropped) - dropped
    print(printable(f"{source.path}: {entries:,} entries ({source.format}), images in {folder.root}"))


def examine(source: Source, at: Location, found: Entry | str, folder: Folder, into: Gathered) -> Row | Dropped:
    entry = canonical(found) if isinstance(found, dict) else found
    if isinstance(entry, str):
        return Dropped(source, at, "fault", entry)
    kind = "questions" if "question" in entry else "captions"
    into.kind = into.kind or kind
    if kind != into.kind:
        return Dropped(source, at, "fault", f"one of {kind} among {into.kind}; prepare them apart")
    picture = folder.find(entry["image"])
    if not picture:
        missing = f"{folder.root / entry['image']} does not exist"
        return Dropped(source, at, "missing" if source.downloaded else "fault", missing)
    name, side = entry["image"], entry.pop("split", source.split or None)
    into.names[picture.identity] = min(name, into.names.get(picture.identity, name))
    entry["image"] = str(picture.path).removeprefix(into.base).replace(os.sep, "/")
    try:
        line = encode(entry).encode()
    except UnicodeEncodeError:
        return Dropped(source, at, "fault", NOT_UTF8)
    return Row(source, at, picture, side if side or source.downloaded else None, line)


def own_sides(gathered: Gathered) -> dict[object, str]:
    """Image → the side where its data set has it; lines without one are dropped. Empty if none is for training."""
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
                Dropped(row.source, row.at, "unlisted", f"{row.picture.path} is on no side of its data set")
            )
        else:
            reason = f"its image is in {side} here and in {sides[row.picture.identity]} before" if side else NO_SIDE
            gathered.dropped.append(Dropped(row.source, row.at, "fault", reason))
    gathered.rows[:] = kept
    return sides


def drawn_sides(gathered: Gathered, splits: str, seed: int) -> dict[object, str]:
    """Image → side, drawn from the seed alone: neither the order of the lines nor how they spell a path matters."""
    pictures = {row.picture.identity: row.picture.path for row in gathered.rows}
    images = sorted(pictures, key=lambda image: (gathered.names[image], pictures[image]))
    random.Random(seed).shuffle(images)
    sizes = [max(1, round(share * len(images))) if share else 0 for share in shares_of(splits)]
    largest = max(range(len(sizes)), key=lambda n: sizes[n])
    sizes[largest] += len(images) - sum(sizes)
    if sizes[largest] < 1:
        raise DataError(f"{len(images)} image(s) are too few for splits = {splits!r}; give fewer shares, such as 1 or 0.8,0.2")
    return dict(zip(images, (side for side, size in zip(SIDES, sizes, strict=True) for _ in range(size)), strict=True))


def shares_of(splits: str) -> list[float]:
    """The shares of train, val and test; ConfigError if they are none."""
    try:
        shares = [float(part) for part in splits.split(",")]
    except ValueError:
        shares = []
    whole = len(shares) <= len(SIDES) and all(share >= 0 for share in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)
    require(whole, "splits", splits, "shares for train, val and test that add up to 1, such as 0.9,0.05,0.05")
    return shares + [0.0] * (len(SIDES) - len(shares))


def refuse_faults(gathered: Gathered, on_bad_data: str) -> None:
    faults = [dropped for dropped in gathered.dropped if dropped.why == "fault"]
    listed = "\n".join(listing(faults))
    if faults and on_bad_data == "stop":
        elsewhere = ", or set images (--images) to where they are" * any("does not exist" in fault.reason for fault in faults)
        skip = 'or leave them out by on_bad_data = "skip" (--on-bad-data skip)'
        raise DataError(f"{listed}\nnothing was written; fix these{elsewhere}, {skip}")
    if not gathered.rows:
        raise DataError(f"no usable line in the source; nothing was written\n{listed}".strip())


def listing(dropped: list[Dropped]) -> list[str]:
    more = len(dropped) - LISTED
    return [str(one) for one in dropped[:LISTED]] + [f"… and {more:,} more"] * (more > 0)


def write(output: Path, rows: dict[str, list[Row]], dropped: list[Dropped]) -> dict[str, Path]:
    """A file for each side that has lines, and one for what was dropped, each whole or not at all."""
    told = [{"file": str(one.source.path), "at": one.at, "why": one.why, "reason": one.reason} for one in dropped]
    files = {DROPPED: b"".join(json.dumps(one).encode() + b"\n" for one in told)}
    files |= {f"{side}.jsonl": b"".join(row.line + b"\n" for row in rows[side]) for side in SIDES}
    refuse_existing(output)  # again, in case that another run was faster
    for name, content in files.items():
        if content:
            write_whole(output / name, content)
    return {name.removesuffix(".jsonl"): output / name for name, content in files.items() if content}


def report(files: dict[str, Path], rows: dict[str, list[Row]], gathered: Gathered) -> None:
    """How many lines and images came in, went where, and were left out why."""
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
            print("\n".join(f"    {line}" for line in (listing(these) if why == "fault" else [f"first {these[0]}"])))


def _side(row: Row) -> str | None:
    return SPLITS.get(str(row.side).lower())
