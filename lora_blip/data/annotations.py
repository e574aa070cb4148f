"""Read and check annotations in any format that `prepare.sources` detects. A line of JSONL has one of two forms:

{"image": "red_1.jpg", "text": "a red cube"}
{"image": "red_1.jpg", "question": "what is it?", "answers": ["a red cube", "red cube"]}
"""

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from lora_blip.data import columns
from lora_blip.data.decoding import undecodable
from lora_blip.data.entries import KeyFault, LeftOut, Located, Location, SomeLinesError, in_all_lines, in_this_line
from lora_blip.data.example import IMAGE_SLOT, Example, ExampleBuilder, Lines, many_objects
from lora_blip.data.formats import NO_KEYS, Keys, is_plain_jsonl, jsonl_entries
from lora_blip.data.grouping import Groups, observed
from lora_blip.data.image_paths import moved_images, same_names, used_root
from lora_blip.data.image_roots import none_found
from lora_blip.data.json_repair import rename_command
from lora_blip.data.prepare.sources import Source, find_sources
from lora_blip.data.several_files import of_several_files, refuse_unknown_keys
from lora_blip.data.splits import Part, of_one_split
from lora_blip.data.summary import LISTED, ReadLines, listing, one_problem
from lora_blip.errors import DataError, ImageError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import os_error_reason, printable, printable_lines, quoted
from lora_blip.runtime.user_paths import ANNOTATIONS, missing_annotations

MANY = 100_000  # from this number of lines, the garbage collector ignores the examples for the rest of the run
TABLES = (".csv", ".tsv", ".xlsx")
MANY_MISSING = 3  # if all images are missing: smallest number of images for which one error replaces the list
SKIP = 'fix the lines, or set ON_BAD_DATA = "skip" (--on-bad-data skip) to leave them out'
CHUNK = 1024  # lines that a task may tokenize in one call, before each line is checked


@dataclass(frozen=True, slots=True)  # slots: an invalid file can have a million problems
class Problem:
    """A line or entry that cannot be used, with the reason."""

    source: Path
    line: Location
    reason: str

    def __str__(self) -> str:
        return printable(f"{located(self.source, self.line)}: {self.reason}")


def located(source: Path | str, at: Location) -> str:
    """Return the file and place of an entry as one text, such as "x.csv:17" or "x.json: annotations[17]"."""
    return f"{source}:{'' if isinstance(at, int) else ' '}{at}"


def read(
    source: str | Path,
    image_root: str | Path = "",
    on_bad_data: str = "stop",
    check: Callable[[Example], str] | None = None,
    decode: bool = True,
    find_all: bool = True,
    pretokenize: Callable[[list[Example]], None] | None = None,
    trim: Callable[[Example], Example] | None = None,
    report: Callable[[Any], object] = print,
    on_decoded: Callable[[str, Image.Image], object] | None = None,
    keys: Keys = NO_KEYS,
    splits: dict[str, list[Example]] | None = None,
    only: Sequence[str] = (),
    groups: Groups | None = None,
    setting: str = "annotations",
) -> tuple[list[Example], list[Problem]]:
    """Return the valid lines as Examples, and the invalid lines as Problems.

    A line is valid if it can be parsed, has the keys of a caption or a question, has no empty text, and passes `check`. With
    `decode`, its image must also exist and be readable.

    image_root: the folder that image paths are relative to. Empty: the folder of the file.
    check: a task's check. It returns why the task cannot use an example, or "" if it can.
    decode: if True, decode each image once, to find missing and damaged images. If False, open no image. find_all: find each
    image that has moved. If False, search the other images only if one of the first has moved.
    pretokenize: called with up to CHUNK examples before they are checked. trim: removes the task's prompt from the texts.
    report: called with each message, such as the one about ignored keys, and at the end with a table of what was read.
    on_decoded: called with each image file and its decoded image, from several threads.
    keys: the names of the columns or keys, if they are not common names. splits: a dict to which valid lines are added by split
    (train, val, test), if they have one. only: names of splits, best first. Of data with several splits, only one is read.
    groups: collects the group of each image file. setting: the name of the setting, for messages.

    Raise DataError if no line is valid, or if a line is invalid and `on_bad_data` is "stop". The message lists the problems.
    """
    source = Path(source)
    valid_lines, problems = list[Example](), list[Problem]()
    notes: list[Callable[[], list[str]]] = []  # each returns texts about a file, for the table
    with many_objects():
        parts = list(_parts(source, image_root, keys, groups, setting, splits is not None or bool(only), report))
        for builder, parsed, describe in of_one_split(source, parts, only, report) if splits is not None or only else parts:
            parsed = trimmed(builder.source, parsed, trim, report) if trim else parsed
            broken = _find_moved(parsed, builder, decode, find_all, report)
            if decode:
                files = {example.file for example in parsed if isinstance(example, Example)} - broken.keys()
                broken |= undecodable(files, on_decoded, report)
            valid, invalid = _checked(Path(builder.source), parsed, broken, check, pretokenize)
            _collect(valid, builder, splits, groups, report)
            notes.append(partial(describe, len(parsed), builder.root))
            valid_lines, problems = (valid_lines + valid if valid_lines else valid), problems + invalid
    if valid_lines:
        problems = [replace(problem, reason=in_this_line(problem.reason)) for problem in problems]
    unused, problems = problems, [problem for problem in problems if not isinstance(problem.reason, LeftOut)]
    if len(valid_lines) >= MANY:
        gc.freeze()  # a collection writes to each object, and a forked worker must then copy its memory
    _refuse(source, valid_lines, problems, unused, on_bad_data)
    report(ReadLines(valid_lines, unused, notes))
    return valid_lines, problems


