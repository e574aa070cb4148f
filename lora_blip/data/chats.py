"""Convert chat records of vision-language models to entries: LLaVA, LLaMA-Factory, ms-swift, TRL, Qwen-VL and OpenAI.

A record has a list of turns, such as {"images": ["1.jpg"], "messages": [{"role": "user", "content": "<image>What is it?"},
{"role": "assistant", "content": "A cube."}]}. Each question with its answer becomes an entry.
"""

import re
from collections.abc import Iterator
from typing import Any

from lora_blip.data.entries import IMAGE_KEYS, Entry, LeftOut, Located, Location, first_key
from lora_blip.runtime.untrusted import quoted

TURN_KEYS = ("messages", "conversations", "conversation")
IMAGE_LISTS = ("images", *IMAGE_KEYS)
QUESTION_ROLES, ANSWER_ROLES = ("human", "user"), ("gpt", "assistant", "model")
IMAGE_TOKEN = re.compile(r"\s*(?:<image>|<\|image(?:_\d+)?\|>|<image_placeholder>)\s*")
NAMED_IMAGE = re.compile(r"(?:Picture \d+:\s*)?<img>(.*?)</img>\s*")  # Qwen-VL: Picture 1: <img>1.jpg</img>
FILE_ADDRESS = re.compile(r"^file://(?=/)")


def turns_of(record: Any) -> list[Any] | None:
    """Return the turns of a chat record, or None if a record is not a chat. A list of turns is a chat too."""
    if isinstance(record, dict):
        key = first_key(record, TURN_KEYS)
        prompt, completion = record.get("prompt"), record.get("completion")
        both = isinstance(prompt, list) and isinstance(completion, list)
        record = record[key] if key else [*prompt, *completion] if both else None  # type: ignore[misc]
    is_list = isinstance(record, list) and bool(record) and isinstance(record[0], dict)
    return record if is_list and not record[0].keys().isdisjoint(("role", "from")) else None


def chat_entries(at: Location, record: Any) -> Iterator[Located]:
    """Yield an entry for each question that has an answer. If the user gives only an image, the answer is its caption.

    A chat without an image, or with several images, is left out.
    """
    turns = turns_of(record) or []
    key = (first_key(record, TURN_KEYS) or "turns") if isinstance(record, dict) else "turns"
    images = images_of(record) if isinstance(record, dict) else []
    parts = [_parts(turn) if isinstance(turn, dict) else None for turn in turns]
    images += [image for part in parts if part for image in part[1]]
    images = list(dict.fromkeys(FILE_ADDRESS.sub("", image) for image in images))
    if len(images) != 1:
        yield (
            at,
            LeftOut(
                f"the conversation has {len(images)} images; an example has one" if images else "the conversation has no image"
            ),
        )
        return
    extra = {name: record[name] for name in ("split", "group") if name in record} if isinstance(record, dict) else {}
    question: list[str] | None = None
    for number, (turn, part) in enumerate(zip(turns, parts, strict=True)):
        place = at if isinstance(at, int) else f"{at}.{key}[{number}]"
        role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        if part is None:
            yield place, f"a turn is {quoted(turn)}; expected a text under content or value"
        elif role in QUESTION_ROLES:
            question = [*(question or []), part[0]]
        elif role in ANSWER_ROLES and question is None:
            yield place, "this answer has no question before it"
        elif role in ANSWER_ROLES:
            yield place, answered(images[0], " ".join(filter(None, question or [])), part[0]) | extra
            question = None


def answered(image: Any, question: str, answer: Any) -> Entry:
    """Return the entry of a question with its answer, or of a caption if there is no question."""
    return {"image": image} | ({"question": question, "answers": [answer]} if question else {"text": answer})


def without_image_token(text: str) -> str:
    """Return a text without <image> and similar words, which mark the place of the image."""
    return IMAGE_TOKEN.sub(" ", text).strip()


def images_of(record: Entry) -> list[str]:
    """Return the paths of the images of a record. The record has a path, a list of paths, or a list of {"path": …}."""
    value = record.get(first_key(record, IMAGE_LISTS) or "")
    values = [_path_of(each) for each in (value if isinstance(value, list) else [value])]
    return [path for path in values if path]


def _path_of(value: Any) -> str:
    """Return the path of an image, which is a text or an object with the path, or ""."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("url", "path", "image") if isinstance(value.get(key), str)), "")
    return value if isinstance(value, str) else ""


def _parts(turn: Entry) -> tuple[str, list[str]] | None:
    """Return the text and the images of a turn, or None if it has no text and no list of parts."""
    content = turn.get("value", turn.get("content"))
    texts, images = [], []
    for part in content if isinstance(content, list) else [{"text": content}]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(kind, str) and kind.startswith("image"):
            images.append(_path_of(part.get("image_url", part)))
        elif not isinstance(content, list):
            return None
    text = " ".join(texts)
    images += NAMED_IMAGE.findall(text)
    return without_image_token(NAMED_IMAGE.sub("", text)), [image for image in images if image]
