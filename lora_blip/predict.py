"""Inference in batches: images → captions, answers or ranked texts, printed, written, and scored where references are given."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from tqdm import tqdm  # comes with transformers

from lora_blip import adapter, lora
from lora_blip.adapter import Adapter
from lora_blip.asked import asked, example_of, read_references, read_texts
from lora_blip.config import ConfigError, EvaluateConfig, InferConfig, refuse_unwritable
from lora_blip.data.annotations import Example
from lora_blip.data.images import find_images
from lora_blip.loop import seed_everything
from lora_blip.models import Backbone, open_backbone
from lora_blip.prediction import Prediction, line_of, printed, report
from lora_blip.run import fresh
from lora_blip.runner import Runner
from lora_blip.tasks import TASKS, natural_task
from lora_blip.tasks.task import Generation, Task

FILE_NAME = "predictions.jsonl"


def infer(config: InferConfig) -> Path:
    """Caption, answer or rank as `config` says; returns the path of predictions.jsonl, a line an image and question.

    Raises ConfigError, ModelError, AdapterError, ImageError or DataError before any image is looked at.
    """
    seed_everything(config.seed)
    images = find_images(config.images)
    references = read_references(config.references, config.image_root, images)
    texts = read_texts(config.texts)
    wanted = wanted_adapter(config.adapter)
    output = output_file(config.output_dir)  # refused now if it exists; made when there is something to write
    task, precision = open_task(config, wanted)
    examples = asked(task, images, config.question, references, texts)
    print(described(task, wanted, len(examples), precision))

    base: dict[Any, Prediction] = {}
    runner = Runner(task, config.batch_size, precision, lambda: open_task(config, wanted, adapted=False, device="cpu")[0])
    if config.compare and wanted:
        base = {task.subject(e): p for e, p in progress(predictions(runner, examples, texts), len(examples), "base")}
    if wanted:
        put_on(task := runner.task, wanted, config.merge)
        runner.reopen = lambda: open_task(config, wanted, adapted=True, device="cpu")[0]
    said: dict[Any, Prediction] = {}
    output.parent.mkdir(parents=True, exist_ok=True)
    # a line is on the disk as soon as it is printed; names that are no Unicode become JSON's escapes
    with output.open("x", encoding="utf-8", errors="backslashreplace", buffering=1) as file:
        for example, prediction in progress(predictions(runner, examples, texts), len(examples), task.name):
            key = task.subject(example)
            said[key] = prediction
            file.write(json.dumps(line_of(prediction, base.get(key)), ensure_ascii=False) + "\n")
            tqdm.write(printed(prediction, base.get(key)))
    report(task, references, ({"base": base} if base else {}) | {"adapted" if wanted else "base": said})
    print(f"wrote {output}")
    return output


# ---------------------------------------------------------------- from your own Python


def captions(task: Task, images: Iterable[str | Path], batch_size: int = 16, precision: str = "fp32") -> Iterator[Prediction]:
    """Captions in the order of `images`, a batch at a time; an image that cannot be read is reported and left out.

    Raises ConfigError for a task that does not caption.
    """
    if task.name != "caption":
        raise ConfigError(f"captions() of a task {task.name!r}; call answers() for questions, rankings() to rank texts")
    yield from (p for _, p in predictions(Runner(task, batch_size, precision), map(example_of, images)))


def answers(
    task: Task, questions: Iterable[tuple[str | Path, str]], batch_size: int = 16, precision: str = "fp32"
) -> Iterator[Prediction]:
    """Answers to (image, question) pairs, in their order. Raises ConfigError for a task that does not answer."""
    if task.name != "vqa":
        raise ConfigError(f"answers() of a task {task.name!r}; call captions(), or rankings() to rank texts")
    examples = (example_of(image, question) for image, question in questions)
    yield from (p for _, p in predictions(Runner(task, batch_size, precision), examples))


def rankings(
    task: Task, images: Iterable[str | Path], texts: list[str], question: str = "", precision: str = "fp32"
) -> Iterator[Prediction]:
    """For each image all the texts by how well they fit, with probabilities that sum to 1."""
    examples = (example_of(image, question) for image in images)
    yield from (p for _, p in predictions(Runner(task, precision=precision), examples, texts))


def mixed(
    tasks: Mapping[str, Task], requests: Iterable[tuple[str | Path, str, str]], batch_size: int = 16, precision: str = "fp32"
) -> Iterator[Prediction]:
    """Answers to requests (image, adapter, question or ""), in their order, rows of different adapters in one batch.

    tasks: the adapters that are on one backbone → the caption or vqa task of each; "" is the base. What is said is
    what each would say apart. Raises ConfigError when the tasks cannot share a batch, or a request names none of them.
    """
    first: Any = next(iter(tasks.values()))
    for name, task in tasks.items():
        if task.backbone is not first.backbone or task.name == "retrieval" or task.generation != first.generation:
            raise ConfigError(f"{name!r} and {next(iter(tasks))!r} need one backbone, texts to say, and one `task.generation`")

    def example(request: tuple[str | Path, str, str]) -> Example:
        image, name, question = request
        if name not in tasks:
            raise ConfigError(f"a request names the adapter {name!r}; there is a task for {', '.join(map(repr, tasks))}")
        return replace(example_of(image, question), group=name)

    def say(task: Any, pictures: Tensor, some: list[Example]) -> list[str]:
        prompts = [cast(Any, tasks[e.group]).prompt_of(e) for e in some]
        return task.language.generate(pictures, prompts, [e.group or None for e in some], **asdict(task.generation))

    for found, text in Runner(first, batch_size, precision).run(map(example, requests), say):
        yield Prediction(found.image, text, found.question)


def predictions(
    runner: Runner, examples: Iterable[Example], texts: list[str] | None = None
) -> Iterator[tuple[Example, Prediction]]:
    """Each example with what the task says of it, or with the texts ranked where there are some."""
    if texts:
        read: Any = None

        def rank(task: Task, pictures: Tensor, some: list[Example]) -> Tensor:
            nonlocal read
            read = task.read(texts) if read is None else read
            return task.rank(pictures, some, read).cpu()

        found = runner.run(examples, rank)
        for example, row in found:
            order = sorted(zip(texts, row.tolist(), strict=True), key=lambda pair: -pair[1])
            yield example, Prediction(example.image, order[0][0], example.question, order)
        return
    for example, text in runner.run(examples, lambda task, pictures, some: task.predict(pictures, some)):
        yield example, Prediction(example.image, text, example.question)


# ---------------------------------------------------------------- set-up


def wanted_adapter(name: str) -> Adapter | None:
    return None if name in ("", "none") else adapter.read(adapter.locate(name))


def open_task(
    config: InferConfig | EvaluateConfig, wanted: Adapter | None, adapted: bool = False, device: str = ""
) -> tuple[Task, str]:
    """The backbone that the settings and the adapter name, with its task; the adapter is merged in if `adapted`."""
    name = config.model or (wanted.base if wanted else "")
    backbone, precision = open_backbone(name, device or config.device, "fp32" if device else config.precision)
    task = task_of(backbone, wanted, config)
    if adapted and wanted:
        put_on(task, wanted, merge=True)
    return task, precision


def put_on(task: Task, wanted: Adapter, merge: bool) -> None:
    """The adapter onto the task's backbone, with what it learned beside the weights."""
    adapter.load(task.backbone, wanted)
    if merge:
        lora.bake(task.backbone.model)
    if wanted.task.get("name") == task.name:
        task.recall(wanted.task)


