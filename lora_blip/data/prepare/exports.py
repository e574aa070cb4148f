"""Read the JSON files of annotation tools and chat data sets: Label Studio, LLaVA, TextCaps, and kohya's meta_cap.json."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import SPLITS, as_text
from lora_blip.data.formats import LeftOut, Located
from lora_blip.runtime.untrusted import quoted

UPLOAD = re.compile(r"^/data/(upload/\d+/|local-files/\?d=)")  # the start of an image's address in Label Studio
IMAGE_TOKEN = re.compile(r"\s*<image>\s*")
ASKS, REPLIES = ("human", "user"), ("gpt", "assistant")


def document_format(found: Any) -> str:
    """Return the format of a JSON document that has one of these layouts, or ""."""
    if isinstance(found, dict):
        data = found.get("data")
        first = data[0] if isinstance(data, list) and data else None
        if isinstance(first, dict) and ("caption_str" in first or "reference_strs" in first):
            return "textcaps"
        values = list(found.values())[:1]
        return "kohya" if values and isinstance(values[0], dict) and values[0].keys() & {"caption", "tags"} else ""
    first = found[0] if isinstance(found, list) and found else None
    if not isinstance(first, dict):
        return ""
    if "conversations" in first:
        return "llava"
    if isinstance(first.get("data"), dict) and "annotations" in first:
        return "labelstudio"
    return "labelstudio_min" if "annotation_id" in first and "annotator" in first else ""


def textcaps_entries(path: Path, found: Any) -> Iterator[Located]:  # noqa: ARG001  # one signature for all readers
    """Read TextCaps: data[{image_path, caption_str, set_name}]."""
    for index, entry in enumerate(found["data"] if isinstance(found, dict) else found):
        place = f"data[{index}]"
        name, text = (entry.get("image_path"), entry.get("caption_str")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or as_text(text) is None:
            yield place, "expected an object with the texts image_path and caption_str"
        else:
            yield place, {"image": name, "text": text} | _side(entry.get("set_name"))


def kohya_entries(path: Path, found: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read meta_cap.json: {image: {"caption": …, "tags": …}}. Without a caption, the tags are the text."""
    for name, entry in found.items() if isinstance(found, dict) else ():
        text = (entry.get("caption") or entry.get("tags")) if isinstance(entry, dict) else entry
        yield name, {"image": name, "text": text} if as_text(text) else f"no caption: {quoted(entry)}"


def llava_entries(path: Path, found: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read [{image, conversations[{from, value}]}]: each question with its answer, without <image>."""
    for index, entry in enumerate(found):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            yield f"[{index}]", 'expected an object with a list "conversations"'
        elif not entry.get("image"):
            yield f"[{index}]", LeftOut("a conversation without an image")
        else:
            yield from _conversation(f"[{index}]", entry["image"], turns)


def _conversation(place: str, image: Any, turns: list[dict[str, Any]]) -> Iterator[Located]:
    """Yield each question that is followed by its answer."""
    asked: str | None = None
    for number, turn in enumerate(turns):
        at, role = f"{place}.conversations[{number}]", turn.get("from", turn.get("role"))
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            yield at, f'"value" is {quoted(text)}, expected a text'
        elif role in ASKS:
            asked = IMAGE_TOKEN.sub(" ", text).strip()
        elif role in REPLIES and asked:
            yield at, {"image": image, "question": asked, "answers": [text]}
            asked = None
        elif role in REPLIES:
            yield at, "an answer without a question"


def studio_entries(path: Path, found: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read Label Studio's JSON: [{data{image}, annotations[{result[{value{text}}]}]}]. Each text is an entry."""
    for index, task in enumerate(found):
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(task.get("annotations"), list):
            yield f"[{index}]", 'expected a task with "data" and a list "annotations"'
            continue
        image = _studio_image(data)
        texts = list(_studio_texts(f"[{index}]", task["annotations"]))
        if not texts:
            yield f"[{index}]", LeftOut("a task without an annotated text")
        for place, text in texts:
            question = as_text(data.get("question"))
            yield place, {"image": image} | ({"question": question, "answers": [text]} if question else {"text": text})


def _studio_image(data: dict[str, Any]) -> Any:
    """Return the path of a task's image, without Label Studio's prefix."""
    values = [data[key] for key in ("image", "img", "photo") if key in data] + list(data.values())
    image = next((value for value in values if isinstance(value, str)), None)
    return UPLOAD.sub("", image) if image else image


def _studio_texts(place: str, annotations: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the texts of a task with their places, without skipped annotations."""
    for number, annotation in enumerate(annotations):
        results = annotation.get("result") if isinstance(annotation, dict) and not annotation.get("was_cancelled") else None
        for item in results if isinstance(results, list) else ():
            value = item.get("value") if isinstance(item, dict) else None
            texts = (value.get("text") or value.get("choices")) if isinstance(value, dict) else None
            for text in texts if isinstance(texts, list) else [texts] if texts else []:
                yield f"{place}.annotations[{number}]", text


def studio_min_entries(path: Path, found: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read Label Studio's JSON-MIN: [{image, caption, annotator, annotation_id, …}]. A caption may be {"text": [...]}."""
    for index, entry in enumerate(found):
        if not isinstance(entry, dict):
            yield f"[{index}]", f"expected an object {{…}}, got {quoted(entry)}"
            continue
        text = next((entry[key] for key in ("caption", "text", "answer") if entry.get(key)), None)
        text = text.get("text") if isinstance(text, dict) else text
        question = as_text(entry.get("question"))
        if not text:
            yield f"[{index}]", LeftOut("a task without an annotated text")
        for each in text if isinstance(text, list) else [text] if text else []:
            words = {"question": question, "answers": [each]} if question else {"text": each}
            yield f"[{index}]", {"image": _studio_image(entry)} | words


def _side(name: Any) -> dict[str, str]:
    side = SPLITS.get(name.lower()) if isinstance(name, str) else None
    return {"split": side} if side else {}
