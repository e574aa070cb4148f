"""Read several captions or questions of one line: a list, or numbered columns or keys, such as caption_1 to caption_5."""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lora_blip.data.entries import ANSWER_KEYS, TEXT_KEYS, Entry, Located, Location, first_key, plain_name

NUMBERED = re.compile(r"(.+?)_?\d{1,3}")
TEXTS = tuple(key for key in TEXT_KEYS if key != "prompt")


def several(at: Location, entry: Entry) -> Iterator[Located]:
    """Yield an entry for each text of a list of texts, such as {"image": …, "captions": ["a cat", "a black cat"]}.

    Numbered texts, such as caption_1 and caption_2, are such a list. Numbered answers of a question become its list of answers.
    A list of questions, such as {"image": …, "qa": [{"question": …, "answer": …}, …]}, gives an entry for each question.
    """
    entry = gathered(entry)
    key = first_key(entry, TEXT_KEYS) or questions_key(entry)
    texts = entry[key] if key else None
    if "question" in entry or not key or not isinstance(texts, list) or not texts:
        yield at, entry
        return
    rest = {name: value for name, value in entry.items() if name != key}
    for text in texts:
        inside = first_key(text, ("raw", *TEXT_KEYS)) if isinstance(text, dict) else None
        asks = isinstance(text, dict) and "question" in text
        yield at, rest | (text if asks else {"text": text[inside] if inside else text})


def questions_key(entry: Entry) -> str | None:
    """Return the key of a list of objects with questions, or None if there is none or more than one."""
    keys = [
        key for key, value in entry.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) and "question" in each for each in value)
    ]  # fmt: skip
    return keys[0] if len(keys) == 1 else None


def numbered(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Return the names that are a known name with a number, in their order: caption_1 and caption_2, or "Caption 1", ….

    Return [] if there are none, or if they number several known names.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if (match := NUMBERED.fullmatch(plain_name(name))) and match[1] in known:
            found.setdefault(match[1], []).append(name)
    return next(iter(found.values())) if len(found) == 1 else []


def numbered_of(names: Iterable[str], ours: str, name: str) -> list[str]:
    """Return the columns or keys that a user's name of texts or answers numbers: "Satz 1" and "Satz 2" for "Satz".

    ours: "text" or "answers"; for another key, return [].
    """
    return numbered(names, [plain_name(name)]) if ours in ("text", "answers") and name.strip() else []


def numbered_names(names: Sequence[str], with_question: bool) -> list[str]:
    """Return the names of numbered answers, or of numbered texts, if no other name is one of an answer or of a text."""
    known, kind = (ANSWER_KEYS, ANSWER_KEYS) if with_question else (TEXT_KEYS, TEXTS)
    return numbered(names, kind) if set(known).isdisjoint(names) else []


def gathered(entry: Entry) -> Entry:
    """Return an entry with one list in place of numbered keys: {"texts": ["a", "b"]} for {"caption_1": "a", "caption_2": "b"}.

    Empty values are left out. Other entries are returned unchanged.
    """
    asks = "question" in entry
    names = numbered_names(list(entry), asks)
    if not names:
        return entry
    rest = {key: value for key, value in entry.items() if key not in names}
    return rest | {"answers" if asks else "texts": listed(entry, names)}


def listed(entry: Entry, names: Iterable[str]) -> list[Any]:
    """Return the values of numbered keys without the empty ones, or [""] if all are empty."""
    return [entry[name] for name in names if entry[name] is not None and str(entry[name]).strip()] or [""]
