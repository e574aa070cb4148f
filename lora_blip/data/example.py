"""Define `Example`, one line of an annotation file, and `ExampleBuilder`, which makes a million of them in seconds."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_blip.data.entries import (
    ANSWER_KEYS,
    IMAGE_KEYS,
    SPLITS,
    TEXT_KEYS,
    Entry,
    Location,
    as_text,
    canonical,
    first_key,
    misspelled,
)
from lora_blip.runtime.untrusted import is_path, quoted

MOST_SHARED = 2**17  # largest number of different answers, groups and prompts that share memory
MOST_SPLITS = 20  # largest number of unknown splits that are named
MOST_KEYS = 1000  # largest number of unknown keys that are counted: an invalid file may have a new key in each line
CAPTION = frozenset(("image", "text", "group", "prompt"))
QUESTION = frozenset(("image", "question", "answers", "group", "prompt", "question_id"))


class PathStoredAsText:
    """A descriptor for a path. It stores a string, which needs a quarter of a Path's memory, and returns a Path."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    def __get__(self, example: Any, kind: Any = None) -> Any:
        return self if example is None else Path(self.slot.__get__(example, kind))

    def __set__(self, example: Any, path: str | Path) -> None:
        self.slot.__set__(example, str(path))


@dataclass(frozen=True, slots=True)  # slots: a data set may have millions of lines
class Example:
    """One line: an image with a caption, or an image with a question and its answers, one answer per annotator.

    `group` is a label that the user chose, such as "unseen pairs"; scores are also reported by group. `prompt` replaces the
    task's prompt for this line. `question_id` distinguishes two questions with the same words about one image.
    """

    image: Path
    text: str  # empty for a question
    name: str  # the image path as written in the line
    line: Location
    group: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    source: str = field(default="", compare=False, repr=False)  # the annotation file, for messages
    prompt: str = ""
    question_id: int | str = ""

    @property
    def file(self) -> str:
        """Return the image path as a string, which is a faster dictionary key than a Path."""
        return FILE(self)

    @property
    def words(self) -> str:
        """Return all texts of the line, joined."""
        if not self.question and not self.prompt:
            return self.text  # most lines are only a caption
        return " ".join(filter(None, (self.prompt, self.text, self.question, *self.answers)))


(  # setters that work although the class is frozen
    SET_IMAGE, SET_TEXT, SET_NAME, SET_LINE, SET_GROUP, SET_QUESTION, SET_ANSWERS, SET_SOURCE, SET_PROMPT, SET_QUESTION_ID
) = [vars(Example)[each.name].__set__ for each in fields(Example)]  # fmt: skip
IMAGE_SLOT = vars(Example)["image"]
FILE: Callable[[Example], str] = IMAGE_SLOT.__get__
Example.image = PathStoredAsText(IMAGE_SLOT)  # type: ignore[assignment,misc]  # set here, because in the class it would conflict with the slot


Lines = list[Example | tuple[Location, str]]  # an Example, or a location and the reason why it is invalid


