"""Entries of a file → Examples, a million in seconds."""

import os
from pathlib import Path
from typing import Any

from lora_blip.data.entries import ANSWER_KEYS, IMAGE_KEYS, TEXT_KEYS, Entry, as_text, canonical, first_key
from lora_blip.data.example import FILE, Example, quick
from lora_blip.runtime.untrusted import is_path

SHARED = 2**17  # answers, groups and prompts of which each is checked and kept once
MOST_KEYS = 1000  # unknown ones that are counted: a wrong file may have a new one on each line
CAPTION = frozenset(("image", "text", "group", "prompt"))
QUESTION = frozenset(("image", "question", "answers", "group", "prompt", "question_id"))


class Lines:
    """Entries of a source → Examples. What many lines share, an image or an answer, is checked and kept once."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source, self.root = str(source), root
        self.before = "" if str(root) == "." else str(root / "_")[:-1]  # what is before a plain name in its path
        self.firsts: dict[str, Example] = {}  # image as written → its first line
        self.shared: dict[str, str] = {}  # answers, groups and prompts, tidy ones
        self.prompts = 0  # lines with a prompt of their own
        self.ignored: dict[str, tuple[int, int]] = {}  # a key that is not used → its number of lines, and the first one

    def example(self, found: Entry | str, number: int) -> Example | tuple[int, str]:
        """An Example, or the line's number with what is wrong with it."""
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
        asked = "question" in entry  # of a caption, keys of these names may hold anything
        answers = [self.shared.get(answer, answer) for answer in (entry["answers"] if asked else ())]
        return self._made(
            entry["image"], entry.get("text", "") if not asked else "", number, as_text(entry.get("group")) or "",
            entry["question"] if asked else "", tuple(answers), entry.get("prompt", ""),
            entry.get("question_id", "") if asked else "",
        )  # fmt: skip

    def _count_ignored(self, found: Entry, number: int) -> None:
        """Count the keys of a line that change nothing."""
        asked = "question" in found
        used = {first_key(found, IMAGE_KEYS), first_key(found, ANSWER_KEYS if asked else TEXT_KEYS), "group", "prompt"}
        for key in found.keys() - used - ({"question", "question_id"} if asked else set()):
            if key in self.ignored or len(self.ignored) < MOST_KEYS:
                count, first = self.ignored.get(key, (0, number))
                self.ignored[key] = count + 1, first

    def _quick(self, found: Entry, number: int) -> Example | None:
        """What `canonical` would lead to, for a line of tidy strings under the usual keys; None for any other."""
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
        except TypeError:  # a list or an object: no text
            return None
        if None in kept:
            kept = tuple(map(self._share, answers))
        if None in kept:
            return None
        return self._made(image, "", number, group, question, kept, prompt, question_id)  # type: ignore[arg-type]

    def _share(self, text: Any) -> str | None:
        """The same text as it was first met; None unless it is tidy."""
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
        """str(root / image), without the Path where nothing in the name is tidied up by it."""
        tidied = "//" in image or "/." in image or image[0] in "/." or image[-1] == "/" or os.sep != "/"
        return str(self.root / image) if tidied else self.before + image


def is_tidy(text: str) -> bool:
    """Whether it is as `plain` leaves it, is not empty and holds no half of a surrogate pair or other unprintable thing."""
    return text.isprintable() and "  " not in text and text.strip() == text != ""
