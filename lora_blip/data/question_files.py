"""Read a file of QUESTION. It needs images and questions only, and the settings of columns may be those of REFERENCES."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lora_blip.data import annotations
from lora_blip.data.entries import TEXT_KEYS, SomeLinesError, canonical
from lora_blip.data.example import Example
from lora_blip.data.formats import Keys
from lora_blip.data.several_files import of_several_files, with_usual_names
from lora_blip.errors import DataError
from lora_blip.runtime.system_errors import quoted_for_shell

SAMPLE = 50  # lines in which a question is searched
ANSWERS = re.compile(r""" --answer-key (?:"[^"]*"|'[^']*'|[^\s;?]+)|; replace KEY by one of these keys""")


def read_questions(source: str, root: str, keys: Keys, has_references: bool) -> list[Example]:
    """Return the lines of a file of questions. Their images are not opened. Raise DataError if no line has a question.

    root: the folder that image paths are relative to. has_references: whether `keys` names the columns of another file too.
    """
    named = Keys(image=keys.image, question=keys.question)
    own = with_usual_names(named) if has_references else named
    with of_several_files(named, has_references), _about_questions():
        examples, _ = annotations.read(source, root, on_bad_data="skip", decode=False, keys=own, setting="question")
    if not any(example.question for example in examples):
        texts = (name for name in TEXT_KEYS if _has_questions(source, replace(own, question=name)))
        name = next(texts, "COLUMN")
        raise DataError(
            f"{source}: no line has a question; if its texts are the questions: --question-key {quoted_for_shell(name)}"
        )
    return examples


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


@contextmanager
def _about_questions() -> Iterator[None]:
    """Change the flags in an error about columns: they name a question in place of a text, and no answers."""
    try:
        yield
    except SomeLinesError:
        raise
    except DataError as error:
        message = ANSWERS.sub("", str(error)).replace("--text-key", "--question-key")
        message = message.replace("known name for the text", "known name for the question")
        message = message.replace(
            "no text: expected one of the keys text, caption, or question and answers", 'no key "question"'
        )
        raise DataError(message) from None