class ExampleBuilder:
    """Builds the Examples of a source from its entries. A path or answer of many lines is checked and stored only once."""

    def __init__(self, source: Path, root: Path, use_splits: bool = False) -> None:
        self.source, self.root, self.use_splits = str(source), root, use_splits
        self.own_root = root  # the folder of the images if IMAGE_ROOT were empty
        self.prefix = "" if str(root) == "." else str(root / "_")[:-1]  # the text before the name in the path of an image
        self.firsts: dict[str, Example] = {}  # image path as written → its first Example
        self.shared: dict[str, str] = {}  # text → the same text: tidy answers, groups and prompts (see `is_tidy`)
        self.prompts = 0  # number of lines with their own prompt
        self.splits: dict[Location, str] = {}  # line or entry → its split: train, val or test
        self.group_entries: dict[Location, Entry] = {}  # line or entry → {the column that gives its group: its value}
        self.ignored: dict[str, tuple[int, Location, str]] = {}  # unused key → number of lines, first line, right key or ""
        self.invalid: dict[Location, str] = {}  # invalid line or entry → its image path
        self.unknown_splits: set[str] = set()
        self.like_splits: dict[str, set[str] | None] = {}  # unused key → its splits; None: a value is no name of a split

    def build(self, entry: Entry | str, number: Location) -> Example | tuple[Location, str]:
        """Return an Example, or (location, reason) for an invalid entry. If `entry` is a text, it is the reason."""
        if isinstance(entry, str):
            return number, entry
        example = self._quick(entry, number)
        if example:
            if len(entry) > 2 and not entry.keys() <= (QUESTION if example.question else CAPTION):
                self._count_ignored(entry, number)
            return example
        checked = canonical(entry, answered=False)
        if isinstance(checked, str):
            self._store_split(entry, number)
            if isinstance(image := entry.get(first_key(entry, IMAGE_KEYS) or ""), str):
                self.invalid[number] = image
            return number, checked
        self._count_ignored(entry, number)
        is_question = "question" in checked  # in a caption, keys of these names may have any value
        answers = [self.shared.get(answer, answer) for answer in (checked["answers"] if is_question else ())]
        image = checked["image"]
        return self._new(
            self.firsts.get(image), image, checked.get("text", "") if not is_question else "", number,
            as_text(checked.get("group")) or "", checked["question"] if is_question else "", tuple(answers),
            checked.get("prompt", ""), checked.get("question_id", "") if is_question else "",
        )  # fmt: skip

    def _count_ignored(self, entry: Entry, number: Location) -> None:
        """Count the ignored keys of an entry. Store its split, or count it as ignored if its name is unknown."""
        is_question = "question" in entry
        known_split = self._store_split(entry, number)
        used = {first_key(entry, IMAGE_KEYS), first_key(entry, ANSWER_KEYS if is_question else TEXT_KEYS), "group", "prompt"}
        used |= {"split"} if known_split else set()
        used |= self.group_entries.get(number, {}).keys()
        used |= {"question", "question_id"} if is_question else set()
        for key in (key for key in entry if key not in used):
            name = self._name_of_ignored(key, entry[key]) if self.use_splits else key
            if not name:
                continue
            if name in self.ignored or len(self.ignored) < MOST_KEYS:
                count, first, typo = self.ignored.get(name) or (0, number, typo_of_answer(key, entry))
                self.ignored[name] = count + 1, first, typo

    def _name_of_ignored(self, key: str, value: Any) -> str:
        """Return the name of an ignored key for the report: with its value for an unknown split, "" for an empty split.

        Store the splits that are the values of another key.
        """
        if key != "split":
            self._store_like_split(key, value)
            return key
        if len(self.unknown_splits) < MOST_SPLITS:
            self.unknown_splits.add(str(value))
        return f"split = {value}" * bool(value) if str(value) in self.unknown_splits else key

    def _store_like_split(self, key: str, value: Any) -> None:
        """Store the split that is the value of another key, or None if a value of the key is no name of a split."""
        if key not in self.like_splits and len(self.like_splits) >= MOST_KEYS:
            return
        found = self.like_splits.setdefault(key, set())
        split = SPLITS.get(value.strip().lower()) if found is not None and isinstance(value, str) else None
        if found is None or split is None:
            self.like_splits[key] = None
        else:
            found.add(split)

    def split_warning(self) -> str:
        """Return a warning if no line has a split, and all values of an ignored key are splits, train and another. Else ""."""
        like = (key for key, of in self.like_splits.items() if of and "train" in of and len(of) > 1)
        key = "" if self.splits else next(like, "")
        return f"\nwarning: the values of {quoted(key)} are splits, and are not used; rename it to split" * bool(key)

    def names(self, lines: Lines) -> dict[Location, str]:
        """Return the image path of each line as it is written, also of invalid lines if it is known."""
        return {line.line: line.name for line in lines if isinstance(line, Example)} | self.invalid

    def _store_split(self, entry: Entry, number: Location) -> bool:
        """Store the split of an entry. Return False if it has none, or if its name is unknown."""
        split = entry.get("split")
        if not (self.use_splits and isinstance(split, str) and (known := SPLITS.get(split.strip().lower()))):
            return False
        self.splits[number] = known
        return True

    def only(self, split: str, lines: Lines) -> Lines:
        """Return the lines of a split, and the invalid lines whose split is unknown. Forget the images of the other lines."""
        splits = self.splits
        kept = [
            line
            for line in lines
            if (splits.get(line.line) if isinstance(line, Example) else splits.get(line[0], split)) == split
        ]
        names = {line.name for line in kept if isinstance(line, Example)}
        self.firsts = {name: first for name, first in self.firsts.items() if name in names}
        return kept

    def _quick(self, entry: Entry, number: Location) -> Example | None:
        """Return the Example that `canonical` leads to, in half the time. Return None unless all values are tidy strings."""
        image = entry.get("image")
        if type(image) is not str:
            return None
        first = self.firsts.get(image)
        if not first and not (is_tidy(image) and is_path(image)):
            return None
        group: str | None = ""
        prompt: str | None = ""
        if len(entry) > 2:  # otherwise the line has only an image and a text
            group, prompt = entry.get("group", ""), entry.get("prompt", "")
            group = self._share(group) if group != "" else group
            prompt = self._share(prompt) if prompt != "" else prompt
        if group is None or prompt is None:
            return None
        if "question" not in entry:
            text = entry.get("text")
            return self._new(first, image, text, number, group, prompt=prompt) if type(text) is str and is_tidy(text) else None
        question, answers, question_id = entry["question"], entry.get("answers"), entry.get("question_id", "")
        if type(question) is not str or not is_tidy(question) or type(answers) is not list or not answers:
            return None
        if type(question_id) is not int and question_id != "":
            return None
        try:
            shared_answers = tuple(map(self.shared.get, answers))
        except TypeError:  # a list or an object, not a text
            return None
        if None in shared_answers:
            shared_answers = tuple(map(self._share, answers))
        if None in shared_answers:
            return None
        return self._new(first, image, "", number, group, question, shared_answers, prompt, question_id)  # type: ignore[arg-type]

    def _share(self, text: Any) -> str | None:
        """Return an equal text that is already stored, so that the two share memory, or None if the text is not tidy."""
        if type(text) is not str:
            return None
        first = self.shared.get(text)
        if first is None and is_tidy(text):
            first = self.shared.setdefault(text, text) if len(self.shared) < MOST_SHARED else text
        return first

    def _new(
        self, first: Example | None, image: str, text: str, number: Location, group: str, question: str = "",
        answers: tuple[str, ...] = (), prompt: str = "", question_id: int | str = "",
    ) -> Example:  # fmt: skip
        """Return Example(self.root / image, text, …). This takes half the time of the constructor, and less than a loop.

        first: the first Example of the image, or None.
        """
        if prompt:
            self.prompts += 1
        example = object.__new__(Example)
        SET_IMAGE(example, FILE(first) if first else self._file(image))
        SET_TEXT(example, text)
        SET_NAME(example, first.name if first else image)
        SET_LINE(example, number)
        SET_GROUP(example, group)
        SET_QUESTION(example, question)
        SET_ANSWERS(example, answers)
        SET_SOURCE(example, self.source)
        SET_PROMPT(example, prompt)
        SET_QUESTION_ID(example, question_id)
        if not first:
            self.firsts[image] = example
        return example

    def _file(self, image: str) -> str:
        """Return str(root / image). Use Path, which is slow, only if it would change the name."""
        needs_path = "//" in image or "/." in image or image[0] in "/." or image[-1] == "/" or os.sep != "/"
        return str(self.root / image) if needs_path else self.prefix + image


@contextmanager
def many_objects() -> Iterator[None]:
    """Disable the garbage collector in the block. With millions of objects, it is slow, because it scans all of them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def is_tidy(text: str) -> bool:
    """Return True for a text that is not empty, has only printable characters, and that `plain` would not change."""
    return text.isprintable() and "  " not in text and text.strip() == text != ""


def typo_of_answer(key: str, entry: Entry) -> str:
    """Return '"answer"' for an ignored key such as anwser in a question without an answer; otherwise return ""."""
    if "question" not in entry or not entry.keys().isdisjoint(ANSWER_KEYS):
        return ""
    return misspelled(key, ANSWER_KEYS, entry[key], 0.8).partition(" for ")[0]
