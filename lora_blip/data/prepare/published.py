"""Read published data sets as downloaded: COCO captions, VQAv2, Karpathy's splits, Flickr8k, JSON lists.

Each reader yields pairs of a location and an entry, or the reason why the entry is invalid. An entry may have the key `split`,
the image's split in the data set, or "" if it is in none.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_blip.data.entries import SPLITS, Entry, WrittenFloat, as_text
from lora_blip.data.formats import LONGEST, TOO_LONG, LeftOut, Located, numbered_lines, open_text, with_slashes
from lora_blip.data.tables import csv_entries
from lora_blip.errors import DataError
from lora_blip.runtime.untrusted import no_constant, once, parsed, quoted, why

YEAR = re.compile(r"(?<![a-z])(train|val|test)(?:-?dev)?20\d\d", re.IGNORECASE)  # in COCO's and VQAv2's file names
TOKEN = re.compile(r"(\S+)#\d+\t(.*)")  # 1000268201_693b08cb0e.jpg#0⇥A child in a pink dress …
FLICKR30K = re.compile(r"image(_name)?[|,] ?comment_number[|,] ?comment", re.IGNORECASE)  # the header of both tables
FLICKR8K_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt", "test": "Flickr_8k.testImages.txt"}
TEXT = str | int | float  # what `as_text` takes
VQA_ANSWER = {"answer", "answer_confidence", "answer_id"}
KARPATHY_SENTENCE = {"raw", "tokens", "imgid", "sentid"}
VIZWIZ = {
    "is_rejected": "a caption that VizWiz rejected",
    "is_precanned": "a canned caption of VizWiz, which describes no image",
}
BEFORE_STOP = re.compile(r"\s+([.,;:!?]+)(?=\s|$)")


def document(path: Path) -> Any:
    """Return the parsed JSON. VQAv2's answers and Karpathy's sentences become strings, which need a tenth of the memory."""
    try:
        with open_text(path) as file:
            text = file.read()
        return parsed(text, _COMPACT)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({why(error)})") from None
    except ValueError as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 0
        where = f":{line}" * bool(line)
        if line and (fix := with_slashes(text, line)):
            raise DataError(f"{path}{where}: {fix}") from None
        raise DataError(
            f"{path}{where}: not valid JSON ({error}); the file may be incomplete: download or unpack it again"
        ) from None


def coco_entries(path: Path, found: Any) -> Iterator[Located]:
    """Read captions_train2017.json: images[{id, file_name}] and annotations[{image_id, caption}]."""
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
        if not reason and (key := next((key for key in VIZWIZ if entry.get(key) is True), "")):
            reason = LeftOut(VIZWIZ[key])
        if reason:
            yield f"annotations[{index}]", reason
        else:
            yield f"annotations[{index}]", {"image": names[entry["image_id"]], "text": entry["caption"]} | _prompt_of(entry)


def karpathy_entries(path: Path, found: Any) -> Iterator[Located]:
    """Read dataset_coco.json and similar files: images[{filepath, filename, split, sentences[{raw}]}]."""
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
            raw = _text_of(sentence, "raw")
            yield place, _lacks(sentence, raw=TEXT) if raw is None else {"image": name, "text": spaced(raw), "split": side}


def vqa_entries(path: Path, found: Any, answers_path: Path, answers: Any) -> Iterator[Located]:
    """Read v2_OpenEnded_mscoco_train2014_questions.json, and the ten answers to each question from `answers`.

    questions[{image_id, question, question_id}] and annotations[{question_id, answers[{answer}]}].
    """
    answers_of: dict[Any, list[str] | str] = {}  # question id → its answers, or why it has none
    for index, entry in enumerate(_as_list(answers_path, "annotations", answers)):
        if reason := _lacks(entry, question_id=int | str):
            yield f"annotations[{index}] of {answers_path.name}", reason
        else:
            answers_of[entry["question_id"]] = _vqa_answers(f"{answers_path.name}: annotations[{index}]", entry)
    subset = subset_of(path, found)
    for index, entry in enumerate(_as_list(path, "questions", found)):
        if reason := _lacks(entry, image_id=int, question=TEXT, question_id=int | str):
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


def subset_of(path: Path, found: Any) -> str:
    """Return the subset, such as "train2014", which is part of the names of VQAv2's images."""
    subset = found.get("data_subtype") or ((year := YEAR.search(path.name)) and year[0])
    if not isinstance(subset, str):
        raise DataError(
            f'{path} has no "data_subtype", a part of its image names; add "data_subtype": "train2014", for example'
        )
    return subset


