"""Check one entry of an annotation file, and give its keys the names image, text, question and answers."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any
from unicodedata import category

from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import HALF_PAIR, is_path, pasteable, quoted, shorten

# names of keys and columns; if an entry has several of them, the first in this order is used
IMAGE_KEYS = (
    "image", "image_path", "file_name", "filename", "file", "filepath", "file_path", "path", "img", "img_path", "image_file",
    "image_filename", "image_name", "imagename", "img_name", "photo", "picture", "source_file", "sourcefile",
)  # fmt: skip
TEXT_KEYS = (
    "text", "caption", "captions", "texts", "sentence", "sentences", "description", "descriptions", "comment", "title",
    "alt_text", "prompt",
)  # fmt: skip
ANSWER_KEYS = ("answers", "answer")
ANSWER_SEPARATOR = "|"  # between several answers in one text
INVISIBLE = ("Cc", "Cf", "Zs")  # Unicode categories: control, format such as a zero-width space, and spaces
SPLITS = {"train": "train", "training": "train", "restval": "train"}  # name of a split in a data set → our name
SPLITS |= {"val": "val", "valid": "val", "validation": "val", "validate": "val", "eval": "val"}
SPLITS |= {"dev": "val", "test": "test", "testing": "test"}
PATH_PARTS = re.compile(r"[/\\]")
IMAGE_NAME = re.compile(r"(?!\w+://).+\.(jpe?g|jpe|png|webp|gif|bmp|tiff?|heic|heif|avif|ppm)", re.IGNORECASE)
UNESCAPED = "the backslashes of the image path are not escaped; write: {}"
# a control character that JSON reads from an unescaped backslash → a slash and the letter in the file
LETTERS = str.maketrans({"\n": "/n", "\r": "/r", "\t": "/t", "\b": "/b", "\f": "/f", "\\": "/"})
NO_ANSWER = 'add "answers", a list of texts, or "answer", a text'
USUAL_ANSWERS = ("a", "ans", "answer_text", "antwort", "response", "reply", "label")
OTHER_WORDS = {"type", "id", "source", "url", "date", "category", "license"}  # in keys that contain no answer
SIMILAR = 0.7  # difflib's ratio of a key and a known key, of which it may be a misspelling
ONE_LINE_EACH = 'write a line for each: {"image": …, "text": …}, or {"image": …, "question": …, "answers": […]}'
NOT_UTF8 = "it is not UTF-8 (or contains half a surrogate pair); save the file as UTF-8"

Entry = dict[str, Any]
Location = int | str  # the number of a line, or the place of an entry in a JSON document: "annotations[17]"
Located = tuple[Location, Entry | str]  # an entry, or the reason why it is invalid


class LeftOut(str):
    """The reason why an entry is left out without an error, such as a caption that its data set marks as rejected."""

    __slots__ = ()


class SomeLinesError(DataError):
    """Some lines of a file are invalid, and others are valid. So its columns have the right names."""


class KeyFault(str):
    """The reason why an entry lacks a key. The fix depends on the other lines of the file."""

    __slots__ = ("end", "end_here", "start")
    start: str
    end: str
    end_here: str

    def __new__(cls, start: str, end: str, end_here: str, may_be_a_typo: bool = False) -> "KeyFault":
        """start: the first part of the reason. end: the fix by a flag, for all lines. end_here: the fix for this line only."""
        both = f"if only this line has a typo, {end_here}; otherwise {end}" if may_be_a_typo else end
        fault = super().__new__(cls, start + both)
        fault.start, fault.end, fault.end_here = start, end, end_here
        return fault


def in_this_line(reason: str) -> str:
    """Return the reason with a fix that changes only this line. A flag would make the valid lines of the file invalid."""
    return reason.start + reason.end_here if isinstance(reason, KeyFault) else reason


def in_all_lines(reason: str) -> str:
    """Return the reason with a fix by a flag, for a file in which all lines have the same problem."""
    return reason.start + reason.end if isinstance(reason, KeyFault) else reason


class WrittenFloat(float):
    """A JSON number with a point or an exponent. It keeps its spelling in the file, so that the answer 1.50 stays 1.50."""

    __slots__ = ("spelling",)
    spelling: str

    def __new__(cls, spelling: str) -> "WrittenFloat":
        number = super().__new__(cls, spelling)
        if math.isinf(number):
            raise ValueError(f"{shorten(spelling)} is too large for a number")
        number.spelling = spelling
        return number


def as_text(value: object) -> str | None:
    """Return a string unchanged, a number as it is written, "yes" or "no" for a boolean, and None for any other value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return value.spelling if isinstance(value, WrittenFloat) else str(value)
    return value if isinstance(value, str) else None


