"""`python -m lora_blip prepare`: convert data to train.jsonl, val.jsonl and test.jsonl, split by image."""

import json
import os
import random
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from lora_blip.data import columns
from lora_blip.data.entries import NOT_UTF8, SPLITS, Entry, LeftOut, Location, canonical, in_all_lines, in_this_line
from lora_blip.data.example import many_objects
from lora_blip.data.formats import keys_of
from lora_blip.data.grouping import Groups, draw, equal_files, joined
from lora_blip.data.prepare.dropped import Dropped, dropped_lines, first_lines
from lora_blip.data.prepare.folders import Folder, ImageFile
from lora_blip.data.prepare.next_step import next_step
from lora_blip.data.prepare.packed import removed_on_error
from lora_blip.data.prepare.part_sizes import DEFAULT_SPLITS, SPLIT_NAMES, part_sizes, split_fractions
from lora_blip.data.prepare.sources import Source, find_sources
from lora_blip.data.prepare.split_names import with_splits_of_folders
from lora_blip.data.several_files import of_several_files, refuse_unknown_keys
from lora_blip.data.splits import trained_test_folders
from lora_blip.data.summary import Sample, one_problem, spread, summary
from lora_blip.errors import ConfigError, DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.files import refuse_unwritable, write_whole
from lora_blip.runtime.progress import phase
from lora_blip.runtime.settings import check, require, setting
from lora_blip.runtime.system_errors import long_path_advice
from lora_blip.runtime.terminal import encodable_output
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.runtime.user_paths import require_folder

DROPPED, IMAGES = "dropped.jsonl", "images"  # IMAGES: the folder of images from Parquet files and shards
encode = json.JSONEncoder(ensure_ascii=False).encode
NO_SPLIT = 'but other lines have a split; set "split": "train", or draw all splits at random (--own-splits false)'


@dataclass(frozen=True)
class PrepareConfig:
    """All settings of `prepare`."""

    source: str = setting(
        "", "what to read: a file, several files separated by commas, or the folder of a data set", path="always"
    )
    images: str = setting(
        "", "folder of the images; empty: the source's folder, or the folder above a data set's texts", path="always"
    )
    template: str = setting(
        "", 'caption of each image in a folder, instead of text files, such as "a photo of a {class}"; {name}: the file\'s name'
    )
    output_dir: str = setting(
        "prepared", "folder of train.jsonl, val.jsonl and test.jsonl; no file is overwritten", path="always"
    )
    format: Literal[
        "auto", "jsonl", "json", "tsv", "csv", "xlsx", "coco", "vqa", "karpathy", "flickr8k", "flickr30k", "textcaps", "llava",
        "via", "labelstudio", "labelstudio_min", "kohya", "visual_genome", "gqa", "aokvqa", "folder", "parquet", "shard",
    ] = setting("auto", "format of the source; auto: detect it from the content")  # fmt: skip
    image_key: str = setting("", "column or key of the image path; empty: a common name, such as image or file_name")
    text_key: str = setting("", "column or key of the text; empty: a common name, such as text or caption")
    question_key: str = setting("", "column or key of the question; empty: question")
    answer_key: str = setting("", "column or key of the answers; empty: answers or answer")
    splits: str = setting(DEFAULT_SPLITS, "fractions of the images for train, val and test; 1: only train; 0,1: only val")
    group_by: str = setting(
        "", 'keep the images of a group together: "folder", a column such as "video", or a regex such as "(video[0-9]+)"'
    )
    own_splits: bool = setting(True, "use the splits of the data set, if it has any; false: draw random splits")
    seed: int = setting(0, "seed of the random splits")
    on_bad_data: Literal["stop", "skip"] = setting("stop", "what to do if a line or entry is invalid")

    def __post_init__(self) -> None:
        check(self)
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        split_fractions(self.splits)
        if not self.source.strip():
            raise ConfigError("source is empty; give a file or the folder of a data set: --source captions.tsv")
        require_folder("images", self.images)


