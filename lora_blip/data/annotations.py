"""`annotations.jsonl` (or .tsv) → checked examples. A line each: {"image": "red_1.jpg", "text": "a red cube"}.

For questions: {"image": "red_1.jpg", "question": "what is it?", "answers": ["a red cube", "red cube"]}.
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
MANY = 100_000  # lines, which the garbage collector is not to go through for the rest of the run
CHUNK = 1024  # lines whose texts a task may look at together before each is checked


@dataclass(frozen=True, slots=True)  # a wrong file has a million
class Problem:
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
    """Every good line as an Example, and every bad one as a Problem with file and line.

    Image paths are relative to `image_root`, or to the file's own folder. Every line is checked: JSON,
    keys, that the image is there and decodes, that texts are not empty, and `check`, which gives the
    reason why a task cannot use the line, or "". `decode` false leaves the images unopened. `expect` is given
    the lines a thousand at a time before they are checked. `trim` removes a task's prompt from the start of a line's
    texts. `report` is called with a line about each thing that was ignored or changed. `decoded` is called, in threads, with
    each image file and its picture. Raises DataError listing the problems if there are any and `on_bad_data` is "stop",
    and in any case if no line is good.
    """
    source = Path(source)
    lines = Lines(source, Path(image_root) if image_root else source.parent)
    entries = tsv_entries(source) if source.suffix == ".tsv" else jsonl_entries(source)
    expected = 'expected a .jsonl file, a line each {"image": …, "text": …}'
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
        message = f"{source}: {own:,} of {len(good):,} line(s) have a prompt of their own, which replaces PROMPT for them"
        report(printable(message))
    if len(good) >= MANY:
        gc.freeze()  # for good: they hold no cycles, and loader workers share their memory for as long as nobody writes to it
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
    """Remove a repeated prompt from each line, and report how many had one. A line that is nothing else becomes a reason."""
    found, count, first = list(lines), 0, ""
    for place, line in enumerate(lines):
        if isinstance(line, Example) and (made := trim(line)) is not line:
            count, first = count + 1, first or f"line {line.line}: {quoted(line.words)} is now {quoted(made.words)}"
            empty = not made.text if line.text else not all(made.answers)
            found[place] = (line.line, "the text is nothing but the prompt; write what follows the prompt") if empty else made
    if count:
        message = (
            f"{source}: removed the prompt from the start of {count:,} line(s), because it comes before each text; {first}"
        )
        report(printable(message))
    return found


def _ignored(keys: dict[str, tuple[int, int]]) -> str:
    """The keys that are ignored, with the number of lines of each and the first line."""
    some = [f"{quoted(key)} ({count:,} line(s), first line {first})" for key, (count, first) in keys.items()]
    return ", ".join(some[:LISTED] + [f"and {len(some) - LISTED} more"] * (len(some) > LISTED))


@contextmanager
def many_objects() -> Iterator[None]:
    """Without the garbage collector, which would look through all of a million lines again and again."""
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
    """The first problems, a line each, and how many more there are."""
    lines = [str(problem) for problem in problems[:LISTED]]
    return "\n".join(lines + [f"… and {len(problems) - LISTED} more"] * (len(problems) > LISTED))


def split_by_image(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation parts; all lines of an image are on the same side, chosen at random from `seed`.

    At least one image is held out if `fraction` > 0. Raises DataError if nothing is left to train on.
    """
    with many_objects():
        files = resolved(dict.fromkeys(map(FILE, examples)))  # however a line spells its path
        images = sorted(dict.fromkeys(files.values()), key=in_walking_order)  # quick where the lines were in order
        random.Random(seed).shuffle(images)
        count = max(1, round(len(images) * fraction)) if fraction > 0 else 0
        if count >= len(images):
            told = f"val_fraction {fraction} of {len(images)} image(s) leaves none to train on"
            raise DataError(f"{told}; lower it, or set it to 0")
        held_out = set(images[:count])
        aside = [files[file] in held_out for file in map(FILE, examples)]
        return list(compress(examples, (not out for out in aside))), list(compress(examples, aside))


def unreadable(example: Example, error: ImageError) -> DataError:
    """What to raise for a line whose picture turns out to be no good after all lines were taken for good."""
    place = f"{example.source}:{example.line}: " if example.source else ""
    return DataError(f'{place}{error}; fix the line, or set CHECK_IMAGES = "all" to be told of all such lines before training')


def plain(text: str) -> str:
    """One space between words."""
    return " ".join(text.split())


def _undecodable(images: set[str], decoded: Callable[[str, Image.Image], object] | None = None) -> dict[str, str]:
    """Image → why it cannot be read; each file is decoded once, in threads (Pillow lets go of the GIL)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(partial(_decode_failure, decoded=decoded), sorted(images))
        reasons = tqdm(reasons, total=len(images), desc="checking", unit="image", disable=None, delay=2, leave=False)
        return {image: reason for image, reason in zip(sorted(images), reasons, strict=True) if reason}


def _decode_failure(image: str, decoded: Callable[[str, Image.Image], object] | None) -> str:
    try:
        picture = open_image(image)
    except ImageError as error:
        return str(error)
    if decoded:
        decoded(image, picture)
    return ""
