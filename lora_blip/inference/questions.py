"""What is asked of which image: questions, texts to rank and known answers, from settings and files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.errors import ConfigError, DataError
from lora_blip.runtime.progress import phase
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import PredictionTask

FILES = (".jsonl", ".json", ".tsv", ".csv", ".txt")


@dataclass(frozen=True)
class Questioned:
    """One question of every image, gone through as often as the images are."""

    images: Iterable[Example]
    question: str

    def __iter__(self) -> Iterator[Example]:
        return (replace(example, question=self.question, prompt="") for example in self.images)


@dataclass(frozen=True)
class Prompted:
    """Each image once for each prompt that its references have, gone through as often as the images are."""

    images: Iterable[Example]
    prompts: dict[Path, list[str]]

    def __iter__(self) -> Iterator[Example]:
        for example in self.images:
            for prompt in self.prompts.get(example.image, [example.prompt]):
                yield replace(example, prompt=prompt)


def read_texts(texts: str) -> list[str]:
    """A file with a text a line, or texts with | between them; each once, in order."""
    if not texts:
        return []
    try:
        lines = Path(texts).read_text(encoding="utf-8-sig").split("\n") if is_file(texts, "texts") else texts.split("|")
    except UnicodeDecodeError as error:
        raise ConfigError(f"texts = {texts!r}: not UTF-8 ({error}); save the file as UTF-8") from None
    found = list(dict.fromkeys(annotations.plain(line) for line in lines if line.strip()))
    if len(found) < 2:
        raise ConfigError(f"texts = {texts!r}: at least two are needed to rank; a file with a text a line, or 'one|another'")
    return found


def asked(
    task: PredictionTask, images: Iterable[Example], question: str, references: dict[Path, list[Example]], texts: list[str]
) -> Iterable[Example]:
    """What is asked of which image: a list where a file says it, else one by one as the images come.

    ConfigError when the task needs a question or texts, and there are none.
    """
    ranked = [replace(example_of("", "?"), text=text, answers=(text,), line=line) for line, text in enumerate(texts, 1)]
    task.pretokenize(ranked)
    for example in ranked:
        if reason := task.check(example):
            raise ConfigError(f"texts: text {example.line}: {reason}")
    if (texts or not task.takes_question) and (report := task.unknown_report(ranked)):
        print(report)
    if not task.writes_text and not texts:
        raise ConfigError("retrieval ranks texts; give them (TEXTS, or --texts): a file, or 'a red cube|a blue cube'")
    if not task.takes_question and question:
        raise ConfigError(f"question = {question!r}: the task is {task.name}, which asks none; set TASK (or --task) to vqa")
    if task.writes_text and not task.takes_question:
        return captioned(task, images, references)
    if not task.takes_question:
        return images
    if question and not is_file(question, "question"):
        question = annotations.plain(question)
        refuse_questions(task, [example_of("", question)])
        return Questioned(images, question)
    lines = read_references(question, "", images) if question else references
    found = list({task.subject(example): example for some in lines.values() for example in some}.values())
    if not found:
        raise ConfigError("there is no question; give one for every image (QUESTION, or --question), or a file of lines")
    refuse_questions(task, found)
    return found


def captioned(task: PredictionTask, images: Iterable[Example], references: dict[Path, list[Example]]) -> Iterable[Example]:
    """The images, with the prompts that the lines of the references have of their own."""
    prompts = prompts_of(references)
    for prompt in dict.fromkeys(prompt for some in prompts.values() for prompt in some):
        if reason := task.check_prompt(replace(example_of("", ""), prompt=prompt)):
            raise ConfigError(f"references: {reason}")
    return Prompted(images, prompts) if prompts else images


def prompts_of(references: dict[Path, list[Example]]) -> dict[Path, list[str]]:
    """The prompts of the lines of each image, for the images of which a line has one."""
    prompts = {image: list(dict.fromkeys(e.prompt for e in some)) for image, some in references.items()}
    return {image: some for image, some in prompts.items() if any(some)}


def trim_references(task: PredictionTask, source: str, references: dict[Path, list[Example]]) -> dict[Path, list[Example]]:
    """The references without a prompt at the start of their texts: predictions do not contain it."""
    every = [example for some in references.values() for example in some]
    found: dict[Path, list[Example]] = {}
    for line in annotations.trimmed(source, list(every), task.trim):
        if isinstance(line, Example):
            found.setdefault(line.image, []).append(line)
        else:
            print(printable(f"{source}:{line[0]}: left out, {line[1]}"))
    return found


def refuse_questions(task: PredictionTask, examples: list[Example]) -> None:
    """ConfigError for a question that cannot be asked. Print the share of unknown tokens in the others."""
    task.pretokenize(examples)
    for example in examples:
        if not example.question:
            raise ConfigError(f"line {example.line} of the questions has no question")
        if reason := cast(Any, task).check_question(example):
            raise ConfigError(f"question {example.question!r}: {reason}")
    if report := task.unknown_report(examples):
        print(report)


def read_references(source: str, root: str, images: Iterable[Example]) -> dict[Path, list[Example]]:
    """Image → its lines in an annotations file, for the images that are looked at. DataError if there is none.

    What is kept grows with the file, not with the images.
    """
    if not source:
        return {}
    with phase(f"reading {source}"):
        examples, problems = annotations.read(source, root, on_bad_data="skip", decode=False)
    if problems:
        print(f"{printable(source)}: left out {len(problems)} line(s):\n{annotations.listing(problems)}")
    wanted: dict[Path, Path] = {}
    looked_at = 0
    with phase(lambda: f"comparing the paths in {source} with the images: {looked_at:,} images"):
        places = {example.image: example.image.resolve() for example in examples}
        known = set(places.values())
        for image in images:
            looked_at += 1
            if (place := image.image.resolve()) in known:
                wanted[place] = image.image
    found: dict[Path, list[Example]] = {}
    for example in examples:
        if path := wanted.get(places[example.image]):
            found.setdefault(path, []).append(replace(example, image=path))
    if not found:
        raise DataError(f"{source} has a line for none of the {looked_at} images; compare the paths")
    return found


def is_file(text: str, setting: str) -> bool:
    """Whether a setting names a file. ConfigError when it looks like one that is not there."""
    try:
        there = Path(text).is_file()
    except (OSError, ValueError):  # a long question is no path, and says so
        return False
    if not there and Path(text).suffix.lower() in FILES:
        raise ConfigError(f"{setting} = {text!r}: there is no such file")
    return there