class Row(NamedTuple):
    """A valid line of an output file, and the place of its entry in the source."""

    source: Source
    at: Location
    image: ImageFile
    split: str | None  # its split in the data set; "": the image is in no split; None: the data set has no splits
    line: bytes  # the JSON, without a line break


@dataclass
class PreparedData:
    """The valid and the dropped lines of all sources."""

    base: str  # the output folder with a final slash; it is removed from the paths of images inside it
    rows: list[Row] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    names: dict[object, str] = field(default_factory=dict)  # image identity → its alphabetically first name
    groups: Groups = field(default_factory=lambda: Groups(""))
    kind: str = ""  # "captions" or "questions"; a source with both is an error
    notes: list[str] = field(default_factory=list)  # texts about the sources, for the table of what was read


@encodable_output()
@many_objects()  # garbage collection would need a third of the time
def prepare(config: PrepareConfig) -> dict[str, Path]:
    """Read, check, split and write the data. Return {split: file}. If an error is raised, no file is written."""
    output = Path(config.output_dir)
    refuse_existing(output)
    with removed_on_error(output / IMAGES):
        return _prepare(config, output)


def _prepare(config: PrepareConfig, output: Path) -> dict[str, Path]:
    print(printable(f"reading {config.source} …"), flush=True)
    data = PreparedData(f"{output.absolute()}{os.sep}", groups=Groups(config.group_by))
    keys = keys_of(config)
    for source in (sources := find_sources(config.source, config.format, keys, config.template)):
        folder = Folder(source.image_root(config.images))
        name = lambda: f"reading {source.path}: {counted(len(data.rows), 'line')}"  # noqa: E731 (called in this block)
        with phase(name), of_several_files(keys, len(sources) > 1):
            read_source(source, folder, data, several=len(sources) > 1)
    if data.rows:
        data.dropped = [replace(one, reason=in_this_line(one.reason)) for one in data.dropped]
    split_of_image = published_splits(data) if config.own_splits else {}
    refuse_faults(data, config.on_bad_data)
    data.groups.require_found()
    if split_of_image:
        reason = "the data have splits of their own; to draw random ones, give --own-splits false"
        data.groups.note_unused(reason)
        if split_fractions(config.splits) != split_fractions(DEFAULT_SPLITS):
            print(printable(f"splits = {config.splits!r} has no effect: {reason}"))
    elif config.own_splits and (warning := trained_test_folders([data.names[row.image.identity] for row in data.rows])):
        print(printable(warning))
    split_of_image = split_of_image or random_splits(data, config.splits, config.seed)
    rows = {split: [row for row in data.rows if split_of_image[row.image.identity] == split] for split in SPLIT_NAMES}
    with phase(f"writing {counted(len(data.rows), 'line')} to {output}"):
        files = write(output, rows, data.dropped)
    report(files, rows, data, split_fractions(config.splits)[0] == 1)
    return {split: files[split] for split in SPLIT_NAMES if split in files}


def refuse_existing(output: Path) -> None:
    """Raise ConfigError if an output file exists, or if the folder is not writable."""
    refuse_unwritable(str(output))
    if existing := [name for name in (*(f"{split}.jsonl" for split in SPLIT_NAMES), DROPPED) if os.path.lexists(output / name)]:
        raise ConfigError(
            f"{output / existing[0]} already exists and is not overwritten; choose another output_dir (--output-dir prepared_2)"
        )


def read_source(source: Source, folder: Folder, data: PreparedData, several: bool = False) -> None:
    """Add each entry of a source to `data`: to its rows, or to its dropped lines with the reason. several: there are others."""
    before, dropped = len(data.rows), len(data.dropped)
    read = source.split_entries if source.folder_splits else source.entries
    for at, entry_or_reason in source.unpack(Path(data.base, IMAGES)) if source.unpack else read():
        result = row_of(source, at, entry_or_reason, folder, data)
        if isinstance(result, Row):
            data.rows.append(result)
        else:
            data.dropped.append(result)
    if folder.known and all(isinstance(image, str) and "does not exist" in image for image in folder.known.values()):
        example = next(iter(folder.known))
        # packed sources are read only once
        entries = [] if source.unpack else [canonical(entry) for _, entry in source.entries() if not isinstance(entry, str)]
        swapped = columns.swapped([entry.get("text", "") for entry in entries if not isinstance(entry, str)])
        fix = swapped or long_path_advice(folder.root / example) or "give the folder of the images: --images FOLDER"
        raise DataError(
            f"{source.path}: no image of {len(folder.known):,} is in {folder.root}; {example!r} does not exist there; {fix}"
        )
    count = len(data.rows) - before + len(data.dropped) - dropped
    if several:
        refuse_unknown_keys(source.path, [(one.at, one.reason) for one in data.dropped[dropped:]], count)
    data.notes += [*source.describe(count, folder.root), *filter(None, [folder.finder.describe()])]


