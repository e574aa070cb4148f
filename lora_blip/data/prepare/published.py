"""Read published data sets as they are downloaded: COCO captions, VQAv2, Karpathy's splits, Flickr8k and Flickr30k.

Each reader yields (location, entry), or (location, reason) for an invalid entry. An entry may have the key `split`: the split
of its image in the data set, or "" if the image is in none.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import SPLITS, Entry, LeftOut, Located, WrittenFloat, as_text
from lora_blip.data.formats import LONGEST, TOO_LONG, numbered_lines, open_text, table_encoding
from lora_blip.data.json_repair import corrected_reason
from lora_blip.data.tables import csv_entries
from lora_blip.errors import DataError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.system_errors import reason_and_fix
from lora_blip.runtime.untrusted import os_error_reason, parsed, quoted, refuse_constant, unique_keys

PARTNERS = {"questions.json": "annotations.json", "annotations.json": "questions.json"}  # the two files of a small VQAv2
YEAR = re.compile(r"(?<![a-z])(train|val|test)(?:-?dev)?20\d\d", re.IGNORECASE)  # in COCO's and VQAv2's file names
TOKEN = re.compile(r"(\S+)#\d+\t(.*)")  # 1000268201_693b08cb0e.jpg#0⇥A child in a pink dress …
FLICKR30K = re.compile(r"image(_name)?[|,] ?comment_number[|,] ?comment", re.IGNORECASE)  # a header with "|" or commas
FLICKR8K_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
TEXT = str | int | float  # values that `as_text` converts
VQA_ANSWER = {"answer", "answer_confidence", "answer_id"}
KARPATHY_SENTENCE = {"raw", "tokens", "imgid", "sentid"}
VIZWIZ = {
    "is_rejected": "VizWiz rejected this caption",
    "is_precanned": "VizWiz's standard caption for a bad photo, which does not describe it",
}
SPACE_BEFORE_PUNCTUATION = re.compile(r"\s+([.,;:!?]+)(?=\s|$)")


def load_json(path: Path) -> Any:
    """Return a parsed JSON file. Raise DataError if it cannot be read.

    VQAv2's answers and Karpathy's sentences are objects in the file. They become strings, which need a tenth of the memory.
    """
    try:
        with open_text(path) as file:
            text = file.read()
        return parsed(text, _COMPACT)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason_and_fix(error, path) or os_error_reason(error)}") from None
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        where = f":{line}" * bool(line)
        if line and (fix := corrected_reason(text, error, line)):
            raise DataError(f"{path}{where}: {fix}") from None
        raise DataError(
            f"{path}{where}: it is not valid JSON ({error}); the file may be incomplete: download or unpack it again"
        ) from None


def coco_entries(path: Path, document: Any) -> Iterator[Located]:
    """Read captions_train2017.json: images[{id, file_name}] and annotations[{image_id, caption}]."""
    names = {}
    for index, image in enumerate(_list_in(path, "images", document)):
        if reason := _invalid(image, id=int | str, file_name=str):
            yield f"images[{index}]", reason
        else:
            names[image["id"]] = image["file_name"]
    for index, entry in enumerate(_list_in(path, "annotations", document)):
        reason = _invalid(entry, image_id=int | str, caption=TEXT)
        if not reason and entry["image_id"] not in names:
            reason = f'image_id {quoted(entry["image_id"])} is not an id in the list "images"'
        if not reason and (key := next((key for key in VIZWIZ if entry.get(key) is True), "")):
            reason = LeftOut(VIZWIZ[key])
        if reason:
            yield f"annotations[{index}]", reason
        else:
            yield f"annotations[{index}]", {"image": names[entry["image_id"]], "text": entry["caption"]} | _prompt_of(entry)


def karpathy_entries(path: Path, document: Any) -> Iterator[Located]:
    """Read dataset_coco.json and similar files: images[{filepath, filename, split, sentences[{raw}]}]."""
    for index, image in enumerate(_list_in(path, "images", document)):
        reason = _invalid(image, filename=str, split=str, sentences=list)
        reason = reason or _invalid({"filepath": None} | image, filepath=str | None)
        if not reason and image["split"] not in SPLITS:
            reason = f'"split" is {quoted(image["split"])}, expected one of {", ".join(SPLITS)}'
        if reason:
            yield f"images[{index}]", reason
            continue
        split = SPLITS[image["split"]]
        name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        for number, sentence in enumerate(image["sentences"]):
            place = f"images[{index}].sentences[{number}]"
            raw = _text_of(sentence, "raw")
            if raw is None:
                yield place, _invalid(sentence, raw=TEXT)
            else:
                yield place, {"image": name, "text": detokenized(raw), "split": split}


def vqa_entries(path: Path, document: Any, answers_path: Path, answers: Any) -> Iterator[Located]:
    """Read v2_OpenEnded_mscoco_train2014_questions.json. The ten answers to each question are in the document `answers`.

    Layout: questions[{image_id, question, question_id}] and annotations[{question_id, answers[{answer}]}].
    """
    answers_of: dict[Any, list[str] | str] = {}  # question id → its answers, or why it has none
    for index, entry in enumerate(_list_in(answers_path, "annotations", answers)):
        if reason := _invalid(entry, question_id=int | str):
            yield f"annotations[{index}] of {answers_path.name}", reason
        else:
            answers_of[entry["question_id"]] = _vqa_answers(f"{answers_path.name}: annotations[{index}]", entry)
    subset = subset_of(path, document)
    for index, entry in enumerate(_list_in(path, "questions", document)):
        if reason := _invalid(entry, image_id=int, question=TEXT, question_id=int | str):
            yield f"questions[{index}]", reason
            continue
        answers_or_reason = answers_of.get(entry["question_id"])
        answers_or_reason = (
            answers_or_reason or f"{answers_path.name} has no answers to question_id {quoted(entry['question_id'])}"
        )
        if isinstance(answers_or_reason, str):
            yield f"questions[{index}]", answers_or_reason
        else:
            name = f"COCO_{subset}_{entry['image_id']:012d}.jpg"
            question = {
                "image": name,
                "question": entry["question"],
                "answers": answers_or_reason,
                "question_id": entry["question_id"],
            }
            yield f"questions[{index}]", question | _prompt_of(entry)


def subset_of(path: Path, document: Any) -> str:
    """Return the subset that is part of the names of VQAv2's images, such as "train2014". Raise DataError if there is none."""
    subset = document.get("data_subtype") or ((year := YEAR.search(path.name)) and year[0])
    if not isinstance(subset, str):
        raise DataError(
            f'{path} has no "data_subtype", which is part of its image names; add it, for example "data_subtype": "train2014"'
        )
    return subset


