"""Entries of a file → Examples, a million in seconds."""

import os
from pathlib import Path
from typing import Any

from lora_blip.data.example import FILE, Example, quick
from lora_blip.data.formats import Entry, canonical
from lora_blip.untrusted import is_path

SHARED = 2**17  # answers and groups of which each is checked and kept once


class Lines:
    """Entries of a source → Examples. What many lines share, an image or an answer, is checked and kept once."""

    def __init__(self, source: Path, root: Path) -> None:
        self.source, self.root = str(source), root
        self.before = "" if str(root) == "." else str(root / "_")[:-1]  # what is before a plain name in its path
        self.firsts: dict[str, Example] = {}  # image as written → its first line
        self.shared: dict[str, str] = {}  # answers and groups, tidy ones

    def example(self, found: Entry | str, number: int) -> Example | tuple[int, str]:
        """An Example, or the line's number with what is wrong with it."""
        if isinstance(found, str):
            return number, found
        made = self._quick(found, number)
        if made:
            return made
        entry = canonical(found, answered=False)
        if isinstance(entry, str):
            return number, entry
        group = entry.get("group", "")
        said = entry["answers"] if "question" in entry else ()  # of a caption, a key of that name may hold anything
        answers = [self.shared.get(answer, answer) for answer in said]
        return self._made(
            entry["image"], entry.get("text", ""), number, group if isinstance(group, str) else "",
            entry.get("question", ""), tuple(answers),
        )  # fmt: skip

    def _quick(self, found: Entry, number: int) -> Example | None:
        """What `canonical` would lead to, for a line of tidy strings under the usual keys; None for any other."""
        image, group = found.get("image"), found.get("group", "")
        group = self._share(group) if group != "" else group
        if type(image) is not str or group is None or not (image in self.firsts or (is_tidy(image) and is_path(image))):
            return None
        if "question" not in found:
            text = found.get("text")
            return self._made(image, text, number, group) if type(text) is str and is_tidy(text) else None
        question, answers = found["question"], found.get("answers")
        if type(question) is not str or not is_tidy(question) or type(answers) is not list or not answers:
            return None
        try:
            kept = tuple(map(self.shared.get, answers))
        except TypeError:  # a list or an object: no text
            return None
        if None in kept:
            kept = tuple(map(self._share, answers))
        return None if None in kept else self._made(image, "", number, group, question, kept)  # type: ignore[arg-type]

    def _share(self, text: Any) -> str | None:
        """The same text as it was first met; None unless it is tidy."""
        if type(text) is not str:
            return None
        found = self.shared.get(text)
        if found is None and is_tidy(text):
            found = self.shared.setdefault(text, text) if len(self.shared) < SHARED else text
        return found

    def _made(
        self, image: str, text: str, number: int, group: str, question: str = "", answers: tuple[str, ...] = ()
    ) -> Example:
        first = self.firsts.get(image)
        if first:
            name, file = first.name, FILE(first)
        else:
            name, file = image, self._file(image)
        made = quick(file, text, name, number, group, question, answers, self.source)
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
