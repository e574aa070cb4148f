"""Read the training and validation lines of a run, and split them."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from lora_blip.config import TrainConfig
from lora_blip.data import annotations, splits
from lora_blip.data.example import Example
from lora_blip.data.formats import keys_of
from lora_blip.data.grouping import Groups
from lora_blip.data.several_files import of_several_files
from lora_blip.data.split_leaks import Thumbnails
from lora_blip.runtime.counts import counted
from lora_blip.runtime.progress import phase
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import Task

NO_GROUPS = Groups("")


class Lines(NamedTuple):
    """The checked lines of the data."""

    training: list[Example]
    validation: list[Example]
    drawn: bool  # the validation images were drawn at random, by VAL_FRACTION
    scored: str  # the split of the annotations that `evaluate` scores: "test" or "val", or "" if they have no splits


def read_examples(config: TrainConfig, task: Task, thumbnails: Thumbnails | None = None) -> Lines:
    """Return the checked training lines and validation lines. Shuffle the validation lines with the seed.

    Take the validation lines from `val_annotations` if it is set. Otherwise use the column `split`. Without that column, draw a
    random fraction of the images, and take all their lines. `thumbnails` stores a thumbnail of each decoded image.
    """
    lines_by_split: dict[str, list[Example]] = {}
    groups = Groups(config.group_by)
    examples = read_file(config, task, config.annotations, thumbnails, lines_by_split, groups if config.group_by else None)
    groups.require_found()
    if rest := splits.lines_without_split(examples, lines_by_split):
        lines_by_split["train"], lines = rest, counted(len(rest), "line")
        source = printable(config.annotations)
        print(f"{source}: no line has the split train; {lines} without a known split are used for training")
    if config.val_annotations:
        groups.note_unused(f"the validation lines are those of {config.val_annotations}")
        training = train_lines(config, lines_by_split, len(examples)) or examples
        validation = read_file(config, task, config.val_annotations, thumbnails, only=("val", "test"))
        task.prepare_data([*training, *validation])
    elif lines_by_split.get("train"):
        training, validation = split_by_column(config, lines_by_split, len(examples), groups)
        task.prepare_data([*training, *validation])
    else:
        if warning := splits.trained_test_folders([example.name for example in examples]):
            print(printable(warning))
        task.prepare_data(examples)
        training, validation = split(config, examples, groups)
    # spread the lines of an image over the batches, because lines of one image cannot be negatives of each other
    random.Random(config.seed).shuffle(validation)
    own_validation = lines_by_split.get("train") and lines_by_split.get("val")
    drawn = not (config.val_annotations or own_validation)
    scored = splits.held_out_split(lines_by_split.keys()) if lines_by_split.get("train") else ""
    return Lines(training, validation, drawn, scored)


def split_by_column(
    config: TrainConfig, lines_by_split: dict[str, list[Example]], count: int, groups: Groups = NO_GROUPS
) -> tuple[list[Example], list[Example]]:
    """Return the lines whose split is train, and those whose split is val. Print the number of each.

    The split is the column or key `split`, or a part of the file name. If no line is in val, draw the validation images at
    random from train. count: number of all lines.
    """
    training, validation = lines_by_split["train"], lines_by_split.get("val", [])
    tests = len(lines_by_split.get("test", []))
    others = count - len(training) - len(validation) - tests
    numbers = f"{len(training):,} train, {len(validation):,} val, {tests:,} test (left out)"
    unknown = f", {counted(others, 'line')} left out: the split is none of train, val and test" * bool(others)
    print(f"{printable(config.annotations)}: its splits are used: {numbers}{unknown}")
    if validation:
        groups.note_unused("the data have splits of their own")
        return training, validation
    return split(config, training, groups)


def train_lines(config: TrainConfig, lines_by_split: dict[str, list[Example]], count: int) -> list[Example]:
    """Return the lines whose split is train, and print their number; [] if the data have no splits. count: number of all lines.

    The other lines are not used, because VAL_ANNOTATIONS gives the validation lines.
    """
    training = lines_by_split.get("train", [])
    if training and len(training) < count:
        print(
            f"{printable(config.annotations)}: its splits are used: {len(training):,} train, {count - len(training):,} left "
            f"out; the validation lines are those of {printable(config.val_annotations)}"
        )
    return training


def split(config: TrainConfig, examples: list[Example], groups: Groups) -> tuple[list[Example], list[Example]]:
    """Return the training lines and the validation lines, drawn at random by group.

    Images with equal bytes stay together only if CHECK_IMAGES is "all", because all files are read then anyway.
    """
    if not config.val_fraction:
        groups.note_unused("VAL_FRACTION is 0, so no image is held out")
    return splits.split_by_image(examples, config.val_fraction, config.seed, groups, config.check_images == "all")


def read_file(
    config: TrainConfig,
    task: Task,
    source: str,
    thumbnails: Thumbnails | None,
    lines_by_split: dict[str, list[Example]] | None = None,
    groups: Groups | None = None,
    only: Sequence[str] = (),
) -> list[Example]:
    """Return the valid lines of an annotations file. Print a table of them, and the tokens that the model does not know.

    lines_by_split: if given, the lines are also added to it by the value of their column `split`. only: names of
    splits, best first. Of data with several splits, only one is read.
    """
    decode, keep = config.check_images == "all", thumbnails.add if thumbnails else None
    setting = "val_annotations" if source == config.val_annotations else "annotations"
    with phase(f"reading {source}"), of_several_files(keys_of(config), setting == "val_annotations"):
        examples, _ = annotations.read(
            source,
            config.image_root,
            config.on_bad_data,
            task.check,
            decode=decode,
            find_all=decode,
            pretokenize=task.pretokenize,
            trim=task.trim,
            on_decoded=keep,
            keys=keys_of(config),
            splits=lines_by_split,
            only=only,
            groups=groups,
            setting=setting,
        )
    if report := task.unknown_report(examples):
        print(report)
    return examples
