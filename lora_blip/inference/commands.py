"""The short commands `lora-blip caption`, `ask` and `rank`. They print the results of a few images on stdout.

`lora-blip infer` has more settings, and writes the predictions of any number of images into a folder.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from lora_blip.config import InferConfig
from lora_blip.errors import AdapterError, ConfigError, ImageError
from lora_blip.models.local_base import locate_base
from lora_blip.runtime import runs
from lora_blip.runtime.files import refuse_unwritable
from lora_blip.runtime.setting_checks import check_scale
from lora_blip.runtime.settings import argument, setting
from lora_blip.runtime.system_errors import command_line, quoted_for_shell, reading
from lora_blip.runtime.untrusted import printable
from lora_blip.runtime.user_paths import BASE_OF, local_path, looks_like_image, suggestion

if TYPE_CHECKING:
    from lora_blip.inference.captioner import Captioner
    from lora_blip.inference.prediction import Prediction
    from lora_blip.lora.adapter_file import Adapter
    from lora_blip.models.loading import Backbone

ARGUMENTS = {  # task of an adapter → the command for it, and its arguments after the image
    "caption": ("caption", ""),
    "vqa": ("ask", ' "what color is it?"'),
    "retrieval": ("rank", ' "a red cube" "a blue cube"'),
}


def command_of(task: str, image: str = "photo.jpg", flags: Sequence[str] = ()) -> str:
    """Return the command for an adapter of a task, as a line to paste."""
    name, arguments = ARGUMENTS[task]
    return " ".join([f"lora-blip {name} {command_line([image])}{arguments}", *([command_line([*flags])] if flags else [])])


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The settings that all short commands have."""

    task: ClassVar[str] = "caption"

    adapter: str = setting("latest", 'an adapter file or a run folder; "latest": the newest that fits; "none": the base alone')
    model: str = setting("", "hub name or folder of the base; empty: the base that the adapter was trained on")
    scale: float = setting(1.0, "factor of the change that the adapter makes; 1: as trained; 0: the base")
    device: str = setting("auto", '"auto", "cpu", "cuda", "cuda:1", "mps"')
    json: bool = setting(False, "print the results as JSONL: lines with image, text and score, or with image and error")
    of_infer: ClassVar[frozenset[str]] = frozenset(f.name for f in fields(InferConfig)) - {"explain"}  # for the error of a flag

    def __post_init__(self) -> None:
        if self.given_adapter is None and not self.model:
            raise ConfigError(f'adapter is "none", and model is empty; give a base: --model {BASE_OF[self.task]}')
        check_scale(self.scale, self.adapter)

    @property
    def given_adapter(self) -> str | None:
        """Return the setting `adapter`, or None for the base alone."""
        return None if self.adapter in ("", "none") else self.adapter

    @property
    def model_flags(self) -> list[str]:
        """Return the flags of the settings that choose the adapter, the base and the device, if they are not the defaults."""
        values = {
            "--adapter": (self.adapter, "latest"), "--model": (self.model, ""), "--scale": (f"{self.scale:g}", "1"),
            "--device": (self.device, "auto"),
        }  # fmt: skip
        return [word for flag, (value, default) in values.items() if value != default for word in (flag, value)]


@dataclass(frozen=True, kw_only=True)
class TextConfig(ModelConfig):
    """The settings of the commands that generate a text."""

    explain: bool = setting(False, "also write explain.html: each word with its probability and attention; at most 20 images")


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(TextConfig):
    """All settings of `caption`."""

    images: list[str] = argument("an image, a folder of images, or a glob", "IMAGE", several=True)


@dataclass(frozen=True, kw_only=True)
class AskConfig(TextConfig):
    """All settings of `ask`."""

    task: ClassVar[str] = "vqa"

    image: str = argument("an image", "IMAGE")
    question: str = argument('a question in quotes, "what color is it?"', "QUESTION")


@dataclass(frozen=True, kw_only=True)
class RankConfig(ModelConfig):
    """All settings of `rank`."""

    task: ClassVar[str] = "retrieval"

    image: str = argument("an image", "IMAGE")
    texts: list[str] = argument('texts in quotes, "a red cube" "a blue cube"', "TEXT", several=True)
    question: str = setting("", "the question that the texts answer, for an adapter that answers questions")


