"""Read questions, texts to rank and references from settings or files, and return the examples to predict."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.formats import ESCAPED, NO_KEYS, Keys, open_text, table_encoding
from lora_blip.data.image_folders import example_of
from lora_blip.data.image_sources import ImageSource
from lora_blip.data.question_files import read_questions
from lora_blip.data.several_files import of_several_files
from lora_blip.errors import ConfigError, DataError
from lora_blip.lora.peft_config import TASK_OF
from lora_blip.runtime.counts import counted
from lora_blip.runtime.progress import phase
from lora_blip.runtime.system_errors import quoted_for_shell, reading
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.runtime.user_paths import is_file, relative_if_below, require_folder
from lora_blip.tasks.base import PredictionTask


@dataclass(frozen=True)
class WithQuestion:
    """All images, each with the same question. Each iteration reads the images again."""

    images: Iterable[Example]
    question: str

    def __iter__(self) -> Iterator[Example]:
        return (replace(example, question=self.question, prompt="") for example in self.images)


@dataclass(frozen=True)
class WithPrompts:
    """All images, each repeated for every prompt of its references. Each iteration reads the images again."""

    images: Iterable[Example]
    prompts: dict[Path, list[str]]

    def __iter__(self) -> Iterator[Example]:
        for example in self.images:
            for prompt in self.prompts.get(example.image, [example.prompt]):
                yield replace(example, prompt=prompt)


class OtherTaskError(ConfigError):
    """The settings do not fit the task of the model. They fit the task `wanted`."""

    def __init__(self, message: str, wanted: str) -> None:
        super().__init__(message)
        self.wanted = wanted


def read_texts(texts: str) -> list[str]:
    """Return the texts to rank, in order and without duplicates. Raise ConfigError if there are fewer than two.

    texts: a file with one text per line, in UTF-8, UTF-16 or cp1252, or texts with | between them.
    """
    if not texts:
        return []
    lines = texts.split("|")
    if is_file(texts, "texts"):
        path = Path(texts)
        if path.suffix.lower() in annotations.TABLES:
            raise ConfigError(f"texts = {texts!r} is a table; save its column of texts as a .txt file with one text per line")
        with reading(path), open_text(path, encoding=table_encoding(path)) as file:
            lines = file.read().split("\n")
        if any(map(ESCAPED.search, lines)):
            raise ConfigError(f"texts = {texts!r}: not UTF-8; save the file as UTF-8")
    unique = list(dict.fromkeys(annotations.plain(line) for line in lines if line.strip()))
    if len(unique) < 2:
        raise ConfigError(
            f"texts = {texts!r}: at least two texts are needed to rank; give --texts 'a red cube|a blue cube', or a file "
            "with one text per line"
        )
    return unique


def examples_to_predict(
    task: PredictionTask,
    images: Iterable[Example],
    question: str,
    references: dict[Path, list[Example]],
    texts: list[str],
    keys: Keys = NO_KEYS,
    image_root: str = "",
) -> Iterable[Example]:
    """Return the examples to predict: each image with its questions or prompts.

    If the questions come from a file, return a list. Otherwise return an iterable that reads the images one by one.
    Raise ConfigError if the task needs questions or texts and there are none, or if the task cannot use a question or a text.
    """
    # the task checks whole examples, so each text gets a question, which is not used
    ranked = [replace(example_of("", "?"), text=text, answers=(text,), line=line) for line, text in enumerate(texts, 1)]
    task.pretokenize(ranked)
    for example in ranked:
        if reason := task.check(example):
            raise ConfigError(f"texts: text {example.line}: {reason}")
    if (texts or not task.takes_question) and (report := task.unknown_report(ranked)):
        print(report)
    if not task.writes_text and not texts:
        fix = "set TEXTS (or --texts) to 'a red cube|a blue cube' or to a file"
        raise OtherTaskError(f"the task retrieval ranks texts; {fix}", wanted="vqa" if question else "caption")
    if not task.takes_question and question:
        learned = TASK_OF.get(task.backbone.architecture, "vqa") == "vqa"  # the base answers questions too
        other = "TASK (or --task) to vqa" if learned else "ADAPTER (or --adapter) to an adapter that answers questions"
        raise OtherTaskError(
            f"question = {question!r}: the task {task.name} uses no question; set QUESTION (or --question) to '', or {other}",
            wanted="vqa",
        )
    if task.writes_text and not task.takes_question:
        return with_reference_prompts(task, images, references)
    if not task.takes_question:
        return images
    if question and not is_file(question, "question"):
        question = annotations.plain(question)
        check_questions(task, [example_of("", question)])
        return WithQuestion(images, question)
    lines = read_references(question, image_root, images, keys, "question", bool(references)) if question else references
    unique = list({task.subject(example): example for group in lines.values() for example in group}.values())
    if not unique:
        raise OtherTaskError(
            "there is no question; set QUESTION (or --question) to 'what color is it?' for all images, or to a file with a "
            "question for each",
            wanted="caption",
        )
    check_questions(task, unique)
    return unique


def with_reference_prompts(
    task: PredictionTask, images: Iterable[Example], references: dict[Path, list[Example]]
) -> Iterable[Example]:
    """Return the images with the prompts of their references. Raise ConfigError if a prompt cannot be used."""
    prompts = prompts_of(references)
    for prompt in dict.fromkeys(prompt for of_image in prompts.values() for prompt in of_image):
        if reason := task.check_prompt(replace(example_of("", ""), prompt=prompt)):
            raise ConfigError(f"references: {reason}")
    return WithPrompts(images, prompts) if prompts else images


def prompts_of(references: dict[Path, list[Example]]) -> dict[Path, list[str]]:
    """Return {image: the prompts of its references, each once}, for the images that have at least one prompt."""
    prompts = {image: list(dict.fromkeys(e.prompt for e in lines)) for image, lines in references.items()}
    return {image: of_image for image, of_image in prompts.items() if any(of_image)}


def trim_references(task: PredictionTask, source: str, references: dict[Path, list[Example]]) -> dict[Path, list[Example]]:
    """Return the references without the prompt at the start of their texts, because predictions do not contain it."""
    examples = [example for lines in references.values() for example in lines]
    trimmed: dict[Path, list[Example]] = {}
    for line in annotations.trimmed(source, [*examples], task.trim):
        if isinstance(line, Example):
            trimmed.setdefault(line.image, []).append(line)
        else:
            print(printable(f"{source}:{line[0]}: left out, {line[1]}"))
    return trimmed


def check_questions(task: PredictionTask, examples: list[Example]) -> None:
    """Raise ConfigError if a question is missing or invalid. Print the share of tokens that the model does not know."""
    task.pretokenize(examples)
    for example in examples:
        if not example.question:
            raise OtherTaskError(
                f'{printable(example.source)}:{example.line}: no question; add "question": "what color is it?" to this line, '
                "or remove the line",
                wanted="caption",
            )
        if reason := cast(Any, task).check_question(example):
            raise ConfigError(f"question {example.question!r}: {reason}")
    if report := task.unknown_report(examples):
        print(report)


def read_references(
    source: str, root: str, images: Iterable[Example], keys: Keys = NO_KEYS, setting: str = "references",
    has_references: bool = False, has_questions: bool = False,
) -> dict[Path, list[Example]]:  # fmt: skip
    """Return {image: its lines in an annotations file}, without images that have no line. Raise DataError if none has a line.

    setting: the setting that gives the file, "references" or "question". has_references, has_questions: whether `keys` names
    the columns of the other file too. The memory grows with the file, not with the number of images.
    """
    if not source:
        return {}
    require_folder("image_root", root)
    with phase(f"reading {source}"):
        if setting == "question":
            examples = read_questions(source, root, keys, has_references)
        else:
            with of_several_files(keys, has_questions):
                examples, _ = annotations.read(source, root, on_bad_data="skip", decode=False, keys=keys, setting=setting)
    image_at: dict[Path, Path] = {}  # resolved path → path in `images`
    compared = 0
    with phase(lambda: f"comparing the paths in {source} with the images: {counted(compared, 'image')}"):
        resolved = {example.image: example.image.resolve() for example in examples}
        in_file = set(resolved.values())
        for image in images:
            compared += 1
            if (path := image.image.resolve()) in in_file:
                image_at[path] = image.image
    references: dict[Path, list[Example]] = {}
    for example in examples:
        if image_path := image_at.get(resolved[example.image]):
            references.setdefault(image_path, []).append(replace(example, image=image_path))
    if not references:
        raise DataError(
            f"{source} has no line for any of {counted(compared, 'image')}{of_setting(images)}. The first path in the file is "
            f"{examples[0].image.resolve()}; {_fix_of_paths(examples, images)}"
        )
    if setting == "references" and (missing := compared - len(references)):
        print(printable(f"{source} has no line for {missing:,} of {counted(compared, 'image')}: they have no score"))
    unused = [example for example in examples if resolved[example.image] not in image_at]
    lost = {image for image in {example.image for example in unused} if not image.exists()}
    if named := _named_image([example for example in unused if example.image in lost], images, below=True):
        example, folder = named
        raise DataError(
            f"{source}:{example.line}: {example.name!r} may be several files; to use that of IMAGES, set IMAGE_ROOT = "
            f"{json.dumps(str(folder))} (--image-root {quoted_for_shell(str(folder))})"
        )
    for reason, lines in (
        ("are not in IMAGES", [example for example in unused if example.image not in lost]),
        ("do not exist", [example for example in unused if example.image in lost]),
    ):
        if lines:
            such = f", such as {lines[0].name!r}"
            print(
                printable(f"{source}: {counted(len(lines), 'line')} of {len(examples)} not used: their images {reason}{such}")
            )
    return references


def _fix_of_paths(examples: list[Example], images: Iterable[Example]) -> str:
    """Return the settings with which the paths of the references and of the images agree."""
    if (first := examples[0].image.resolve()).exists():
        return f"to use the images of the file: --images {quoted_for_shell(relative_if_below(first.parent))}"
    if named := _named_image(examples, images):
        root = str(named[1])
        return f"set IMAGE_ROOT = {json.dumps(root)} (--image-root {quoted_for_shell(root)})"
    return "set IMAGES (--images) to the images of the file, or IMAGE_ROOT (--image-root) to the folder that its paths start in"


def _named_image(examples: list[Example], images: Iterable[Example], below: bool = False) -> tuple[Example, Path] | None:
    """Return an example whose written path is the end of the path of an image, and the folder before this end, or None.

    below: only a folder inside the one that the path of the example is relative to.
    """
    by_parts = {tuple(Path(example.name).parts): example for example in reversed(examples)}
    for image in images if by_parts else ():
        path = image.image.absolute()
        count = next((count for count in range(1, len(path.parts)) if path.parts[-count:] in by_parts), 0)
        if count and (folder := path.parents[count - 1]).is_dir():  # not a shard
            example = by_parts[path.parts[-count:]]
            if not below or folder.is_relative_to(example.image.absolute().parents[count - 1]):
                return example, folder
    return None


def of_setting(images: Iterable[Example]) -> str:
    """Return the value of the setting that gives the images, for a message, or "" if none does."""
    return f" of IMAGES = {quoted(images.setting)}" if isinstance(images, ImageSource) else ""
