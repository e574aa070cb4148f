"""Check the texts that Python callers pass to a `Captioner`: questions, texts to rank, and arguments in the wrong order."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from lora_blip.data.annotations import plain
from lora_blip.data.image_folders import example_of
from lora_blip.errors import InputError
from lora_blip.inference.image_inputs import SINGLE, is_file
from lora_blip.lora.attached import Loaded
from lora_blip.runtime.untrusted import quoted
from lora_blip.runtime.user_paths import looks_like_image
from lora_blip.tasks.base import PredictionTask

VERBS = {"caption": "captions images", "vqa": "answers questions", "retrieval": "ranks texts"}
CALLS = {
    "caption": "captioner(image)",
    "vqa": 'captioner.answer(image, "what color is it?")',
    "retrieval": 'captioner.rank(image, ["a red cube", "a blue cube"])',
}
RANK_ANSWERS = 'captioner.rank(image, ["red", "blue"], question="what color is it?")'
BYTES = bytes | bytearray | memoryview  # Python iterates over their numbers
OTHERS = {  # how to get what the adapter does not do
    "caption": '. For captions, open an adapter of the task caption, or base="Salesforce/blip-image-captioning-base"',
    "vqa": '. For answers, open an adapter of the task vqa, or base="Salesforce/blip-vqa-base"',
}


def refuse_base(adapter: Any, base: Any, processor: Any) -> None:
    """Raise InputError if a loaded base is given as the adapter, if there is no base, or a processor that is not needed."""
    if isinstance(adapter, Loaded | nn.Module):
        raise InputError(
            f"the adapter is of type {type(adapter).__name__}, which is a base; "
            'call lora_blip.Captioner.from_adapter("latest", base=backbone), '
            "or lora_blip.Captioner.from_adapter(None, base=backbone)"
        )
    if not isinstance(base, Loaded | nn.Module) and isinstance(getattr(base, "model", None), nn.Module):
        raise InputError(f"base is of type {type(base).__name__}; give its model: base=pipe.model")
    if processor is not None and not isinstance(base, nn.Module):
        raise InputError(
            "a processor is given, but the base has its own; leave processor out, or give a model of transformers: "
            "lora_blip.Captioner.from_adapter(…, base=model, processor=processor)"
        )
    if adapter is None and base in (None, ""):
        raise InputError('base is empty; give one, such as base="Salesforce/blip-image-captioning-base", or an adapter')


def refuse_more(task: str, kind: str, images: Any, others: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Raise InputError if `captioner(image, …)` gets more than images: a question, texts, or several images without a list.

    options: the arguments with a name that it does not have, such as question="what?".
    """
    others += tuple(value for name, value in options.items() if name in ("question", "texts"))
    if options and not others:
        raise InputError(
            f"captioner(image) has no argument {next(iter(options))!r}; its only one is strict, and options such as "
            "max_new_tokens are arguments of Captioner.from_adapter"
        )
    if not others:
        return
    refuse_swapped(images, others[0], CALLS[task])
    if all(isinstance(each, SINGLE) and (not isinstance(each, str) or looks_like_image(each)) for each in others):
        raise InputError("several images need a list: captioner([image, other_image])")
    if task == "caption":
        raise InputError(f"this {kind} makes captions and reads no text: call captioner(image){OTHERS['vqa']}")
    raise InputError(f"captioner(image) has one argument; call {CALLS[task]}")


def refuse_more_texts(texts: Any, others: tuple[Any, ...]) -> None:
    """Raise InputError if `captioner.rank(image, …)` gets texts without a list, or a question that is not a keyword."""
    if not others:
        return
    if all(isinstance(each, str) for each in (texts, *others)):
        raise InputError(f"several texts need a list: {CALLS['retrieval']}")
    raise InputError(f"a question has its name in the call: {RANK_ANSWERS}")


def refuse_swapped(images: Any, texts: Any, call: str) -> None:
    """Raise InputError if the images and the texts of a call are swapped.

    They are if a text is an image in memory or the path of one, and no image is one. call: the right call, for the message.
    """
    first_image, first_text = (next(iter(each), "") if isinstance(each, list | tuple) else each for each in (images, texts))
    is_text = isinstance(first_image, str) and not looks_like_image(first_image)
    is_image = (
        looks_like_image(first_text) if isinstance(first_text, str) else isinstance(first_text, SINGLE) or is_file(first_text)
    )
    if is_text and is_image:
        shown = quoted(str(first_text)) if isinstance(first_text, str | Path) else f"of type {type(first_text).__name__}"
        raise InputError(f"the arguments are swapped: {quoted(first_image)} is a text, and the image is {shown}; call {call}")


def checked_questions(question: Any) -> tuple[list[str], bool]:
    """Return the questions with one space between words, and True if `question` is one text and not a list.

    Raise InputError for anything else.
    """
    if not isinstance(question, str | Iterable) or isinstance(question, Mapping | Set | BYTES):
        raise InputError(f"the question is of type {type(question).__name__}; expected a text, as in {CALLS['vqa']}")
    questions = [question] if isinstance(question, str) else list(question)
    for position, each in enumerate(questions):
        if not isinstance(each, str) or not each.strip():
            name = "the question" if isinstance(question, str) else f"questions[{position}]"
            raise InputError(f"{name} is {quoted(each)}; expected a text, as in {CALLS['vqa']}")
    return [*map(plain, questions)], isinstance(question, str)


def checked_texts(task: PredictionTask, kind: str, texts: Any, question: str, report: Callable[[str], object]) -> list[str]:
    """Return each text once. Report unknown tokens. Raise InputError if a text cannot be ranked.

    kind: "adapter" or "model", for messages. The tokenizer of the task is used, and it is not thread-safe.
    """
    call = CALLS["retrieval"]
    if isinstance(texts, str | Mapping | BYTES) or not isinstance(texts, Iterable):
        raise InputError(f"texts is {quoted(texts)}; give a list, as in {call}")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"texts[{position}] is {quoted(text)}: expected a text")
    checked: list[str] = list(dict.fromkeys(texts))
    if not checked:
        raise InputError(f"texts is empty; give at least one, as in {call}")
    if task.takes_question and not question:
        raise InputError(f"this {kind} answers questions, so it ranks answers; give their question: {RANK_ANSWERS}")
    if question and not task.takes_question:
        raise InputError(f"this {kind} {VERBS[task.name]} and uses no question; call {call}")
    if question and (reason := cast(Any, task).check_question(example_of("", question))):
        raise InputError(f"the question cannot be used: {reason}")
    for text in checked:
        if reason := task.check(replace(example_of("", question), text=text, answers=(text,))):
            raise InputError(f"texts[{texts.index(text)}] is {quoted(text)}: {reason}")
        if warning := task.checker.warning(text):
            report(warning)
    return checked


def checked_question(question: Any) -> str:
    """Return a question with one space between words, or "". Raise InputError if it is not a text."""
    if not isinstance(question, str):
        raise InputError(f"the question is of type {type(question).__name__}; expected a text: {RANK_ANSWERS}")
    return plain(question)