def check_paths(config: Any) -> None:
    """Raise LoraBlipError if there is no adapter, base or image at the given paths. Do not import torch.

    A missing image is not an error here if another image exists, or with --json. The command then prints an error for it, and
    the results of the other images.
    """
    try:
        if config.given_adapter is not None:
            runs.locate(config.given_adapter)
    except AdapterError as error:
        raise AdapterError(
            f"{error}; or use a base without an adapter: --adapter none --model {BASE_OF[config.task]}"
        ) from None
    if config.model:
        locate_base(config.model)
    if isinstance(config, TextConfig) and config.explain:
        refuse_unwritable(str(runs.RUNS), "--explain writes a page into it: start the command in a folder that can be written")
    images = config.images if isinstance(config, CaptionConfig) else [config.image]
    refuse_swapped(config)
    if not any(map(os.path.lexists, expand(images))) and not config.json:
        near = suggestion(images[0])
        raise ImageError(
            f"{images[0]} does not exist; {near}give an image, a folder of images or a glob such as 'photos/*.jpg'"
        )


def refuse_swapped(config: Any) -> None:
    """Raise ConfigError, with the right command, for an empty text, an image after the texts, or several images."""
    words = [config.question] if isinstance(config, AskConfig) else config.texts if isinstance(config, RankConfig) else []
    if not all(word.strip() for word in words):
        raise ConfigError(f"a text is empty; for example: {command_of(config.task, config.image)}")
    if words and os.path.isdir(config.image):  # noqa: PTH112
        raise ConfigError(f"{config.image!r} is a folder, and {_takes_one(config, config.image)}")
    image = next((word for word in words if looks_like_image(word)), "")
    if image and not looks_like_image(config.image):
        texts = [config.image, *(word for word in words if word != image)]
        right = command_line(["lora-blip", ARGUMENTS[config.task][0], image, *texts, *config.model_flags])
        raise ConfigError(f"{config.image!r} is not an image; the image comes first: {right}")
    if image and Path(image).is_file():  # from a glob of the shell
        raise ConfigError(f"{image!r} is an image, and {_takes_one(config, str(Path(image).parent))}")


def _takes_one(config: Any, folder: str) -> str:
    """Return the end of a message: the command takes one image, and the command for a folder."""
    option = "--question" if isinstance(config, AskConfig) else "--texts"
    several = f"lora-blip infer --images {quoted_for_shell(folder)} {option} TEXT"
    return f"{ARGUMENTS[config.task][0]} takes one image; for several images: {several}"


def caption(config: CaptionConfig) -> bool:
    """Print a caption of each image. Return False if an image cannot be read."""
    images = list(expand(config.images))
    with stdout_for_results() as results:
        if config.explain:
            from lora_blip.inference.explained_commands import predict_and_explain

            predictions = predict_and_explain(config, images)
        else:
            predictions = open_captioner(config, images[0], "caption").stream(images)
        printed = [show(prediction, config.json, results) for prediction in predictions]
    return all(printed)


def ask(config: AskConfig) -> bool:
    """Print the answer to a question about an image. Return False if the image cannot be read."""
    with stdout_for_results() as results:
        if config.explain:
            from lora_blip.inference.explained_commands import predict_and_explain

            (answer,) = predict_and_explain(config, [config.image], config.question)
        else:
            answer = open_captioner(config, config.image, "vqa").answer(config.image, config.question)
        return show(answer, config.json, results)


def rank(config: RankConfig) -> bool:
    """Print the texts with their probabilities, the most probable first. Return False if the image cannot be read."""
    with stdout_for_results() as results:
        captioner = open_captioner(config, config.image)
        if captioner.task == "vqa" and not config.question:
            words = command_line(["lora-blip", "rank", config.image, *config.texts, *config.model_flags])
            raise ConfigError(f'the texts are answers; give their question: {words} --question "what color is it?"')
        return show(captioner.rank(config.image, config.texts, question=config.question), config.json, results)


@contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """Yield stdout, and redirect all other output to stderr. `lora-blip caption … > captions.txt` then writes only captions."""
    results = sys.stdout
    with redirect_stdout(sys.stderr):
        yield results


def expand(images: list[str]) -> Iterator[str]:
    """Yield the paths of the images: each file, the images of each folder, and the matches of each glob.

    A glob is expanded here because the shell of Windows does not expand it. Raise ConfigError if a folder or a glob contains
    no image.
    """
    from lora_blip.data.image_folders import globbed, walk

    for name in map(local_path, images):
        files = [name]
        if Path(name).is_dir():
            with reading(name):
                os.scandir(name).close()  # an error now; `walk` yields a folder that it cannot list, as if it were an image
            files = [str(example.image) for example in walk(name, Counter())]
        elif set("*?[") & set(name) and not Path(name).exists():
            files = globbed(name)
        if not files:
            raise ConfigError(f"{name!r} contains no image; give an image, a folder of images or a glob such as 'photos/*.jpg'")
        yield from files


def open_captioner(config: ModelConfig, image: str, task: str = "") -> "Captioner":
    """Open the adapter or the base, and print its path on stderr.

    task: that of the command; raise ConfigError if the model has another one. Empty: any task.
    """
    from lora_blip.inference.adapter_choice import read_adapter
    from lora_blip.inference.captioner import Captioner

    adapter = None if config.given_adapter is None else read_adapter(config.given_adapter, task or "auto")
    setting = task_setting(adapter, task)
    captioner = Captioner.from_adapter(adapter, scale=config.scale, base=config.model, device=config.device, task=setting)
    announce(captioner.adapter, captioner.backbone)
    if task:
        require_task(captioner.task, config, image, captioner.adapter)
    return captioner


def task_setting(adapter: "Adapter | None", task: str) -> str:
    """Return the setting `task` for a command with this task: "auto" is the task of the adapter, or of the base.

    Without an adapter, "auto" would caption with a BLIP-2. An adapter of peft may name no task.
    """
    if adapter is None:
        return "vqa" if task == "vqa" else "auto"
    return task if task and adapter.note and "name" not in adapter.task else "auto"


def announce(adapter: "Adapter | None", backbone: "Backbone") -> None:
    """Print the path of the adapter, the base, the device, and what is unknown about the adapter, on stderr."""
    from lora_blip.inference.setup import work_of

    path = f"{adapter.path} ({work_of(adapter)})" if adapter else "no adapter"
    print(printable(f"{path}, base {backbone.name}, {backbone.device}"), file=sys.stderr, flush=True)
    if adapter and adapter.note:
        print(printable(f"note: {adapter.note}"), file=sys.stderr, flush=True)


def require_task(task: str, config: ModelConfig, image: str, adapter: "Adapter | None") -> None:
    """Raise ConfigError if the task of the model is not that of the command. The message contains the right command."""
    if task != config.task:
        from lora_blip.inference.other_runs import advice

        raise ConfigError(
            f"the task of this model is {task}; for another model: --adapter none --model {BASE_OF[config.task]}; for this "
            f"model: {command_of(task, image, config.model_flags)}{advice(config.task, config.adapter, adapter)}"
        )


def show(prediction: "Prediction", as_json: bool, results: TextIO) -> bool:
    """Print the text or ranking of a prediction, or its error. Return False if it has an error."""
    if as_json:
        line = json.dumps(prediction.to_dict())  # only ASCII, so that no character controls the terminal
        print(line, file=results, flush=True)
    elif prediction.error:
        name = "" if str(prediction.image) in prediction.error else f"{prediction.image}: "
        print(printable(f"error: {name}{prediction.error}"), file=sys.stderr, flush=True)
    else:
        several = prediction.ranking or prediction.alternatives
        print(printable(f"{prediction.image}: {'' if several else prediction.text}".rstrip()), file=results, flush=True)
        for text, probability in several:
            print(printable(f"{probability:8.1%}  {text}"), file=results, flush=True)
    return not prediction.error
