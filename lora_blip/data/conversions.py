"""Convert a record of another tool to entries: chats, pairs of prompt and answer, choices, Prodigy and Labelbox.

JSONL, JSON lists and Parquet use the same conversions.
"""

import re
from collections.abc import Iterator
from typing import Any

from lora_blip.data.chats import answered, chat_entries, images_of, turns_of, without_image_token
from lora_blip.data.entries import ANSWER_KEYS, IMAGE_KEYS, TEXT_KEYS, Entry, LeftOut, Located, Location, first_key
from lora_blip.data.several_texts import several

PAIRS = (  # keys of a question and its answer
    ("prefix", "suffix"), ("query", "response"), ("query", "label"), ("instruction", "output"), ("prompt", "completion"),
    ("prompt", "response"), ("problem", "solution"),
)  # fmt: skip
CAPTION_TASK = re.compile(r"<(?:MORE_)?(?:DETAILED_)?CAPTION>|(?:cap|caption|describe)(?: [a-z]{2})?", re.IGNORECASE)
CHOICES = ("choices", "options")
PRODIGY = {"_task_hash", "_input_hash"}
LETTERS = "ABCDEFGH"


def needs_conversion(record: Any) -> bool:
    """Return True if a record has the layout of another tool, so that `converted` must convert it."""
    if turns_of(record):
        return True
    if not isinstance(record, dict):
        return False
    is_list = bool(images_of(record)) if "images" in record else any(isinstance(record.get(key), list) for key in IMAGE_KEYS)
    return bool(
        is_list
        or _pair_of(record)
        or _dialogue(record)
        or _is_choice(record)
        or record.keys() >= PRODIGY
        or _is_labelbox(record)
    )


def converted(at: Location, record: Any) -> Iterator[Located]:
    """Yield the entries of a record. A record that needs no conversion is one entry, or one for each of its captions."""
    if turns_of(record):
        yield from chat_entries(at, record)
        return
    if not isinstance(record, dict):
        yield at, "expected an object {…}"
    elif record.keys() >= PRODIGY:
        yield from (
            several(at, _prodigy(record))
            if record.get("answer") == "accept"
            else [(at, LeftOut(f"it is marked as {record.get('answer')!s:.20} in Prodigy"))]
        )
    elif _is_labelbox(record):
        yield from _labelbox(at, record)
    else:
        yield from _with_one_image(at, record)


def _with_one_image(at: Location, record: Entry) -> Iterator[Located]:
    """Yield the entries of a record that has its image in a list, its question in a pair, or its answer in choices."""
    if "images" in record or any(isinstance(record.get(key), list) for key in IMAGE_KEYS):
        images = images_of(record)
        if len(images) != 1:
            yield at, LeftOut(f"it has {len(images)} images; an example has one: write a line for each image")
            return
        key = first_key(record, ("images", *IMAGE_KEYS))
        record = {name: value for name, value in record.items() if name != key} | {"image": images[0]}
    image = record.get(first_key(record, IMAGE_KEYS) or "")
    extra = {name: record[name] for name in ("split", "group") if name in record}
    if dialogue := _dialogue(record):
        for turn in dialogue:
            yield at, answered(image, without_image_token(turn["user"]), turn["assistant"]) | extra
    elif pair := _pair_of(record):
        question = " ".join(filter(None, (record[pair[0]], str(record.get("input") or "") * (pair[0] == "instruction"))))
        question = without_image_token(question)
        answers = record[pair[1]]
        entry = answered(image, "" if CAPTION_TASK.fullmatch(question) else question, answers) | extra
        if isinstance(answers, list) and "answers" in entry:
            entry["answers"] = answers
        yield at, entry
    elif "question" in record:
        yield at, record | ({"answers": [_chosen(record)]} if _is_choice(record) else {})
    else:
        yield from several(at, record)


def _pair_of(record: Entry) -> tuple[str, str] | None:
    """Return the keys of the question and the answer, or None if the record has no such pair, or has its own caption."""
    own = [key for key in ("question", *TEXT_KEYS) if key in record and key != "prompt"]
    pairs = (pair for pair in PAIRS if pair[1] in record and isinstance(record.get(pair[0]), str))
    return None if own else next(pairs, None)


def _dialogue(record: Entry) -> list[Entry]:
    """Return the turns of The Cauldron: texts[{user, assistant}], or []."""
    texts = record.get("texts")
    turns = [turn for turn in texts if isinstance(turn, dict)] if isinstance(texts, list) else []
    return [turn for turn in turns if isinstance(turn.get("user"), str) and isinstance(turn.get("assistant"), str)]


def _is_choice(record: Entry) -> bool:
    """Return True if the answer is the number or the letter of a choice."""
    return "question" in record and _chosen(record) is not None


def _chosen(record: Entry) -> Any:
    """Return the text of the choice that is the answer, or None."""
    choices, answer = record.get(first_key(record, CHOICES) or ""), record.get(first_key(record, ANSWER_KEYS) or "")
    if not isinstance(choices, list) or isinstance(answer, bool) or answer in choices:
        return None
    if isinstance(answer, str):
        letter = len(answer) == 1 and answer in LETTERS
        answer = LETTERS.index(answer) if letter else int(answer) if answer.isascii() and answer.isdecimal() else None
    return choices[answer] if isinstance(answer, int) and 0 <= answer < len(choices) else None


def _prodigy(record: Entry) -> Entry:
    """Return a Prodigy task as an entry. If the task has a caption, its key `text` is the name of the file."""
    keys = ("image", "caption", "captions", "question", "text", "transcription", "user_input")
    kept: Entry = {str(key): record[key] for key in keys if key in record}
    if text := first_key(kept, ("caption", "captions", "transcription", "user_input")):
        kept = {"image": kept.get("image"), "text": kept[text]}
    return kept


def _is_labelbox(record: Entry) -> bool:
    return isinstance(record.get("data_row"), dict) and isinstance(record.get("projects"), dict)


def _labelbox(at: Location, record: Entry) -> Iterator[Located]:
    """Yield an entry for each text answer of a Labelbox row. The image is its external id, which is the name of the file."""
    row = record["data_row"]
    image = next((row[key] for key in ("external_id", "global_key", "row_data") if isinstance(row.get(key), str)), None)
    texts = list(_labelbox_texts(record["projects"]))
    if not texts:
        yield at, LeftOut("the row has no text answer")
    for text in texts:
        yield at, {"image": image, "text": text}


def _labelbox_texts(value: Any) -> Iterator[Any]:
    """Yield the content of each text answer, at any depth."""
    if isinstance(value, dict):
        answer = value.get("text_answer")
        if isinstance(answer, dict):
            yield answer.get("content")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _labelbox_texts(each)
