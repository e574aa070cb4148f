"""Split examples by image or by group of images: all lines of an image are on the same side."""

import random
from collections.abc import Callable, Collection, Sequence
from itertools import compress
from pathlib import Path

from lora_blip.data.example import FILE, Example, ExampleBuilder, Lines, many_objects
from lora_blip.data.grouping import Groups, draw, equal_files, joined
from lora_blip.data.paths import in_walking_order, resolved
from lora_blip.data.prepare.split_names import SPLIT_NAME, folder_splits, split_of_folders
from lora_blip.errors import DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable, quoted

Part = tuple[ExampleBuilder, Lines, Callable[[int, Path], list[str]]]  # of the data: a file, its lines, and its description
RULES = 2  # version of `lines_for_training`. Adapter files contain it; if they do not, the version is 1
ONE_GROUP = "choose another column or regex (--group-by), or set VAL_ANNOTATIONS to a file of other images"


def split_by_image(
    examples: list[Example], fraction: float, seed: int, groups: Groups | None = None, compare_bytes: bool = False
) -> tuple[list[Example], list[Example]]:
    """Return the training examples and the validation examples.

    The validation images are a random sample, drawn with `seed`. Its size is `fraction` of all images, and at least one image
    if `fraction` is above 0. All lines of an image are in the same part. All images of a group are in the same part.

    groups: the groups of image files. compare_bytes: read the files, and keep those with equal bytes in the same part.
    Raise DataError if no image is left for training.
    """
    with many_objects():
        files = resolved(dict.fromkeys(map(FILE, examples)))  # two lines may spell the path of one image differently
        images = sorted(dict.fromkeys(files.values()), key=in_walking_order)  # fast if the lines are already sorted
        count = max(1, round(len(images) * fraction)) if fraction > 0 else 0
        if count >= len(images):
            message = f"val_fraction = {fraction} of {counted(len(images), 'image')} leaves none for training"
            smaller = "a smaller number, or to " * (len(images) > 1)
            raise DataError(f"{message}; set VAL_FRACTION to {smaller}0 (--val-fraction 0)")
        links = [(files[file], group) for file, group in (groups.links if groups else ()) if file in files]
        equal = equal_files((image, image) for image in images) if compare_bytes and count else []
        if (links or equal) and count:
            image_groups = joined(images, links, equal, 2)
            random.Random(seed).shuffle(image_groups)
            held_out = set(draw(image_groups, count)[0])
        else:
            random.Random(seed).shuffle(images)
            held_out = set(images[:count])
        if len(held_out) == len(images):
            raise DataError(f"group_by = {groups.group_by if groups else ''!r} gives one group of all images; {ONE_GROUP}")
        is_held_out = [files[file] in held_out for file in map(FILE, examples)]
        return list(compress(examples, (not out for out in is_held_out))), list(compress(examples, is_held_out))


def held_out_split(splits: Collection[str], names: Sequence[str] = ("test", "val")) -> str:
    """Return the first of these names among the splits of some lines, or "" if there is only one split.

    splits: the split of each line, or "" for a line without a split.
    """
    return next((name for name in names if name in splits and len(set(splits)) > 1), "")


def lines_without_split(examples: list[Example], lines_by_split: dict[str, list[Example]]) -> list[Example]:
    """Return the lines without a known split. Return [] if there is a line of train, or if no line has a split.

    These lines are for training, because the other lines are of val or test.
    """
    if not lines_by_split or "train" in lines_by_split:
        return []
    marked = {id(example) for lines in lines_by_split.values() for example in lines}
    return [example for example in examples if id(example) not in marked]


def lines_for_training(examples: list[Example], lines_by_split: dict[str, list[Example]], rules: int = RULES) -> list[Example]:
    """Return the lines of train. If there are none, return the lines without a known split, or all lines.

    rules: the version of this rule. In version 1, folders of images were no splits. Without a line of train, it used all lines.
    """
    if rules == 1:
        by_folder = folder_splits([example.name for example in examples])
        return examples if by_folder else lines_by_split.get("train") or examples
    return lines_by_split.get("train") or lines_without_split(examples, lines_by_split) or examples


def one_split_used(source: object, split: str, count: int, total: int) -> str:
    """Return a line about data of which only one split is used: `count` of `total` lines."""
    left_out = f"{counted(total - count, 'line')} left out"
    advice = "to use other lines, write them to a file of their own"
    return printable(f"{source}: its split {split} is used: {counted(count, 'line')}, {left_out}; {advice}")


def of_one_split(source: object, parts: list[Part], only: Sequence[str], report: Callable[[str], object]) -> list[Part]:
    """Return the parts with the lines of one split, if the data have several. Report how many lines are left out.

    Without splits, use the first folders of the images. only: the names of the splits to choose from, best first. Invalid
    lines whose split is unknown are kept.
    """
    add_folder_splits(parts)
    lines = [(builder, line) for builder, parsed, _ in parts for line in parsed if isinstance(line, Example)] if only else []
    split = held_out_split({builder.splits.get(line.line, "") for builder, line in lines}, only)
    if not split:
        return parts
    kept = sum(builder.splits.get(line.line) == split for builder, line in lines)
    report(one_split_used(source, split, kept, len(lines)))
    return [(builder, builder.only(split, parsed), describe) for builder, parsed, describe in parts]


def trained_test_folders(names: Sequence[str]) -> str:
    """Return a warning if some images are in a folder test or val, and are for training, because none is in a folder train.

    Return "" if all images are in such folders: the user has chosen them.
    """
    found = list(map(split_of_folders, names))
    held_out = [name for name, split in zip(names, found, strict=True) if split]
    if "train" in found or not 0 < len(held_out) < len(names):
        return ""
    return (
        f"warning: {counted(len(held_out), 'line')} of {len(names):,} with an image in a folder that is named as a split, such "
        f"as {quoted(held_out[0])}, for training too: no folder is named train. If these images are for a test, move the "
        "others into a folder train"
    )


def add_folder_splits(parts: list[Part]) -> None:
    """Store the folders train, val and test of the images as splits, if no line has a split. See `folder_splits`.

    A file with the name of a split, such as test.jsonl, is not divided.
    """
    if any(b.splits or not b.use_splits or SPLIT_NAME.search(Path(b.source).name) for b, _, _ in parts):
        return
    names = [builder.names(parsed) for builder, parsed, _ in parts]
    found = iter(folder_splits([name for of in names for name in of.values()]))
    for (builder, _, _), of in zip(parts, names, strict=True):
        builder.splits.update({at: split for at, split in zip(of, found, strict=False) if split})