def _refuse(source: Path, valid_lines: list[Example], problems: list[Problem], unused: list[Problem], on_bad_data: str) -> None:
    """Raise DataError if no line is valid, or if a line is invalid and `on_bad_data` is "stop"."""
    if not valid_lines and (message := one_problem([problem.reason for problem in problems])):
        raise DataError(f"{replace(problems[0], reason=in_all_lines(problems[0].reason))} ({message})")
    fixes = Counter(problem.reason.end for problem in problems if isinstance(problem.reason, KeyFault))
    fix, count = (fixes.most_common(1) or [("", 0)])[0]
    if not valid_lines and len(fixes) > 1 and 2 * count > len(problems):  # the other lines are wrong in another way
        first = next(problem for problem in problems if isinstance(problem.reason, KeyFault) and problem.reason.end == fix)
        lines = f"{count:,} of {counted(len(problems), 'line')} have this problem"
        raise DataError(f"{replace(first, reason=in_all_lines(first.reason))} ({lines})")
    if problems and on_bad_data == "stop":
        rename = "" if valid_lines else rename_command(source, (problem.reason for problem in problems))
        kind = SomeLinesError if valid_lines else DataError
        raise kind(f"{problems[0]}\n{rename}" if rename else f"{listing(problems)}\n{SKIP}")
    if not valid_lines:
        raise DataError(f"{source}: no usable line\n{listing(problems or unused) or ANNOTATIONS}")


def _collect(
    valid: list[Example], builder: ExampleBuilder, splits: dict[str, list[Example]] | None, groups: Groups | None,
    report: Callable[[str], object],
) -> None:  # fmt: skip
    """Add the valid lines to their splits, and their images to their groups. Report the lines with their own prompt."""
    if builder.prompts and (count := sum(bool(example.prompt) for example in valid)):
        message = f"{count:,} of {counted(len(valid), 'line')} with an own prompt, which is used instead of PROMPT"
        report(printable(f"{builder.source}: {message}"))
    for example in valid if splits is not None or groups else ():
        if groups:
            groups.add(example.file, example.name, example.file, builder.group_entries.get(example.line))
        if splits is not None and (split := builder.splits.get(example.line)):
            splits.setdefault(split, []).append(example)


def sources_of(
    source: Path, keys: Keys, setting: str, use_splits: bool
) -> list[tuple[Path, Path, Callable[[], Iterator[Located]], Callable[[int, Path], list[str]]]]:
    """Return (file, default folder of its images, reader of its entries, reader of its description) for each file to read.

    use_splits: if there are several files, give an entry without a split the split of its file: train for captions_train.json.
    Raise DataError if a file does not exist, cannot be read, or has an unknown format.
    """
    if not (exists := os.path.lexists(source)) and "," not in str(source):  # a comma separates the names of several files
        raise missing_annotations(source, setting)
    if exists and is_plain_jsonl(source, keys):
        one = Source(source, "jsonl", partial(jsonl_entries, source))
        return [(source, source.parent, one.entries, one.describe)]
    try:
        sources = find_sources(str(source), keys=keys, flag=f"--{setting.replace('_', '-')}")
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None
    with_splits = use_splits and (len(sources) > 1 or any(one.folder_splits for one in sources))
    return [(one.path, one.root, one.split_entries if with_splits else one.entries, one.describe) for one in sources]


def _parts(
    source: Path, image_root: str | Path, keys: Keys, groups: Groups | None, setting: str, use_splits: bool,
    report: Callable[[str], object],
) -> Iterator[Part]:  # fmt: skip
    """Yield the parsed lines of each file of the data. The parameters are those of `read`."""
    for path, root, entries, describe in (files := sources_of(source, keys, setting, use_splits)):
        builder = ExampleBuilder(path, used_root(path, root, image_root, report), use_splits)
        builder.own_root = root
        read = entries if groups is None else partial(observed, entries, builder.group_entries, groups)
        with of_several_files(keys) if len(files) > 1 else nullcontext():
            lines = _parsed(path, read, builder, report)
            if len(files) > 1:
                refuse_unknown_keys(path, [line for line in lines if not isinstance(line, Example)], len(lines))
        yield builder, lines, describe