def row_of(source: Source, at: Location, entry_or_reason: Entry | str, folder: Folder, data: PreparedData) -> Row | Dropped:
    """Return the row of an entry, or a Dropped with the reason. If `entry_or_reason` is a text, it is the reason."""
    entry = canonical(entry_or_reason) if isinstance(entry_or_reason, dict) else entry_or_reason
    if isinstance(entry, str):
        return Dropped(source, at, "left out" if isinstance(entry, LeftOut) else "fault", entry)
    kind = "questions" if "question" in entry else "captions"
    data.kind = data.kind or kind
    if kind != data.kind:
        reason = f"a {kind[:-1]}, but the first line has a {data.kind[:-1]}; prepare captions and questions separately"
        return Dropped(source, at, "fault", reason)
    image = folder.find(entry["image"])
    if isinstance(image, str):
        return Dropped(source, at, "missing" if source.may_lack_images and "does not exist" in image else "fault", image)
    name, split = entry["image"], entry.pop("split", None)
    data.names[image.identity] = min(name, data.names.get(image.identity, name))
    data.groups.add(image.identity, name, image.path, entry_or_reason if isinstance(entry_or_reason, dict) else None)
    entry["image"] = str(image.path).removeprefix(data.base).replace(os.sep, "/")
    try:
        line = encode(entry).encode()
    except UnicodeEncodeError:
        return Dropped(source, at, "fault", NOT_UTF8)
    return Row(source, at, image, split or source.split or (split if source.downloaded else None), line)


def published_splits(data: PreparedData) -> dict[object, str]:
    """Return {image identity: its split}. Drop lines without a split. Return {} if all lines have none, or val or test."""
    data.rows[:] = with_splits_of_folders(data.rows, [data.names[row.image.identity] for row in data.rows])
    splits = set(map(_split_of, data.rows))
    if "train" not in splits and not (None in splits and len(splits) > 1):
        return {}
    split_of_image, kept = dict[object, str](), list[Row]()
    for row in data.rows:
        split = _split_of(row)
        if split and split_of_image.setdefault(row.image.identity, split) == split:
            kept.append(row)
        elif row.split == "":
            data.dropped.append(Dropped(row.source, row.at, "unlisted", f"{row.image.path} is in no split of its data set"))
        else:
            other = split_of_image.get(row.image.identity)
            own = f"it has no split, {NO_SPLIT}" if row.split is None else f"its split is {quoted(row.split)}, {NO_SPLIT}"
            reason = f"the split of its image is {split} here and {other} in an earlier line" if split else own
            data.dropped.append(Dropped(row.source, row.at, "fault", reason))
    data.rows[:] = kept
    return split_of_image


def random_splits(data: PreparedData, splits: str, seed: int) -> dict[object, str]:
    """Return {image identity: a random split}, which does not depend on the order of lines or on the spelling of paths."""
    paths = {row.image.identity: row.image.path for row in data.rows}
    images = sorted(paths, key=lambda image: (data.names[image], paths[image]))
    sizes = part_sizes(splits, len(images))
    parts = sum(map(bool, sizes))
    groups = joined(images, data.groups.links, equal_files(paths.items()) if parts > 1 else [], parts)
    random.Random(seed).shuffle(groups)
    groups.reverse()
    result: dict[object, str] = {}
    for split, size in list(zip(SPLIT_NAMES, sizes, strict=True))[:0:-1]:  # the first part gets the rest
        drawn, groups = draw(groups, size)
        result |= dict.fromkeys(drawn, split)
    result |= dict.fromkeys((image for group in groups for image in group), SPLIT_NAMES[0])
    if empty := {split for split, size in zip(SPLIT_NAMES, sizes, strict=True) if size} - set(result.values()):
        raise DataError(f"splits = {splits!r}: no group is left for {', '.join(sorted(empty))}; give --splits 1")
    return result


