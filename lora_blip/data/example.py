"""What a line of annotations says."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class AsText:
    """A slot that keeps a path as its text, a quarter as large, and gives it as a Path each time."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    def __get__(self, example: Any, kind: Any = None) -> Any:
        return self if example is None else Path(self.slot.__get__(example, kind))

    def __set__(self, example: Any, path: str | Path) -> None:
        self.slot.__set__(example, str(path))


@dataclass(frozen=True, slots=True)  # there may be millions
class Example:
    """One line: an image and a text that describes it, or a question and its answers, one for each who was asked.

    `group` is free for the user ("unseen pairs"). `prompt` replaces the task's own prompt for this line. Two questions
    of one image with the same words differ by their `question_id`.
    """

    image: Path
    text: str  # empty for a question
    name: str  # the image as the line wrote it
    line: int
    group: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    source: str = field(default="", compare=False, repr=False)  # the annotations, for messages
    prompt: str = ""
    question_id: int | str = ""

    @property
    def file(self) -> str:
        """`image` as text: equal where that is, and cheap to look up."""
        return FILE(self)

    @property
    def words(self) -> str:
        """All that the line says of its picture."""
        return " ".join(filter(None, (self.prompt, self.text, self.question, *self.answers)))


put_file, put_text, put_name, put_line, put_group, put_question, put_answers, put_source, put_prompt, put_question_id = (
    vars(Example)[each.name].__set__ for each in fields(Example)
)
SLOT = vars(Example)["image"]
FILE: Callable[[Example], str] = SLOT.__get__
Example.image = AsText(SLOT)  # type: ignore[assignment,misc]  # after the class is made: its slots would conflict with it


def quick(
    file: str, text: str, name: str, line: int, group: str, question: str, answers: tuple[str, ...], source: str,
    prompt: str, question_id: int | str,
) -> Example:  # fmt: skip
    """Example(Path(file), text, …), in half the time: a million are made at a start."""
    made = object.__new__(Example)
    put_file(made, file)
    put_text(made, text)
    put_name(made, name)
    put_line(made, line)
    put_group(made, group)
    put_question(made, question)
    put_answers(made, answers)
    put_source(made, source)
    put_prompt(made, prompt)
    put_question_id(made, question_id)
    return made
