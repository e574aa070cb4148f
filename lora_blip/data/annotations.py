"""Read and check an annotation file, JSONL or TSV. A line is {"image": "red_1.jpg", "text": "a red cube"}, or for questions
{"image": "red_1.jpg", "question": "what is it?", "answers": ["a red cube", "red cube"]}.
"""

import gc
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path

from PIL import Image
from tqdm import tqdm  # comes with transformers

from lora_blip.data.example import FILE, Example
from lora_blip.data.formats import jsonl_entries, tsv_entries
from lora_blip.data.images import open_image
from lora_blip.data.paths import in_walking_order, resolved
from lora_blip.data.records import Lines
from lora_blip.errors import DataError, ImageError
from lora_blip.runtime.untrusted import printable, quoted, why

LISTED = 20  # problems printed before "and N more"
MANY = 100_000  # lines from which on the garbage collector skips the examples for the rest of the run
CHUNK = 1024  # lines whose texts a task may tokenize together before each line is checked


@dataclass(frozen=True, slots=True)  # an invalid file can have a million
class Problem:
    """A line that cannot be used, and why."""

    source: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.source}:{self.line}: {self.reason}")


def read(
    source: str | Path,
    image_root: str | Path = "",
    on_bad_data: str = "stop",
    check: Callable[[Example], str] | None = None,
    decode: bool = True,
    expect: Callable[[list[Example]], None] | None = None,
    trim: Callable[[Example], Example] | None = None,
    report: Callable[[str], object] = print,
    decoded: Callable[[str, Image.Image], object] | None = None,
) -> tuple[list[Example], list[Problem]]:
    """Return each valid line as an Example, and each invalid one as a Problem.

    A line is valid if its JSON and keys are, its texts are not empty, its image exists and can be decoded, and `check`
    accepts it.

    image_root: the folder that image paths are relative to; by default the file's own folder.
    check: returns the reason why a task cannot use an example, or "".
    decode: decode each image; otherwise do not open it.
    expect: called with up to CHUNK examples before they are checked.
    trim: removes a task's prompt from the start of an example's texts.
    report: called with a message about everything that is ignored or changed.
    decoded: called in threads with each image file and its image.

    Raise DataError that lists the problems, if there are any and `on_bad_data` is "stop". Raise it also if no line is valid.
    """
    source = Path(source)
    lines = Lines(source, Path(image_root) if image_root else source.parent)
    entries = tsv_entries(source) if source.suffix == ".tsv" else jsonl_entries(source)
    expected = 'expected a .jsonl file with a line {"image": …, "text": …} per example'
    with many_objects():
        try:
            parsed = [lines.example(entry, number) for number, entry in entries]
        except FileNotFoundError:
            raise DataError(f"annotations {str(source)!r} do not exist; {expected}") from None
        except OSError as error:
            raise DataError(f"annotations {str(source)!r} cannot be read ({why(error)}); {expected}") from None
        if lines.ignored:
            report(printable(f"{source}: these keys are ignored: {_ignored(lines.ignored)}"))
        if trim:
            parsed = trimmed(source, parsed, trim, report)
        broken = _undecodable({p.file for p in parsed if isinstance(p, Example)}, decoded) if decode else {}
        good, problems = _checked(source, parsed, broken, check, expect)
    if lines.prompts and (own := sum(bool(example.prompt) for example in good)):
        message = f"{source}: {own:,} of {len(good):,} line(s) have their own prompt, which is used instead of PROMPT"
        report(printable(message))
    if len(good) >= MANY:
        gc.freeze()  # examples have no cycles, and forked workers share unwritten memory
    if problems and on_bad_data == "stop":
        raise DataError(f'{listing(problems)}\nfix the lines, or set ON_BAD_DATA = "skip" to leave them out')
    if not good:
        raise DataError(f"{source}: no usable line\n{listing(problems)}".strip())
    return good, problems


