"""Published data sets as they are downloaded → entries: COCO captions, VQAv2, Karpathy's splits, Flickr8k, JSON lists.

A reader gives every entry with its place. `split` in an entry is the side on which the data set itself puts the image,
"" if it is one of those that the data set leaves out.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import TEXT_KEYS, Entry, WrittenFloat, as_text
from lora_blip.data.formats import LONGEST, TOO_LONG, Located, csv_entries, numbered_lines, open_text
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import no_constant, once, parsed, quoted, why

SPLITS = {"train": "train", "training": "train", "restval": "train"}  # what a data set calls a split → what it is here
SPLITS |= {"val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
YEAR = re.compile(r"(?<![a-z])(train|val|test)(?:-?dev)?20\d\d", re.IGNORECASE)  # in COCO's and VQAv2's file names
TOKEN = re.compile(r"(\S+)#\d+\t(.*)")  # 1000268201_693b08cb0e.jpg#0⇥A child in a pink dress …
FLICKR8K_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
TEXT = str | int | float  # what `as_text` takes
VQA_ANSWER = {"answer", "answer_confidence", "answer_id"}
KARPATHY_SENTENCE = {"raw", "tokens", "imgid", "sentid"}
BEFORE_STOP = re.compile(r"\s+([.,;:!?]+)(?=\s|$)")


def document(path: Path) -> Any:
    """The parsed JSON, with VQAv2's answers and Karpathy's sentences as plain strings: a tenth of the memory."""
    try:
        with open_text(path) as file:
            return parsed(file.read(), _COMPACT)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({why(error)})") from None
    except ValueError as error:
        where = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{where}: not valid JSON ({error}); is it whole? download or unpack it again") from None


def json_entries(path: Path, entries: Any) -> Iterator[Located]:
    """[{"image": …, "caption": …}, …], as BLIP's and LAVIS's own files; a list of captions is an entry each."""
    for index, entry in enumerate(_as_list(path, "", entries)):
        texts = next((entry[key] for key in TEXT_KEYS if key in entry), None) if isinstance(entry, dict) else None
        if not isinstance(entry, dict):
            yield f"[{index}]", _lacks(entry)
        elif isinstance(texts, list) and texts:
            yield from ((f"[{index}]", {k: v for k, v in entry.items() if k not in TEXT_KEYS} | {"text": t}) for t in texts)
        else:
            yield f"[{index}]", entry


def coco_entries(path: Path, found: Any) -> Iterator[Located]:
    """captions_train2017.json: images[{id, file_name}] and annotations[{image_id, caption}]."""
    names = {}
    for index, image in enumerate(_as_list(path, "images", found)):
        if reason := _lacks(image, id=int | str, file_name=str):
            yield f"images[{index}]", reason
        else:
            names[image["id"]] = image["file_name"]
    for index, entry in enumerate(_as_list(path, "annotations", found)):
        reason = _lacks(entry, image_id=int | str, caption=TEXT)
        if not reason and entry["image_id"] not in names:
            reason = f"image_id {quoted(entry['image_id'])} is not among the images"
        if reason:
            yield f"annotations[{index}]", reason
        else:
            yield f"annotations[{index}]", {"image": names[entry["image_id"]], "text": entry["caption"]} | _prompt_of(entry)


def karpathy_entries(path: Path, found: Any) -> Iterator[Located]:
    """dataset_coco.json and its like: images[{filepath, filename, split, sentences[{raw}]}]."""
    for index, image in enumerate(_as_list(path, "images", found)):
        reason = _lacks(image, filename=str, split=str, sentences=list)
        reason = reason or _lacks({"filepath": None} | image, filepath=str | None)
        if not reason and image["split"] not in SPLITS:
            reason = f'"split" is {quoted(image["split"])}, expected one of {", ".join(SPLITS)}'
        if reason:
            yield f"images[{index}]", reason
            continue
        side = SPLITS[image["split"]]
        name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        for number, sentence in enumerate(image["sentences"]):
            place = f"images[{index}].sentences[{number}]"
            raw = _said(sentence, "raw")
            yield place, _lacks(sentence, raw=TEXT) if raw is None else {"image": name, "text": spaced(raw), "split": side}


def vqa_entries(path: Path, found: Any, answers_path: Path, answers: Any) -> Iterator[Located]:
    """v2_OpenEnded_mscoco_train2014_questions.json: questions[{image_id, question, question_id}], all ten answers each."""
    said: dict[Any, list[str] | str] = {}  # question id → its answers, or why it has none
    for index, entry in enumerate(_as_list(answers_path, "annotations", answers)):
        if reason := _lacks(entry, question_id=int | str):
            yield f"annotations[{index}] of {answers_path.name}", reason
        else:
            said[entry["question_id"]] = _vqa_answers(f"{answers_path.name}: annotations[{index}]", entry)
    subset = subset_of(path, found)
    for index, entry in enumerate(_as_list(path, "questions", found)):
        if reason := _lacks(entry, image_id=int, question=TEXT, question_id=int | str):
            yield f"questions[{index}]", reason
            continue
        told = said.get(entry["question_id"])
        told = told or f"{answers_path.name} has no answers to question_id {quoted(entry['question_id'])}"
        if isinstance(told, str):
            yield f"questions[{index}]", told
        else:
            name = f"COCO_{subset}_{entry['image_id']:012d}.jpg"
            asked = {"image": name, "question": entry["question"], "answers": told, "question_id": entry["question_id"]}
            yield f"questions[{index}]", asked | _prompt_of(entry)


def subset_of(path: Path, found: Any) -> str:
    """train2014 or such, by which VQAv2's images are named."""
    subset = found.get("data_subtype") or ((year := YEAR.search(path.name)) and year[0])
    if not isinstance(subset, str):
        raise DataError(f'{path} has no "data_subtype" such as "train2014", which its images are named after; add it')
    return subset