def _parsed(
    source: Path, entries: Callable[[], Iterator[Located]], builder: ExampleBuilder, report: Callable[[str], object]
) -> Lines:
    """Return an Example, or (location, reason), for each entry. Report the keys that are ignored."""
    try:
        parsed = [builder.build(entry, number) for number, entry in entries()]
    except OSError as error:
        raise DataError(f"annotations {str(source)!r} cannot be read ({os_error_reason(error)}); {ANNOTATIONS}") from None
    if builder.ignored:
        report(printable_lines(f"{source}: these keys are ignored: {_describe_ignored(builder)}"))
    return parsed


def _find_moved(
    parsed: Lines, builder: ExampleBuilder, decode: bool, find_all: bool, report: Callable[[str], object]
) -> dict[str, str]:
    """Set the new paths of moved images in `parsed`. If `decode`, return {image file: reason} for the images not found."""
    firsts = ((name, first.file) for name, first in builder.firsts.items())
    moved, missing = moved_images(firsts, builder.root, find_all, lambda text: report(printable(f"{builder.source}: {text}")))
    if warning := same_names(builder.root, builder.own_root, builder.firsts):
        report(printable(f"{builder.source}: {warning}"))
    for example in parsed if moved else ():
        if isinstance(example, Example) and example.file in moved:
            IMAGE_SLOT.__set__(example, moved[example.file])
    if decode and MANY_MISSING <= len(builder.firsts) == len(missing):
        fix = columns.swapped([example.text for example in builder.firsts.values()])
        text = none_found(builder.root, builder.own_root, list(builder.firsts), next(iter(missing.values())), fix)
        raise DataError(printable(f"{builder.source}: {text}"))
    return missing if decode else {}


def trimmed(
    source: str | Path, lines: Lines, trim: Callable[[Example], Example], report: Callable[[str], object] = print
) -> Lines:
    """Return the lines with the prompt removed from the start of their texts. Report the number of changed lines.

    A line whose text is only the prompt becomes invalid.
    """
    result, count, first = list(lines), 0, ""
    for index, line in enumerate(lines):
        if isinstance(line, Example) and (changed := trim(line)) is not line:
            count, first = count + 1, first or f"line {line.line}: {quoted(line.words)} is now {quoted(changed.words)}"
            empty = not changed.text if line.text else not all(changed.answers)
            result[index] = (line.line, "the text is only the prompt; add the words after it") if empty else changed
    if count:
        removed = f"{source}: removed the prompt from the start of {counted(count, 'line')}, because training"
        report(printable(f"{removed} puts the prompt before each text; {first}"))
    return result


def _describe_ignored(builder: ExampleBuilder) -> str:
    """Return the ignored keys as one text: each with its lines, the first one, and the key that it may misspell."""
    some = [
        f"{quoted(key)} ({counted(count, 'line')}, first line {first}{f'; did you mean {typo}?' if typo else ''})"
        for key, (count, first, typo) in sorted(builder.ignored.items(), key=lambda item: not item[1][2])
    ]
    return ", ".join(some[:LISTED] + [f"and {len(some) - LISTED} more"] * (len(some) > LISTED)) + builder.split_warning()


def _checked(
    source: Path, parsed: Lines, broken: dict[str, str],
    check: Callable[[Example], str] | None, pretokenize: Callable[[list[Example]], None] | None,
) -> tuple[list[Example], list[Problem]]:  # fmt: skip
    """Return the valid lines and the problems. broken: {image file: the reason why it cannot be read}."""
    valid_lines: list[Example] = []
    problems: list[Problem] = []
    for start in range(0, len(parsed), CHUNK):
        part = parsed[start : start + CHUNK]
        if pretokenize:
            pretokenize([entry for entry in part if isinstance(entry, Example)])
        for entry in part:
            if isinstance(entry, Example):
                reason = (broken and broken.get(entry.file)) or (check(entry) if check else "")
                if not reason:
                    valid_lines.append(entry)
                    continue
                entry = (entry.line, reason)
            problems.append(Problem(source, *entry))
    return valid_lines, problems


def unreadable(example: Example, error: ImageError) -> DataError:
    """Return the error for a line whose image cannot be decoded during training."""
    at = f"{located(example.source, example.line)}: " if example.source else ""
    return DataError(f'{at}{error}; fix the line, or set CHECK_IMAGES = "all" to get all such lines before training')


def plain(text: str) -> str:
    """Return a text with one space between words."""
    return " ".join(text.split())