def canonical(entry: Entry, answered: bool = True) -> Entry | str:
    """Return the entry with the keys {"image", "text"} or {"image", "question", "answers"}, or the reason why it is invalid.

    In the result, texts have one space between words, and numbers and booleans are texts (see `as_text`). Other keys are kept.
    A question has `answers` (a list of texts, or of VQAv2's {"answer": …}) or one `answer`. If `answered` is False, a question
    without these keys is valid too.
    """
    rest = dict(entry)
    key = first_key(rest, IMAGE_KEYS)
    if key is None:
        return _key_fault(f"no image: expected one of the keys {', '.join(IMAGE_KEYS[:3])}, with a path", rest, no_image=True)
    image = _path_in(rest.pop(key))
    if not isinstance(image, str) or not image.strip():
        value = "null" if image is None else quoted(image) if image != "" else "empty"
        return f"no image: {quoted(key)} is {value}; expected the path of an image"
    if not is_path(image):
        corrected = image.translate(LETTERS)
        if corrected != image and "\n\n" not in image and is_path(corrected):
            return UNESCAPED.format(pasteable(json.dumps(entry | {key: corrected}, ensure_ascii=False, default=str)))
        return f"the image is not a valid path: {quoted(image)}"
    try:
        result = {"image": image} | (_question(rest, answered) if "question" in rest else _caption(rest)) | _prompt(rest) | rest
    except _ValueError as error:
        reason: str = error.args[0]
        return reason
    return NOT_UTF8 if _has_surrogates(result) else result


def plain_name(name: str) -> str:
    """Return the name of a column in lower case with underscores: File Name becomes file_name."""
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _path_in(image: object) -> object:
    """Return the path in {"bytes": null, "path": "1.jpg"}, as `datasets` writes it, or the value unchanged."""
    if isinstance(image, dict) and image.get("bytes") is None:
        key = first_key(image, IMAGE_KEYS)
        return image[key] if key and isinstance(image[key], str) else image
    return image


def _caption(rest: Entry) -> Entry:
    """Remove the text from `rest`, and return {"text": …}. Raise _ValueError if it is missing or invalid."""
    if rest.keys().isdisjoint(TEXT_KEYS):
        start = f"no text: expected one of the keys {', '.join(TEXT_KEYS[:2])}, or question and answers"
        raise _ValueError(_key_fault(start, rest, no_image=False))
    text = _take(rest, TEXT_KEYS)
    inside = first_key(text, ("raw", *TEXT_KEYS)) if isinstance(text, dict) else None
    if isinstance(text, dict) and not inside:
        raise _ValueError(f"the text is an object with the keys {shorten(quoted(list(text))[1:-1])}; {ONE_LINE_EACH}")
    return {"text": _tidied("text", text[inside] if inside else text)}


def _key_fault(start: str, rest: Entry, no_image: bool) -> str:
    """Return a message about a line without a known key: `start`, its keys, and flags that name the likely ones.

    no_image: whether the key of the image is missing too. A likely image is a path of an image file; a likely text is the
    longest other text, or else a list.
    """
    if not rest:
        return start
    strings = {key: value.strip() for key, value in rest.items() if isinstance(value, str)}
    images = [key for key, value in strings.items() if no_image and IMAGE_NAME.fullmatch(value)]
    texts = sorted(strings.keys() - images, key=lambda key: (-len(strings[key]), key))
    texts += [key for key, value in rest.items() if isinstance(value, list) and value and isinstance(value[0], str | dict)]
    named = [("image", images[0] if images else "")] * no_image
    if rest.keys().isdisjoint(TEXT_KEYS) and (texts or not no_image):
        named.append(("text", texts[0] if texts else ""))
    asking = next((key for key in texts if strings.get(key, "").endswith("?")), "")
    if asking and ("text", texts[0]) in named and "question" not in rest:
        named[-1:] = [("question", asking)]
        if rest.keys().isdisjoint(ANSWER_KEYS):
            named.append(("answer", _answer_key(rest, asking)))
    has_text = "question" in rest or not rest.keys().isdisjoint(TEXT_KEYS)
    absent = (*(IMAGE_KEYS if no_image else ()), *(() if has_text else (*TEXT_KEYS, "question")))
    found = {typo: len(str(value)) for key, value in rest.items() if (typo := misspelled(key, absent, value))}
    longest = {typo.partition(" for ")[0]: typo for typo in sorted(found, key=lambda typo: found[typo])}
    typos = [typo for typo in found if typo in longest.values()]  # one key for each name
    asks = not rest.keys().isdisjoint(("question", *ANSWER_KEYS))  # a flag for the text would make it a caption
    named = [(ours, key) for ours, key in named if not (asks and ours == "text")]
    start += f"; this line has the keys {shorten(quoted(list(rest))[1:-1])}; "
    if not named:
        return start + (f"write {' and '.join(typos)}" if typos else 'add "question"')
    flags = " ".join(f"--{ours}-key {pasteable(quoted_for_shell(key)) if key else 'KEY'}" for ours, key in named)
    changes = [f'write "{ours}" for {quoted(key)}' if key else f'add "{ours}"' for ours, key in named]
    here = f"write {' and '.join(typos)}" if typos else " and ".join(changes)
    replace = "; replace KEY by one of these keys" * flags.endswith(" KEY")
    return KeyFault(start, f"name the right one: {flags}{replace}", here, may_be_a_typo=bool(typos))