def _vqa_answers(place: str, entry: Entry) -> list[str] | str:
    """The answers in words, less those left empty; or the reason why there are none."""
    if reason := _lacks(entry, answers=list):
        return f"{place}: {reason}"
    answers = [_said(answer, "answer") for answer in entry["answers"]]
    if None in answers:
        number = answers.index(None)
        return f"{place}.answers[{number}]: {_lacks(entry['answers'][number], answer=TEXT)}"
    return [answer for answer in answers if answer and answer.strip()] or f"{place}: all answers are empty"


def flickr8k_entries(path: Path) -> Iterator[Located]:
    """Flickr8k.token.txt, or Kaggle's captions.txt; on its sides by the lists of images, if they lie beside it."""
    sides = _flickr8k_sides(path.parent)
    with open_text(path) as file:
        kaggle = file.readline(LONGEST).strip().lower() == "image,caption"
    for number, entry in csv_entries(path) if kaggle else _token_entries(path):
        if isinstance(entry, dict):
            entry["caption"] = spaced(entry["caption"])
            if sides:
                entry["split"] = sides.get(entry["image"]) or sides.get(whole_name(entry["image"]), "")
        yield number, entry


def whole_name(image: str) -> str:
    """Flickr8k's text calls one image 2258277193_586949ec62.jpg.1; its lists leave the .1 out."""
    return re.sub(r"(\.jpe?g)\.\d+$", r"\1", image)


def spaced(caption: str) -> str:
    """Without the space that tokenised captions have before a full stop or comma."""
    return BEFORE_STOP.sub(r"\1", caption)


def _token_entries(path: Path) -> Iterator[Located]:
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
        elif match := TOKEN.fullmatch(line.strip()):
            yield number, {"image": match[1], "caption": match[2]}
        else:
            yield number, f"expected image.jpg#0⇥caption, got {line.strip()[:60]!r}"


def _flickr8k_sides(folder: Path) -> dict[str, str]:
    """Image → train, val or test; empty without the training list, which a split cannot do without."""
    lists = {side: folder / name for side, name in FLICKR8K_LISTS.items()}
    if not lists["train"].is_file():
        return {}
    there = {side: numbered_lines(path) for side, path in lists.items() if path.is_file()}
    try:
        return {line.strip(): side for side, lines in there.items() for _, line in lines if line}
    except OSError as error:
        raise DataError(f"{folder}: one of {', '.join(FLICKR8K_LISTS.values())} cannot be read ({why(error)})") from None


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """Called on every object of a JSON, innermost first: millions are not worth keeping as dicts."""
    entry = once(pairs)
    if "answer" in entry and entry.keys() <= VQA_ANSWER and (answer := as_text(entry["answer"])) is not None:
        return sys.intern(answer)
    if "raw" in entry and entry.keys() <= KARPATHY_SENTENCE and isinstance(entry["raw"], str):
        return entry["raw"]
    return entry


_COMPACT = json.JSONDecoder(object_pairs_hook=_compact, parse_float=WrittenFloat, parse_constant=no_constant)


def _said(entry: Any, key: str) -> str | None:
    """The text of an answer or sentence, compact or with keys of its own beside; None if it has none."""
    return as_text(entry.get(key) if isinstance(entry, dict) else entry)


def _prompt_of(entry: Entry) -> Entry:
    return {"prompt": entry["prompt"]} if "prompt" in entry else {}


def _as_list(path: Path, key: str, found: Any) -> list[Any]:
    entries = found.get(key) if key and isinstance(found, dict) else found if not key else None
    if not isinstance(entries, list):
        what = f'a list "{key}"' if key else "a list of objects"
        raise DataError(f"{path}: expected {what}, as in the file that was published; download or unpack it again")
    return entries


def _lacks(entry: Any, **kinds: Any) -> str:
    """What an entry of a JSON lacks of the keys that it must have, each with its type; "" if nothing."""
    if not isinstance(entry, dict):
        return f"expected an object {{…}}, got {_short(entry)}"
    for key, kind in kinds.items():
        if key not in entry:
            return f'no "{key}"'
        if not isinstance(entry[key], kind):
            expected = "a text" if kind is TEXT else getattr(kind, "__name__", kind)
            return f'"{key}" is {"null" if entry[key] is None else _short(entry[key])}, expected {expected}'
    return ""


def _short(value: Any) -> str:
    return quoted(value if isinstance(value, str) else quoted(value))