def trimmed(
    source: str | Path,
    lines: list[Example | tuple[int, str]],
    trim: Callable[[Example], Example],
    report: Callable[[str], object] = print,
) -> list[Example | tuple[int, str]]:
    """Remove the prompt from the start of each line, and report how many changed. Refuse a line of only the prompt."""
    result, count, first = list(lines), 0, ""
    for index, line in enumerate(lines):
        if isinstance(line, Example) and (changed := trim(line)) is not line:
            count, first = count + 1, first or f"line {line.line}: {quoted(line.words)} is now {quoted(changed.words)}"
            empty = not changed.text if line.text else not all(changed.answers)
            result[index] = (line.line, "the text is only the prompt; write what follows the prompt") if empty else changed
    if count:
        message = (
            f"{source}: removed the prompt from the start of {count:,} line(s), because it comes before each text; {first}"
        )
        report(printable(message))
    return result


def _ignored(keys: dict[str, tuple[int, int]]) -> str:
    """Return the ignored keys, with the number of lines and the first line of each."""
    some = [f"{quoted(key)} ({count:,} line(s), first line {first})" for key, (count, first) in keys.items()]
    return ", ".join(some[:LISTED] + [f"and {len(some) - LISTED} more"] * (len(some) > LISTED))


@contextmanager
def many_objects() -> Iterator[None]:
    """Disable the garbage collector inside the block. It would scan all of a million lines again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _checked(
    source: Path,
    parsed: list[Example | tuple[int, str]],
    broken: dict[str, str],
    check: Callable[[Example], str] | None,
    expect: Callable[[list[Example]], None] | None,
) -> tuple[list[Example], list[Problem]]:
    good: list[Example] = []
    problems: list[Problem] = []
    for start in range(0, len(parsed), CHUNK):
        part = parsed[start : start + CHUNK]
        if expect:
            expect([entry for entry in part if isinstance(entry, Example)])
        for entry in part:
            if isinstance(entry, Example):
                reason = (broken and broken.get(entry.file)) or (check(entry) if check else "")
                if not reason:
                    good.append(entry)
                    continue
                entry = (entry.line, reason)
            problems.append(Problem(source, *entry))
    return good, problems


def listing(problems: list[Problem]) -> str:
    """Return the first problems, one per line, and the number of further ones."""
    lines = [str(problem) for problem in problems[:LISTED]]
    return "\n".join(lines + [f"… and {len(problems) - LISTED} more"] * (len(problems) > LISTED))


def split_by_image(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Return the training and validation parts. All lines of an image are in the same part, drawn at random from `seed`.

    At least one image is held out if `fraction` > 0. Raise DataError if none is left to train on.
    """
    with many_objects():
        files = resolved(dict.fromkeys(map(FILE, examples)))  # lines may spell a path differently
        images = sorted(dict.fromkeys(files.values()), key=in_walking_order)  # fast if the lines are sorted
        random.Random(seed).shuffle(images)
        count = max(1, round(len(images) * fraction)) if fraction > 0 else 0
        if count >= len(images):
            message = f"val_fraction = {fraction} of {len(images)} image(s) leaves none to train on"
            raise DataError(f"{message}; lower it, or set it to 0 (--val-fraction)")
        held_out = set(images[:count])
        is_held_out = [files[file] in held_out for file in map(FILE, examples)]
        return list(compress(examples, (not out for out in is_held_out))), list(compress(examples, is_held_out))


def unreadable(example: Example, error: ImageError) -> DataError:
    """Return the error for a line whose image cannot be decoded during training."""
    location = f"{example.source}:{example.line}: " if example.source else ""
    return DataError(f'{location}{error}; fix the line, or set CHECK_IMAGES = "all" to get all such lines before training')


def plain(text: str) -> str:
    """Return a text with one space between words."""
    return " ".join(text.split())


def _undecodable(images: set[str], decoded: Callable[[str, Image.Image], object] | None = None) -> dict[str, str]:
    """Return image → why it cannot be read. Each file is decoded once, in threads: Pillow releases the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(partial(_decode_failure, decoded=decoded), sorted(images))
        reasons = tqdm(reasons, total=len(images), desc="checking", unit="image", disable=None, delay=2, leave=False)
        return {image: reason for image, reason in zip(sorted(images), reasons, strict=True) if reason}


def _decode_failure(image: str, decoded: Callable[[str, Image.Image], object] | None) -> str:
    try:
        decoded_image = open_image(image)
    except ImageError as error:
        return str(error)
    if decoded:
        decoded(image, decoded_image)
    return ""