def task_of(backbone: Backbone, wanted: Adapter | None = None, config: InferConfig | EvaluateConfig | None = None) -> Task:
    """The task that an adapter was trained for, with its prompt and generation, where `config` does not override them."""
    about: dict[str, Any] = wanted.task if wanted else {}
    name = config.task if config and config.task != "auto" else about.get("name") or natural_task(backbone.architecture)
    own = about if about.get("name") == name else {}
    known = {key: value for key, value in own.get("generation", {}).items() if key in Generation.__dataclass_fields__}
    generation = Generation(**known)
    if config:
        chosen: dict[str, Any] = {
            "max_new_tokens": config.max_new_tokens,
            "num_beams": config.num_beams,
            "do_sample": getattr(config, "sample", False),
        }
        generation = replace(generation, **{key: value for key, value in chosen.items() if value})
    prompt = (config.prompt if config else "") or str(own.get("prompt", ""))
    if name not in TASKS:
        raise ConfigError(f"the adapter was trained for {name!r}, which is no task here; tasks are {', '.join(TASKS)}")
    task = TASKS[name](backbone, "" if prompt == "none" else prompt, generation)
    if wanted and lora.adapters(backbone.model):
        task.recall(own)
    return task


def output_file(output_dir: str) -> Path:
    """predictions.jsonl in a folder; what is there already is never written over."""
    if not output_dir:
        return fresh(adapter.RUNS / f"predictions_{datetime.now():%Y%m%d_%H%M%S}") / FILE_NAME
    refuse_unwritable(output_dir)
    path = Path(output_dir) / FILE_NAME
    if path.exists():
        raise ConfigError(f"{path} exists already; give another output_dir, or leave it empty for a new folder")
    return path


def described(task: Task, wanted: Adapter | None, count: int, precision: str) -> str:
    """One line: what is asked, which adapter, of which base, trained how far."""
    what = f"{task.name}: {count} to do"
    if wanted is None:
        return f"{what}, {task.backbone.name} as it is, {precision}"
    training = wanted.about.get("training", {})
    unfinished = "" if training.get("finished", True) else ", stopped before its end"
    steps = training.get("steps", "?")
    return f"{what}, {task.backbone.name} with {wanted.path} ({steps} steps{unfinished}), {precision}"


def progress(found: Iterable[Any], count: int, name: str) -> Iterable[Any]:
    return tqdm(found, total=count, desc=name, unit="image", disable=None, dynamic_ncols=True)