def _answer_key(rest: Entry, asking: str) -> str:
    """Return the key that probably contains the answers to the question in the key `asking`, or "" if several keys may.

    It has a text or a list of texts, and no other meaning.
    """
    others = {asking, "split", "group", "prompt", "question_id", *IMAGE_KEYS}
    may_answer = [
        key
        for key, value in rest.items()
        if key not in others and not IMAGE_NAME.fullmatch(str(value)) and OTHER_WORDS.isdisjoint(plain_name(key).split("_"))
        and (isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(each, str) for each in value)))
    ]  # fmt: skip
    usual = [key for key in may_answer if plain_name(key) in USUAL_ANSWERS]
    return next((some[0] for some in (usual, may_answer) if len(some) == 1), "")


def misspelled(key: str, absent: Sequence[str], value: object, least: float = SIMILAR) -> str:
    """Return which of the absent keys a key may misspell, as in "text" for 'txet', or "".

    A key that contains another word, such as answer_type, is not a misspelling. A key whose value is a text, such as
    caption_en, may be one.
    """
    if key in (*TEXT_KEYS, *ANSWER_KEYS, "question"):
        return ""
    plain = plain_name(key).strip("_")
    near = next(iter(difflib.get_close_matches(plain, absent, 1, least)), "")
    has_known_word = "_" in plain and plain != near and not set(absent).isdisjoint(plain.split("_"))
    is_longer = plain.startswith(near) and len(plain) > len(near) + 1
    is_text = isinstance(value, str) and near in TEXT_KEYS and not value.strip().isdigit()
    if not near or ((has_known_word or is_longer) and not is_text):
        return ""
    return f'"{near}" for {quoted(key)}'


def _question(rest: Entry, answered: bool) -> Entry:
    """Remove question, answers and question_id from `rest`, and return them. Raise _ValueError if one is invalid."""
    question, may_be_empty = _tidied("question", rest.pop("question")), not answered and rest.keys().isdisjoint(ANSWER_KEYS)
    answers = _take(rest, ANSWER_KEYS, [])
    answers = answers.split(ANSWER_SEPARATOR) if isinstance(answers, str) else answers
    answers = answers if isinstance(answers, list) else [answers]
    if not answers and not may_be_empty:
        typo = next((typo for key in rest if (typo := misspelled(key, ANSWER_KEYS, rest[key]))), "")
        raise _ValueError(f"no answer: {f'write {typo}' if typo else NO_ANSWER}")
    texts = [item.get("answer", item) if isinstance(item, dict) else item for item in answers]
    entry: Entry = {"question": question, "answers": [_tidied("answer", text) for text in texts]}
    number = rest.pop("question_id", None)
    if number is None or number == "":
        return entry
    if isinstance(number, bool) or not isinstance(number, int | str):
        raise _ValueError(f"the question_id is {quoted(number)}; expected a whole number or a text")
    return entry | {"question_id": number}


def _prompt(rest: Entry) -> Entry:
    """Remove the prompt from `rest`, and return {"prompt": …}, or {} if it is missing or empty, as in a row of a CSV."""
    prompt = rest.pop("prompt", None)
    return {"prompt": _tidied("prompt", prompt)} if prompt is not None and str(prompt).strip() else {}


def _tidied(name: str, value: object) -> str:
    """Return a text with one space between words. Raise _ValueError for null, an empty text or a value that is not a text."""
    text = as_text(value)
    if text is None:
        raise _ValueError(f"the {name} is {'null' if value is None else quoted(value)}, expected a text")
    if not (text := " ".join(text.split())):
        raise _ValueError(f"{'an' if name == 'answer' else 'the'} {name} is empty")
    if not text.isprintable() and all(category(letter) in INVISIBLE for letter in text):
        raise _ValueError(
            f"{'an' if name == 'answer' else 'the'} {name} is empty: it has only invisible characters, {quoted(text)}"
        )
    return text


def _has_surrogates(entry: Entry) -> bool:
    """Return True if a text that becomes part of an Example contains half of a surrogate pair."""
    used = [entry.get(key) for key in ("image", "group", "text", "question", "prompt", "question_id")]
    answers = entry["answers"] if "question" in entry else ()  # in a caption, this key is ignored and may have any value
    written = "".join(value for value in (*used, *answers) if isinstance(value, str))
    return not written.isascii() and bool(HALF_PAIR.search(written))


class _ValueError(ValueError):
    """A value of an entry is invalid. The message names the key."""


def first_key(entry: Entry, keys: Iterable[str]) -> str | None:
    """Return the first of `keys` that the entry has, or None. If it has several, the others are ignored."""
    return next((key for key in keys if key in entry), None)


def _take(entry: Entry, keys: Iterable[str], otherwise: Any = None) -> Any:
    """Remove the first of `keys` that the entry has, and return its value. Return `otherwise` if it has none."""
    key = first_key(entry, keys)
    return otherwise if key is None else entry.pop(key)