def refuse_faults(data: PreparedData, on_bad_data: str) -> None:
    """Raise DataError if a line is invalid and `on_bad_data` is "stop", or if no line is valid."""
    faults = [dropped for dropped in data.dropped if dropped.category == "fault"]
    listed = "\n".join(first_lines(faults or data.dropped))
    if not data.rows and (message := one_problem([fault.reason for fault in faults])):
        fix = "; give the folder of the images (--images FOLDER)" * ("does not exist" in faults[0].reason)
        first = replace(faults[0], reason=in_all_lines(faults[0].reason))
        raise DataError(f"{first_lines([first])[0]} ({message})\nnothing was written{fix}")
    if faults and on_bad_data == "stop":
        is_missing = any("does not exist" in fault.reason for fault in faults)
        elsewhere = ", or give the folder of the images (--images FOLDER)" * is_missing
        skip = 'or leave them out with on_bad_data = "skip" (--on-bad-data skip)'
        raise DataError(f"{listed}\nnothing was written; fix these lines{elsewhere}, {skip}")
    if not data.rows:
        raise DataError(f"the source has no usable line; nothing was written\n{listed}".strip())


def write(output: Path, rows: dict[str, list[Row]], dropped: list[Dropped]) -> dict[str, Path]:
    """Write a file for each split that has lines, and one for the dropped lines. Return {split or "dropped": file}."""
    reasons = [{"file": str(one.source.path), "at": one.at, "why": one.category, "reason": one.reason} for one in dropped]
    files = {DROPPED: b"".join(json.dumps(one).encode() + b"\n" for one in reasons)}
    files |= {f"{split}.jsonl": b"".join(row.line + b"\n" for row in rows[split]) for split in SPLIT_NAMES}
    refuse_existing(output)  # again: another run may have written files since the first check
    written = []
    try:
        for name, content in files.items():
            if content:
                write_whole(output / name, content)
                written.append(output / name)
    except BaseException:
        for path in written:  # a part of the splits would look like the whole data set
            with suppress(OSError):
                path.unlink()
        raise
    return {name.removesuffix(".jsonl"): output / name for name, content in files.items() if content}


def report(files: dict[str, Path], rows: dict[str, list[Row]], data: PreparedData, only_train: bool) -> None:
    """Print a table of what was read and dropped, and the numbers of lines and images of each split, and what to do next."""
    lines = (json.loads(data.rows[index].line) for index in spread(len(data.rows)))
    samples = [Sample(one["image"], one.get("text", ""), one.get("question", ""), one.get("answers", ())) for one in lines]
    images = len({row.image.identity for row in data.rows})
    texts = {data.kind: len(data.rows), "repeated": len(data.rows) - len({row.line for row in data.rows})}
    reasons = [*dropped_lines(data.dropped), f"listed in {files['dropped']}"] if data.dropped else []
    print(summary(data.notes, images, texts, len(data.dropped), reasons, samples))
    for split in (split for split in SPLIT_NAMES if rows[split]):
        images = len({row.image.identity for row in rows[split]})
        texts_of_split = counted(len(rows[split]), data.kind.removesuffix("s"))
        print(printable(f"{split:7} {texts_of_split:>18} of {counted(images, 'image')} → {files[split]}"))
    print("the images were found, but not decoded; training and evaluation decode them")
    print(printable(f"next: {next_step(files, data.kind, only_train)}"))


def _split_of(row: Row) -> str | None:
    """Return "train", "val" or "test", or None if the row has no split with a known name."""
    return SPLITS.get(str(row.split).lower())
