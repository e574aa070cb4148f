"""Split examples by image or by group of images: all lines of an image are on the same side."""

import random
from itertools import compress

from lora_blip.data.annotations import many_objects
from lora_blip.data.example import FILE, Example
from lora_blip.data.grouping import Groups, draw, equal_files, joined
from lora_blip.data.paths import in_walking_order, resolved
from lora_blip.errors import DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable

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


def held_out_split(lines_by_split: dict[str, list[Example]], names: tuple[str, ...] = ("test", "val")) -> str:
    """Return the first of these splits that the data have, or "" if all their lines are in one split."""
    return next((name for name in names if name in lines_by_split and len(lines_by_split) > 1), "")


def held_out_lines(
    source: str, examples: list[Example], lines_by_split: dict[str, list[Example]], *names: str
) -> list[Example]:
    """Return the lines of the first of these splits that the data have, and print their number. Otherwise return all lines.

    source: the name of the data. examples: all lines. lines_by_split: those with a split.
    """
    if not (name := held_out_split(lines_by_split, names)):
        return examples
    lines = lines_by_split[name]
    left_out = f"{counted(len(examples) - len(lines), 'line')} left out"
    advice = "to use other lines, write them to a file of their own"
    print(printable(f"{source}: its split {name} is used: {counted(len(lines), 'line')}, {left_out}; {advice}"))
    return lines