def with_partner(path: Path) -> list[Path]:
    """Return [path], or both files of VQAv2, questions and answers, if `path` is one and the other is beside it."""
    partner = PARTNERS.get(path.name.lower(), "")
    if path.name.endswith("_questions.json"):
        partner = re.sub("OpenEnded_|MultipleChoice_", "", path.name).replace("_questions", "_annotations")
    elif path.name.endswith("_annotations.json"):
        questions = path.name.replace("_annotations", "_questions")
        partner = questions.replace("v2_", "v2_OpenEnded_") if "v2_" in questions else f"OpenEnded_{questions}"
    other = path.with_name(partner or path.name)
    return [path, other] if partner and other.is_file() else [path]


def _vqa_answers(place: str, entry: Entry) -> list[str] | str:
    """Return the answers that are not empty, or the reason why the list cannot be used."""
    if reason := _invalid(entry, answers=list):
        return f"{place}: {reason}"
    answers = [_text_of(answer, "answer") for answer in entry["answers"]]
    if None in answers:
        number = answers.index(None)
        return f"{place}.answers[{number}]: {_invalid(entry['answers'][number], answer=TEXT)}"
    return [answer for answer in answers if answer and answer.strip()] or f"{place}: all answers are empty"


def flickr8k_entries(path: Path) -> Iterator[Located]:
    """Read Flickr8k.token.txt, or Kaggle's captions.txt. If Flickr_8k.trainImages.txt is beside it, entries have a split."""
    splits = _flickr8k_splits(path.parent)
    with open_text(path) as file:
        kaggle = file.readline(LONGEST).strip().lower() == "image,caption"
    for number, entry in csv_entries(path) if kaggle else _token_entries(path):
        if isinstance(entry, dict):
            entry["text"] = detokenized(entry["text"])
            if splits:
                entry["split"] = splits.get(entry["image"]) or splits.get(name_up_to_jpg(entry["image"]), "")
        yield number, entry


