"""Read the JSON files of Label Studio, VIA, kohya (meta_cap.json), TextCaps, Visual Genome, GQA and A-OKVQA."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import SPLITS, TEXT_KEYS, LeftOut, Located, as_text, first_key
from lora_blip.runtime.untrusted import quoted

STUDIO_PREFIX = re.compile(r"^/data/(upload/\d+/|local-files/\?d=)")  # what Label Studio puts before the path of an image


def document_format(document: Any) -> str:
    """Return the format of a parsed JSON document if this file has a reader for it, or ""."""
    if isinstance(document, dict):
        if _via_images(document):
            return "via"
        data = document.get("data")
        first = data[0] if isinstance(data, list) and data else None
        if isinstance(first, dict) and ("caption_str" in first or "reference_strs" in first):
            return "textcaps"
        values = list(document.values())[:1]
        if values and isinstance(values[0], dict) and values[0].keys() >= {"imageId", "question"}:
            return "gqa"
        return "kohya" if values and isinstance(values[0], dict) and values[0].keys() & {"caption", "tags"} else ""
    first = document[0] if isinstance(document, list) and document else None
    if not isinstance(first, dict):
        return ""
    if first.keys() >= {"id", "regions"}:
        return "visual_genome"
    if first.keys() >= {"image_id", "direct_answers"}:
        return "aokvqa"
    if "conversations" in first:
        return "llava"
    if isinstance(first.get("data"), dict) and "annotations" in first:
        return "labelstudio"
    return "labelstudio_min" if "annotation_id" in first and "annotator" in first else ""


def _via_images(document: dict[str, Any]) -> dict[str, Any]:
    """Return {key: image} of a project or an export of VIA 2, or {} for another document."""
    images = document.get("_via_img_metadata", document)
    first = next(iter(images.values()), None) if isinstance(images, dict) else None
    return images if isinstance(first, dict) and first.keys() >= {"filename", "file_attributes"} else {}


def via_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read VIA 2: {key: {filename, file_attributes{caption}}}. The text is the attribute with a known name, or the only one."""
    for name, image in _via_images(document).items() if isinstance(document, dict) else ():
        attributes = image.get("file_attributes") if isinstance(image, dict) else None
        if not isinstance(attributes, dict):
            yield name, 'expected an object with "filename" and "file_attributes"'
            continue
        filled = {key: value for key, value in attributes.items() if as_text(value)}
        key = first_key(filled, TEXT_KEYS) or next(iter(filled), "") * (len(filled) == 1)
        if not filled:
            yield name, LeftOut("the image has no file attribute")
        elif key:
            yield name, {"image": image.get("filename"), "text": filled[key]}
        else:
            names = quoted(list(filled))[1:-1]
            yield name, f"it has the file attributes {names}; rename the one with the text to caption in VIA"