def _vqa_answers(place: str, entry: Entry) -> list[str] | str:
    """Return the answers that are not empty, or the reason why there are none."""
    if reason := _lacks(entry, answers=list):
        return f"{place}: {reason}"
    answers = [_text_of(answer, "answer") for answer in entry["answers"]]
    if None in answers:
        number = answers.index(None)
        return f"{place}.answers[{number}]: {_lacks(entry['answers'][number], answer=TEXT)}"
    return [answer for answer in answers if answer and answer.strip()] or f"{place}: all answers are empty"


def flickr8k_entries(path: Path) -> Iterator[Located]:
    """Read Flickr8k.token.txt, or Kaggle's captions.txt. If the lists of images are in its folder, entries have a split."""
    sides = _flickr8k_sides(path.parent)
    with open_text(path) as file:
        kaggle = file.readline(LONGEST).strip().lower() == "image,caption"
    for number, entry in csv_entries(path) if kaggle else _token_entries(path):
        if isinstance(entry, dict):
            entry["text"] = spaced(entry["text"])
            if sides:
                entry["split"] = sides.get(entry["image"]) or sides.get(whole_name(entry["image"]), "")
        yield number, entry


def flickr30k_entries(path: Path) -> Iterator[Located]:
    """Read Flickr30k's results.csv (image_name| comment_number| comment), or the same table with commas.

    One row of the published results.csv lacks its second separator. It is left out.
    """
    separator = ""
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
        elif not separator:
            separator = "|" if "|" in line else ","
        else:
            cells = line.split("|", 2) if separator == "|" else next(csv.reader([line]))
            if len(cells) == 3:
                yield number, {"image": cells[0].strip(), "caption": spaced(cells[2].strip())}
            else:
                yield number, LeftOut(f"a broken row, {len(cells)} columns instead of 3: {quoted(line.strip()[:60])}")


def whole_name(image: str) -> str:
    """Return an image name without a suffix after .jpg: Flickr8k's text file contains 2258277193_586949ec62.jpg.1."""
    return re.sub(r"(\.jpe?g)\.\d+$", r"\1", image)


def spaced(caption: str) -> str:
    """Return a caption without the space that tokenized captions have before punctuation."""
    return BEFORE_STOP.sub(r"\1", caption)


def _token_entries(path: Path) -> Iterator[Located]:
    for number, line in numbered_lines(path):
        if line is None:
            yield number, TOO_LONG
        elif match := TOKEN.fullmatch(line.strip()):
            yield number, {"image": match[1], "text": match[2]}
        else:
            yield number, f"expected image.jpg#0⇥caption, got {line.strip()[:60]!r}"


def _flickr8k_sides(folder: Path) -> dict[str, str]:
    """Return image → train, val or test, or {} if the training list is missing."""
    lists = {side: folder / name for side, name in FLICKR8K_LISTS.items()}
    if not lists["train"].is_file():
        return {}
    lists_found = {side: numbered_lines(path) for side, path in lists.items() if path.is_file()}
    try:
        return {line.strip(): side for side, lines in lists_found.items() for _, line in lines if line}
    except OSError as error:
        raise DataError(f"{folder}: one of {', '.join(FLICKR8K_LISTS.values())} cannot be read ({why(error)})") from None


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """Return an object of a JSON, or its only text as a string. Millions of dicts would fill the memory."""
    entry = once(pairs)
    if "answer" in entry and entry.keys() <= VQA_ANSWER and (answer := as_text(entry["answer"])) is not None:
        return sys.intern(answer)
    if "raw" in entry and entry.keys() <= KARPATHY_SENTENCE and isinstance(entry["raw"], str):
        return entry["raw"]
    return entry


_COMPACT = json.JSONDecoder(object_pairs_hook=_compact, parse_float=WrittenFloat, parse_constant=no_constant)


def _text_of(entry: Any, key: str) -> str | None:
    """Return the text of an answer or sentence, which is a string or an object, or None."""
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
    """Return a message about the first key that is missing or has a wrong type, or "" if all `kinds` are right."""
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