def flickr30k_entries(path: Path) -> Iterator[Located]:
    """Read Flickr30k's results.csv (image_name| comment_number| comment), or the same table with commas.

    One row of the published results.csv has no second separator. This row is left out.
    """
    separator = ""
    for number, line in numbered_lines(path, encoding=table_encoding(path)):
        if line is None:
            yield number, TOO_LONG
        elif not separator:
            separator = "|" if "|" in line else ","
        else:
            cells = line.split("|", 2) if separator == "|" else next(csv.reader([line]))
            if len(cells) == 3:
                yield number, {"image": cells[0].strip(), "caption": detokenized(cells[2].strip())}
            else:
                yield number, LeftOut(f"the row has {counted(len(cells), 'column')} instead of 3: {quoted(line.strip()[:60])}")


def name_up_to_jpg(image: str) -> str:
    """Return an image name up to .jpg. Flickr8k's text file contains one longer name, 2258277193_586949ec62.jpg.1."""
    return re.sub(r"(\.jpe?g)\.\d+$", r"\1", image)


def detokenized(caption: str) -> str:
    """Return a caption without spaces before punctuation, which tokenized captions have: "a cat ." becomes "a cat."."""
    return SPACE_BEFORE_PUNCTUATION.sub(r"\1", caption)


def _token_entries(path: Path) -> Iterator[Located]:
    """Read Flickr8k.token.txt."""
    for number, line in numbered_lines(path, encoding=table_encoding(path)):
        if line is None:
            yield number, TOO_LONG
        elif match := TOKEN.fullmatch(line.strip()):
            yield number, {"image": match[1], "text": match[2]}
        else:
            yield number, f"expected image.jpg#0⇥caption, got {line.strip()[:60]!r}"


def _flickr8k_splits(folder: Path) -> dict[str, str]:
    """Return {image: "train", "val" or "test"}, or {} if the list of training images does not exist."""
    lists = {split: folder / name for split, name in FLICKR8K_LISTS.items()}
    if not lists["train"].is_file():
        return {}
    existing_lists = {split: numbered_lines(path) for split, path in lists.items() if path.is_file()}
    try:
        return {line.strip(): split for split, lines in existing_lists.items() for _, line in lines if line}
    except OSError as error:
        raise DataError(
            f"{folder}: one of {', '.join(FLICKR8K_LISTS.values())} cannot be read ({os_error_reason(error)}); "
            "download it again"
        ) from None


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """Return an object of a JSON file. For an answer of VQAv2 or a sentence of Karpathy, return its text, to save memory."""
    entry = unique_keys(pairs)
    if "answer" in entry and entry.keys() <= VQA_ANSWER and (answer := as_text(entry["answer"])) is not None:
        return sys.intern(answer)
    if "raw" in entry and entry.keys() <= KARPATHY_SENTENCE and isinstance(entry["raw"], str):
        return entry["raw"]
    return entry


_COMPACT = json.JSONDecoder(object_pairs_hook=_compact, parse_float=WrittenFloat, parse_constant=refuse_constant)


def _text_of(entry: Any, key: str) -> str | None:
    """Return the text of an answer or sentence, or None. The entry is a string, or an object with the text under `key`."""
    return as_text(entry.get(key) if isinstance(entry, dict) else entry)


def _prompt_of(entry: Entry) -> Entry:
    """Return {"prompt": …}, or {} if the entry has no prompt."""
    return {"prompt": entry["prompt"]} if "prompt" in entry else {}


def _list_in(path: Path, key: str, document: Any) -> list[Any]:
    """Return the list under a key of a document. Raise DataError if the document has no such list."""
    entries = document.get(key) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise DataError(f'{path}: expected a list "{key}", as in the published file; download or unpack it again')
    return entries


def _invalid(entry: Any, **types: Any) -> str:
    """Return the reason why an entry is invalid: a key is missing or its value has a wrong type. Return "" if valid."""
    if not isinstance(entry, dict):
        return f"expected an object {{…}}, got {_short(entry)}"
    for key, expected_type in types.items():
        if key not in entry:
            boxes = "; boxes have no captions: give a file of captions, such as captions_train2017.json"
            return f'the key "{key}" is missing{boxes * (key == "caption" and "bbox" in entry)}'
        if not isinstance(entry[key], expected_type):
            expected = "a text" if expected_type is TEXT else getattr(expected_type, "__name__", expected_type)
            return f'"{key}" is {"null" if entry[key] is None else _short(entry[key])}, expected {expected}'
    return ""


def _short(value: Any) -> str:
    """Return a value as a short text for a message."""
    return quoted(value if isinstance(value, str) else quoted(value))
