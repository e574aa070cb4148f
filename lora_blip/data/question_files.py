"""Read a file of QUESTION. It needs images and questions only, and the settings of columns may be those of REFERENCES."""

import re
from contextlib import suppress
from itertools import islice
from pathlib import Path

from lora_blip.data import annotations
from lora_blip.data.entries import TEXT_KEYS, SomeLinesError, canonical
from lora_blip.data.example import Example
from lora_blip.data.formats import Keys
from lora_blip.data.two_files import FIX
from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell

SAMPLE = 50  # lines in which a question is searched
ANSWERS = re.compile(r""" --answer-key (?:"[^"]*"|'[^']*'|[^\s;?]+)|; replace KEY by one of these keys""")
OTHER_FILE = (
    '\nIMAGE_KEY and QUESTION_KEY name the columns of REFERENCES too; set QUESTION = "" (--question "") to ask the questions '
    "of REFERENCES, or rename the columns or keys of this file to image and question"
)


def read_questions(source: str, root: str, keys: Keys, has_references: bool) -> list[Example]:
    """Return the lines of a file of questions. Their images are not opened. Raise DataError if no line has a question.

    root: the folder that image paths are relative to. has_references: whether `keys` names the columns of another file too.
    """
    keys = _keys_of(source, keys)
    try:
        examples, _ = annotations.read(source, root, on_bad_data="skip", decode=False, keys=keys, setting="question")
    except SomeLinesError:
        raise
    except DataError as error:
        message = _about_questions(str(error))
        if has_references and keys.named and FIX.search(message):  # its flags would name other columns of REFERENCES
            message = FIX.sub("", message) + OTHER_FILE
        raise DataError(message) from None
    if not any(example.question for example in examples):
        texts = (name for name in TEXT_KEYS if _has_questions(source, Keys(image=keys.image, question=name)))
        name = next(texts, "COLUMN")
        raise DataError(
            f"{source}: no line has a question; if its texts are the questions: --question-key {quoted_for_shell(name)}"
        )
    return examples


def _keys_of(source: str, keys: Keys) -> Keys:
    """Return the names of the image and of the question: those that the user gives, or "" for usual ones if the file has them.

    If the file has neither, return those that the user gives.
    """
    choices = [
        Keys(image=image, question=question)
        for image in dict.fromkeys((keys.image, ""))
        for question in dict.fromkeys((keys.question, ""))
    ]
    return choices[0] if len(choices) == 1 else next((each for each in choices if _has_questions(source, each)), choices[0])


def _has_questions(source: str, keys: Keys) -> bool:
    """Return True if one of the first lines is a question, with these names of the columns or keys."""
    with suppress(DataError, OSError):
        for _, _, entries, _ in annotations.sources_of(Path(source), keys, "question", use_splits=False):
            for _, entry in islice(entries(), SAMPLE):
                if (
                    isinstance(entry, dict)
                    and isinstance(known := canonical(entry, answered=False), dict)
                    and "question" in known
                ):
                    return True
    return False


def _about_questions(message: str) -> str:
    """Return an error about columns in which the flags name a question in place of a text, and no answers."""
    message = ANSWERS.sub("", message).replace("--text-key", "--question-key")
    message = message.replace("known name for the text", "known name for the question")
    return message.replace("no text: expected one of the keys text, caption, or question and answers", 'no key "question"')
