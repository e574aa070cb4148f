"""Make the table that training, `evaluate`, `infer` and `prepare` print: what was read and left out, and samples.

read      captions.csv: 3 entries (csv, ";" between columns), images in /data
images    2
captions  3
left out  1 line
          1 × captions.csv:5: the text is empty
          9 × an image that does not exist, first captions.csv:7: 7.jpg does not exist
samples   1.jpg → a red cube
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from lora_blip.data.example import FILE, Example
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import line_of_list, printable
from lora_blip.runtime.user_paths import relative_if_below

LISTED = 20  # problems or reasons printed before "and N more"
SAMPLES = 3
SEVERAL = 3  # smallest number of lines with one problem that a message does not list
IMAGE_FAULTS = ("does not exist", "is not a usable image", "cannot be decoded", "cannot be read")  # after the path of an image
LONG_ADVICE = 80  # smallest number of characters of an advice that a list of problems does not repeat
LABEL = 10  # width of the first column


class Unused(Protocol):
    """A line or entry that is not used. Its text names the file, the place and the reason."""

    @property
    def reason(self) -> str: ...


class Sample(NamedTuple):
    """An example as the table shows it."""

    image: str
    text: str  # empty for a question
    question: str = ""
    answers: Sequence[str] = ()

    def shown(self, width: int) -> str:
        """Return the sample as one line of at most `width` characters. A long path keeps its end, and a long text its start."""
        image, text = printable(self.image), printable(self.text)
        if self.question:
            question, answers = printable(self.question), printable(" | ".join(dict.fromkeys(self.answers)))
            room = max(width // 4, width // 2 - len(answers))  # a long question is cut, so that the answers are shown
            question = question if len(question) <= room else f"{question[: room - 1]}…"
            text = f"{question} → {answers}" if answers else question
        longest = max(width // 2, width - len(text) - 3)
        image = image if len(image) <= longest else f"…{image[1 - longest :]}"
        line = f"{image} → {text}"
        return line if len(line) <= width else f"{line[: width - 1]}…"


@dataclass(frozen=True)
class ReadLines:
    """The result of a reading. Its text is the table, which is made only if it is printed."""

    examples: Sequence[Example]
    unused: Sequence[Unused]
    sources: Sequence[Callable[[], list[str]]]  # each returns the texts about a file

    def __str__(self) -> str:
        images, questions = len(set(map(FILE, self.examples))), sum(bool(example.question) for example in self.examples)
        texts = {"captions": len(self.examples) - questions, "questions": questions}
        sampled = (self.examples[index] for index in spread(len(self.examples)))
        texts["repeated"] = len(self.examples) - len(
            {(one.file, one.text, one.question, one.answers, one.prompt) for one in self.examples}
        )
        samples = [Sample(one.name, one.text, one.question, one.answers) for one in sampled]
        notes = [note for describe in self.sources for note in describe()]
        return summary(notes, images, texts, len(self.unused), lines_by_reason(self.unused), samples)


def source_line(path: Path, entries: int, description: str, root: Path) -> str:
    """Return the text about one file or folder: its number of entries, its format, and the folder of its images."""
    return f"{path}: {counted(entries, 'entry')} ({description}), images in {relative_if_below(root)}"


def lines_by_reason(unused: Sequence[Unused]) -> list[str]:
    """Return a text for each reason: the number of its entries, and the first of them.

    Reasons that differ only in the path of an image are one reason.
    """
    firsts = {kind_of(one.reason): one for one in reversed(unused)}
    counts = Counter(kind_of(one.reason) for one in unused)
    several = {kind: f" an image that {kind}, first " if kind in IMAGE_FAULTS else " such as " for kind in counts}
    titles = {kind: several[kind] if counts[kind] > 1 else " " for kind in counts}
    lines = [line_of_list(f"{count:,} ×{titles[kind]}{firsts[kind]}") for kind, count in counts.most_common(LISTED)]
    return lines + [f"… and {counted(len(counts) - LISTED, 'more reason')}"] * (len(counts) > LISTED)


def kind_of(reason: str) -> str:
    """Return a reason without the path of an image, so that the reasons of several images can be counted together."""
    return next((fault for fault in IMAGE_FAULTS if f" {fault}" in reason), reason)


def listing(problems: Sequence[Unused]) -> str:
    """Return the first problems as one text, a line for each, and the number of further problems.

    A long advice, which follows the first semicolon of several problems, is written once, after them.
    """
    parts = [str(problem).partition("; ") for problem in problems[:LISTED]]
    counts = Counter(advice for _, _, advice in parts if len(advice) > LONG_ADVICE)
    common = [advice for advice, count in counts.items() if count > 1]
    texts = [short if advice in common else f"{short}{separator}{advice}" for short, separator, advice in parts]
    lines = list(map(line_of_list, texts)) if problems[1:] else texts
    lines += [f"… and {len(problems) - LISTED} more"] * (len(problems) > LISTED)
    return "\n".join([*lines, *map(line_of_list, common)])


def one_problem(reasons: Sequence[str]) -> str:
    """Return "all … lines have this problem" if there are several reasons, and they differ at most in paths and corrections.

    Return "" otherwise. Then a list of the lines says more.
    """
    kinds = {_without_path(reason.partition("; write: ")[0]) for reason in reasons}
    return f"all {counted(len(reasons), 'line')} have this problem" if len(reasons) >= SEVERAL and len(kinds) == 1 else ""


def _without_path(reason: str) -> str:
    """Return a reason from its fault on, if it begins with the path of an image."""
    starts = (reason.find(f" {fault}") for fault in IMAGE_FAULTS)
    return reason[max(0, *starts) :]


def spread(count: int) -> list[int]:
    """Return the indices of the first, the middle and the last of `count` examples."""
    return sorted({0, count // 2, count - 1}) if count else []


def summary(
    sources: Sequence[str], images: int, texts: dict[str, int], unused: int, reasons: Iterable[str], samples: Iterable[Sample]
) -> str:
    """Return the table as a text of several lines, which is safe to print.

    sources: the texts of the first rows, such as `source_line`. texts: {kind, such as "captions": number}.
    unused: number of lines that are not used. reasons: texts about them. samples: examples, a line of the terminal for each.
    """
    width = max(shutil.get_terminal_size().columns, 40) - LABEL
    rows = [("read", list(sources)), ("images", [f"{images:,}"])]
    rows += [(kind, [f"{count:,}"]) for kind, count in texts.items() if count]
    rows += [("left out", [counted(unused, "line"), *reasons])] if unused else []
    rows += [("samples", [sample.shown(width) for sample in samples])]
    return "\n".join(
        f"{'' if index else label:{LABEL}}{printable(line)}" for label, lines in rows for index, line in enumerate(lines)
    )
