"""Make Examples of the entries of a file, a million in seconds."""

import os
from pathlib import Path
from typing import Any

from lora_blip.data.entries import ANSWER_KEYS, IMAGE_KEYS, TEXT_KEYS, Entry, as_text, canonical, first_key
from lora_blip.data.example import FILE, Example, quick
from lora_blip.runtime.untrusted import is_path

SHARED = 2**17  # answers, groups and prompts that are each checked and stored only once
MOST_KEYS = 1000  # unknown keys that are counted: an invalid file may have a new one in each line
CAPTION = frozenset(("image", "text", "group", "prompt"))
QUESTION = frozenset(("image", "question", "answers", "group", "prompt", "question_id"))


class Lines:
    """Makes Examples of the entries of a source. A path or answer that many lines share is checked and stored once."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source, self.root = str(source), root
        self.before = "" if str(root) == "." else str(root / "_")[:-1]  # prefix of the path of a plain name
        self.firsts: dict[str, Example] = {}  # image path as written → its first line
        self.shared: dict[str, str] = {}  # answers, groups and prompts that are tidy (see `is_tidy`)
        self.prompts = 0  # number of lines with their own prompt
        self.ignored: dict[str, tuple[int, int]] = {}  # unused key → number of lines, first line

    def example(self, found: Entry | str, number: int) -> Example | tuple[int, str]:
        """Return an Example, or the line's number with the reason why it is invalid."""
        if isinstance(found, str):
            return number, found
        made = self._quick(found, number)
        if made:
            if not found.keys() <= (QUESTION if made.question else CAPTION):
                self._count_ignored(found, number)
            return made
        entry = canonical(found, answered=False)
        if isinstance(entry, str):
            return number, entry
        self._count_ignored(found, number)
        is_question = "question" in entry  # in a caption, keys of these names may have any value
        answers = [self.shared.get(answer, answer) for answer in (entry["answers"] if is_question else ())]
        return self._made(
            entry["image"], entry.get("text", "") if not is_question else "", number, as_text(entry.get("group")) or "",
            entry["question"] if is_question else "", tuple(answers), entry.get("prompt", ""),
            entry.get("question_id", "") if is_question else "",
        )  # fmt: skip

    def _count_ignored(self, found: Entry, number: int) -> None:
        """Count the keys of a line that are ignored."""
        is_question = "question" in found
        used = {first_key(found, IMAGE_KEYS), first_key(found, ANSWER_KEYS if is_question else TEXT_KEYS), "group", "prompt"}
        for key in found.keys() - used - ({"question", "question_id"} if is_question else set()):
            if key in self.ignored or len(self.ignored) < MOST_KEYS:
                count, first = self.ignored.get(key, (0, number))
                self.ignored[key] = count + 1, first

    def _quick(self, found: Entry, number: int) -> Example | None:
        """Return the Example that `canonical` leads to, if all values are tidy strings under our own keys; else None."""
        image, group, prompt = found.get("image"), found.get("group", ""), found.get("prompt", "")
        group = self._share(group) if group != "" else group
        prompt = self._share(prompt) if prompt != "" else prompt
        if type(image) is not str or group is None or prompt is None:
            return None
        if not (image in self.firsts or (is_tidy(image) and is_path(image))):
            return None
        if "question" not in found:
            text = found.get("text")
            return self._made(image, text, number, group, prompt=prompt) if type(text) is str and is_tidy(text) else None
        question, answers, question_id = found["question"], found.get("answers"), found.get("question_id", "")
        if type(question) is not str or not is_tidy(question) or type(answers) is not list or not answers:
            return None
        if type(question_id) is not int and question_id != "":
            return None
        try:
            kept = tuple(map(self.shared.get, answers))
        except TypeError:  # a list or an object, not a text
            return None
        if None in kept:
            kept = tuple(map(self._share, answers))
        if None in kept:
            return None
        return self._made(image, "", number, group, question, kept, prompt, question_id)  # type: ignore[arg-type]

    def _share(self, text: Any) -> str | None:
        """Return the first equal text, so that its memory is shared, or None if the text is not tidy."""
        if type(text) is not str:
            return None
        found = self.shared.get(text)
        if found is None and is_tidy(text):
            found = self.shared.setdefault(text, text) if len(self.shared) < SHARED else text
        return found

    def _made(
        self, image: str, text: str, number: int, group: str, question: str = "", answers: tuple[str, ...] = (),
        prompt: str = "", question_id: int | str = "",
    ) -> Example:  # fmt: skip
        self.prompts += bool(prompt)
        first = self.firsts.get(image)
        if first:
            name, file = first.name, FILE(first)
        else:
            name, file = image, self._file(image)
        made = quick(file, text, name, number, group, question, answers, self.source, prompt, question_id)
        if not first:
            self.firsts[image] = made
        return made

    def _file(self, image: str) -> str:
        """Return str(root / image), without a slow Path if it would not change the name."""
        tidied = "//" in image or "/." in image or image[0] in "/." or image[-1] == "/" or os.sep != "/"
        return str(self.root / image) if tidied else self.before + image


def is_tidy(text: str) -> bool:
    """Return True if `plain` would not change the text, it is not empty and all its characters are printable."""
    return text.isprintable() and "  " not in text and text.strip() == text != ""
