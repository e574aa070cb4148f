"""`Example`: one line of an annotation file."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any


class AsText:
    """A slot for a path. It stores a string, which needs a quarter of a Path's memory. Reading it returns a Path."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    def __get__(self, example: Any, kind: Any = None) -> Any:
        return self if example is None else Path(self.slot.__get__(example, kind))

    def __set__(self, example: Any, path: str | Path) -> None:
        self.slot.__set__(example, str(path))


@dataclass(frozen=True, slots=True)  # there may be millions
class Example:
    """One line: an image with a caption, or an image with a question and its answers, one answer per annotator.

    `group` is a label that the user chose, such as "unseen pairs"; scores are also reported by group. `prompt` replaces the
    task's prompt for this line. `question_id` distinguishes two questions with the same words about one image.
    """

    image: Path
    text: str  # empty for a question
    name: str  # the image path as written in the line
    line: int
    group: str = ""
    question: str = ""
    answers: tuple[str, ...] = ()
    source: str = field(default="", compare=False, repr=False)  # the annotation file, for messages
    prompt: str = ""
    question_id: int | str = ""

    @property
    def file(self) -> str:
        """The image path as a string, which is a faster dictionary key than a Path."""
        return FILE(self)

    @property
    def words(self) -> str:
        """All texts of the line, joined."""
        return " ".join(filter(None, (self.prompt, self.text, self.question, *self.answers)))


# the setters of the slots; they work although the class is frozen
put_file, put_text, put_name, put_line, put_group, put_question, put_answers, put_source, put_prompt, put_question_id = (
    vars(Example)[each.name].__set__ for each in fields(Example)
)
SLOT = vars(Example)["image"]
FILE: Callable[[Example], str] = SLOT.__get__
Example.image = AsText(SLOT)  # type: ignore[assignment,misc]  # set here, because in the class it would conflict with the slot


def quick(
    file: str, text: str, name: str, line: int, group: str, question: str, answers: tuple[str, ...], source: str,
    prompt: str, question_id: int | str,
) -> Example:  # fmt: skip
    """Return Example(Path(file), text, …) in half the time, because a large data set has millions of lines."""
    example = object.__new__(Example)
    put_file(example, file)
    put_text(example, text)
    put_name(example, name)
    put_line(example, line)
    put_group(example, group)
    put_question(example, question)
    put_answers(example, answers)
    put_source(example, source)
    put_prompt(example, prompt)
    put_question_id(example, question_id)
    return example