def textcaps_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001  # one signature for all readers
    """Read TextCaps: data[{image_path, caption_str, set_name}]."""
    for index, entry in enumerate(document["data"] if isinstance(document, dict) else document):
        place = f"data[{index}]"
        name, text = (entry.get("image_path"), entry.get("caption_str")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or as_text(text) is None:
            yield place, "expected an object with the texts image_path and caption_str"
        else:
            yield place, {"image": name, "text": text} | _split(entry.get("set_name"))


def kohya_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read meta_cap.json: {image: {"caption": …, "tags": …}}. Without a caption, the tags are the text."""
    for name, entry in document.items() if isinstance(document, dict) else ():
        text = (entry.get("caption") or entry.get("tags")) if isinstance(entry, dict) else entry
        yield name, {"image": name, "text": text} if as_text(text) else f"it has no caption or tags: {quoted(entry)}"


def studio_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read Label Studio's JSON: [{data{image}, annotations[{result[{value{text}}]}]}]. Each annotated text is an entry."""
    for index, task in enumerate(document):
        data = task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(task.get("annotations"), list):
            yield f"[{index}]", 'expected a task with "data" and a list "annotations"'
            continue
        image = _studio_image(data)
        texts = list(_studio_texts(f"[{index}]", task["annotations"]))
        if not texts:
            yield f"[{index}]", LeftOut("the task has no annotated text")
        for place, text in texts:
            question = as_text(data.get("question"))
            yield place, {"image": image} | ({"question": question, "answers": [text]} if question else {"text": text})


def _studio_image(data: dict[str, Any]) -> Any:
    """Return the image path of a task without Label Studio's prefix, or None if it has no text value."""
    values = [data[key] for key in ("image", "img", "photo") if key in data] + list(data.values())
    image = next((value for value in values if isinstance(value, str)), None)
    return STUDIO_PREFIX.sub("", image) if image else image


def _studio_texts(place: str, annotations: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield (place, text) for each annotated text of a task. Annotations that were cancelled are skipped."""
    for number, annotation in enumerate(annotations):
        results = annotation.get("result") if isinstance(annotation, dict) and not annotation.get("was_cancelled") else None
        for item in results if isinstance(results, list) else ():
            value = item.get("value") if isinstance(item, dict) else None
            texts = (value.get("text") or value.get("choices")) if isinstance(value, dict) else None
            for text in texts if isinstance(texts, list) else [texts] if texts else []:
                yield f"{place}.annotations[{number}]", text


def studio_min_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read Label Studio's JSON-MIN: [{image, caption, annotator, annotation_id, …}]. A caption may be {"text": […]}."""
    for index, entry in enumerate(document):
        if not isinstance(entry, dict):
            yield f"[{index}]", f"expected an object {{…}}, got {quoted(entry)}"
            continue
        text = next((entry[key] for key in ("caption", "text", "answer") if entry.get(key)), None)
        text = text.get("text") if isinstance(text, dict) else text
        question = as_text(entry.get("question"))
        if not text:
            yield f"[{index}]", LeftOut("the task has no annotated text")
        for each in text if isinstance(text, list) else [text] if text else []:
            keys = {"question": question, "answers": [each]} if question else {"text": each}
            yield f"[{index}]", {"image": _studio_image(entry)} | keys


def _split(name: Any) -> dict[str, str]:
    """Return {"split": "train", "val" or "test"}, or {} if the name is not one of a split."""
    split = SPLITS.get(name.lower()) if isinstance(name, str) else None
    return {"split": split} if split else {}


def genome_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read Visual Genome's region descriptions: [{id, regions[{image_id, phrase}]}]. Each phrase is an entry."""
    for index, entry in enumerate(document if isinstance(document, list) else ()):
        regions = entry.get("regions") if isinstance(entry, dict) else None
        if not isinstance(regions, list):
            yield f"[{index}]", 'expected an object with a list "regions"'
            continue
        for number, region in enumerate(regions):
            name = as_text(region.get("image_id", entry.get("id"))) if isinstance(region, dict) else None
            place = f"[{index}].regions[{number}]"
            yield place, {"image": f"{name}.jpg", "text": region.get("phrase")} if name else 'expected an object with "phrase"'


def gqa_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read GQA's questions: {question id: {imageId, question, answer}}."""
    for number, entry in document.items() if isinstance(document, dict) else ():
        name = as_text(entry.get("imageId")) if isinstance(entry, dict) else None
        if name is None or "answer" not in entry:
            yield quoted(number), 'expected an object with "imageId", "question" and "answer"'
        else:
            question = {"question": entry.get("question"), "answers": [entry["answer"]], "question_id": number}
            yield quoted(number), {"image": f"{name}.jpg"} | question


def aokvqa_entries(path: Path, document: Any) -> Iterator[Located]:  # noqa: ARG001
    """Read A-OKVQA: [{image_id, question, direct_answers, split}]. The images are those of COCO 2017."""
    for index, entry in enumerate(document if isinstance(document, list) else ()):
        number = entry.get("image_id") if isinstance(entry, dict) else None
        if type(number) is not int or not 0 <= number < 10**12:
            yield f"[{index}]", 'expected an object with a whole number "image_id"'
        else:
            question = {"question": entry.get("question"), "answers": entry.get("direct_answers")}
            extra = {"question_id": entry["question_id"]} if "question_id" in entry else {}
            yield f"[{index}]", {"image": f"{number:012d}.jpg"} | question | extra | _split(entry.get("split"))
