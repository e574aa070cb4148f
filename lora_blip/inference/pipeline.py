"""Inference in batches: images → captions, answers or ranked texts, printed, written, and scored where references are given."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.data.image_sources import ImageSource, open_example
from lora_blip.errors import ConfigError, ImageError
from lora_blip.inference import finished, output
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.blocks import Found, Rounds, Screen
from lora_blip.inference.output import Output
from lora_blip.inference.prediction import Prediction, prediction_of, report
from lora_blip.inference.questions import Prompted, asked, read_references, read_texts, trim_references
from lora_blip.lora import adapter_file as adapter
from lora_blip.lora import attached, merging
from lora_blip.lora.adapter_file import Adapter
from lora_blip.models import weights
from lora_blip.models.identity import processors_digest, weights_digest
from lora_blip.models.loading import Backbone, open_backbone
from lora_blip.runtime import distributed, runs, signals
from lora_blip.runtime.agreement import require_same
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.seeding import seed_everything
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks import verification
from lora_blip.tasks.base import Generation, Task
from lora_blip.tasks.registry import TASKS, natural_task
from lora_blip.tasks.text_length import CutCount

GLIMPSED = 8  # images that several processes compare before the first prediction


def infer(config: InferConfig) -> Path:
    """Caption, answer or rank as `config` says; returns the path of predictions.jsonl, a line an image and question.

    Images that cannot be read have their line in errors.jsonl. However a run ended, the same settings and output_dir go
    on with it. Nothing is kept of an image but, where `compare` asks for it, what the base said. Raises ConfigError,
    ModelError, AdapterError, ImageError or DataError before any image is looked at; ConfigError on a full disk; and
    stop.Stopped after Ctrl-C or a scheduler's signal, when the batch under way is written.
    """
    with distributed.joined() as ranks, ExitStack() as closing:
        return infer_among(ranks, config, closing)


def infer_among(ranks: Ranks, config: InferConfig, closing: ExitStack) -> Path:
    """The run, as one of torchrun's processes or alone. The main one reads the source and writes."""
    seed_everything(config.seed)
    inputs = ranks.together(lambda: read_inputs(config))
    wanted, texts = inputs.adapter, inputs.texts
    # refused now if it is taken; made when there is something to write
    folder: Path = ranks.broadcast(ranks.on_main(lambda: output.folder_of(config, ranks.count)))
    config = replace(config, device=ranks.device(config.device))
    task, precision, examples, what = ranks.together(lambda: open_inputs(config, inputs))
    if ranks.count > 1:
        require_same_inputs(ranks, config, task, what, examples)

    stop_request = closing.enter_context(signals.catch_signals())
    out: Any = ranks.on_main(lambda: closing.enter_context(output.opened(folder, what, config.resume)))
    count = ranks.on_main(lambda: sum(1 for _ in takewhile(lambda _: not stop_request.signal, examples))) or 0
    left = count - (out.before if out else 0)
    if others := inputs.images.others_line():
        print(others)
    greeting = printable(f"{folder}: {out.greeting() if out else ''}")
    print(described(task, wanted, left, precision), greeting, sep="\n", flush=True)
    runner = Runner(task, config.batch_size, precision, lambda: open_task(config, wanted, adapted=False, device="cpu")[0])
    rounds = Rounds(ranks, runner, config.seed, stop_request, out)
    base: dict[int, str] = {}
    cut = {"base": CutCount(), "texts": CutCount()}
    if config.compare and wanted:
        with Screen("base", count, out) as screen:
            rounds.run(examples, Saying(texts), partial(keep, base, screen, cut["base"]))
    if wanted:
        task = runner.task
        ranks.together(lambda: put_on(task, wanted, config.merge, runner.precision))
        runner.reopen = lambda: open_task(config, wanted, adapted=True, device="cpu")[0]
        runner.checked = not runner.fast
    with Screen(task.name, count, out) as screen:
        rounds.run(examples, Saying(texts), partial(write, out, base, screen, cut["texts"]))
    if ranks.main:
        print(screen.pace(), end="")
        for name, said_by in (("texts of the base", cut["base"]), ("texts", cut["texts"])):
            if line := said_by.report(task, name):
                print(f"warning: {line}")
        out.finish()
        if references := inputs.references:
            said = finished.texts_of(out.path, task.subject, references, "adapted" if wanted else "base")
            attempt("scores", lambda: report(task, references, said))
        print(printable(out.farewell()))
    return folder / output.FILE_NAME


def keep(base: dict[int, str], screen: Screen, cut: CutCount, found: Found) -> None:
    """What the base says, to stand beside what it says with the adapter."""
    cut.add([said.text for _, said in found if isinstance(said, Prediction)])
    base |= {finished.key_of(example): said.text for example, said in found if isinstance(said, Prediction)}
    screen.move(found)


def write(out: Output, base: dict[int, str], screen: Screen, cut: CutCount, found: Found) -> None:
    cut.add([said.text for _, said in found if isinstance(said, Prediction)])
    out.write(found, base)
    screen.show(found, base)


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
    if not task.takes_question:
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
        if task.backbone is not first.backbone or not task.writes_text or task.generation != first.generation:
            raise ConfigError(f"{name!r} and {next(iter(tasks))!r} need one backbone, texts to say, and one `task.generation`")

    def example(request: tuple[str | Path, str, str]) -> Example:
        image, name, question = request
        if name not in tasks:
            raise ConfigError(f"a request names the adapter {name!r}; there is a task for {', '.join(map(repr, tasks))}")
        return replace(example_of(image, question), group=name)

    def say(task: Any, pictures: Tensor, some: list[Example]) -> list[str]:
        prompts = [cast(Any, tasks[e.group]).prompt_of(e) for e in some]
        texts: list[str] = task.language.generate(pictures, prompts, [e.group or None for e in some], **asdict(task.generation))
        return texts

    for found, text in Runner(first, batch_size, precision).run(map(example, requests), say):
        yield Prediction(found.image, text, found.question)


def predictions(
    runner: Runner, examples: Iterable[Example], texts: list[str] | None = None
) -> Iterator[tuple[Example, Prediction]]:
    """Each example with what the task says of it, or with the texts ranked where there are some."""
    return runner.run(examples, Saying(texts or []))


class Saying:
    """What a batch is asked: a text each, or, where there are texts, those ranked; they are read once."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.read: Any = None
        self.device: Any = None  # where they were read

    def again(self) -> "Saying":
        """The same request from the start, of a few texts: to compare two ways to compute it."""
        return Saying(self.texts[: verification.TEXTS])

    def __call__(self, task: Task, pictures: Tensor, examples: list[Example]) -> list[Prediction]:
        """pictures: (images, 3, H, W)"""
        if not self.texts:
            texts = task.predict(pictures, examples)
            return [prediction_of(e, text) for e, text in zip(examples, texts, strict=True)]
        if self.device != task.backbone.device:
            self.read, self.device = task.encode_texts(self.texts), task.backbone.device
        rankings = [self._order(row) for row in task.rank(pictures, examples, self.read).cpu().tolist()]
        return [prediction_of(e, order[0][0], order) for e, order in zip(examples, rankings, strict=True)]

    def _order(self, row: list[float]) -> list[tuple[str, float]]:
        return sorted(zip(self.texts, row, strict=True), key=lambda pair: -pair[1])


# ---------------------------------------------------------------- set-up


@dataclass
class Inputs:
    """What the settings name, read but not yet compared with a model."""

    images: ImageSource
    references: dict[Path, list[Example]]
    texts: list[str]
    adapter: Adapter | None


def read_inputs(config: InferConfig) -> Inputs:
    images = ImageSource(config.images)
    references = read_references(config.references, config.image_root, images)
    return Inputs(images, references, read_texts(config.texts), wanted_adapter(config.adapter))


def open_inputs(config: InferConfig, inputs: Inputs) -> tuple[Task, str, Any, dict[str, Any]]:
    """Return the task, the precision, the examples to predict, and the identity of the run."""
    task, precision = open_task(config, inputs.adapter)
    inputs.references = trim_references(task, config.references, inputs.references)
    examples = asked(task, inputs.images, config.question, inputs.references, inputs.texts)
    what = output.identity(config, task, inputs.adapter, precision, by_references=isinstance(examples, Prompted))
    return task, precision, examples, what


def require_same_inputs(ranks: Ranks, config: InferConfig, task: Task, what: dict[str, Any], examples: Any) -> None:
    """Raise an error on every rank if one would predict something else than rank 0.

    Settings, adapter and base are compared, and the pictures of the first images. The name of the base is not: machines
    may keep it in different places.
    """
    base = {"base weights": weights_digest(task.backbone.model), "base processors": processors_digest(task.backbone)}
    ways = {name: getattr(config, name) for name in ("merge", "fast", "batch_size")}
    require_same(ranks, {key: value for key, value in what.items() if key != "model"} | ways | base, "predict")
    some = ranks.broadcast(ranks.on_main(lambda: list(islice(examples, GLIMPSED))))
    every = ranks.all_gather([picture_digest(example) for example in some])
    for rank, digests in enumerate(every):
        for example, theirs, ours in zip(some, digests, every[0], strict=True):
            if theirs != ours:
                raise ranks.error(
                    f"process {rank} finds another picture in {example.image} than process 0; give all processes the same files"
                )


def picture_digest(example: Example) -> str:
    """SHA-256 of the decoded picture; of one that cannot be read, the kind of error."""
    try:
        picture = open_example(example)
    except ImageError as error:
        return type(error).__name__
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def wanted_adapter(name: str) -> Adapter | None:
    return None if name in ("", "none") else adapter.read(runs.locate(name))


def open_task(
    config: InferConfig | EvaluateConfig, wanted: Adapter | None, adapted: bool = False, device: str = ""
) -> tuple[Task, str]:
    """The backbone that the settings and the adapter name, with its task; the adapter is merged in if `adapted`."""
    name = config.model or (wanted.base if wanted else "")
    wanted_precision = "fp32" if device else config.precision
    size = config.image_size or (wanted.image_size if wanted else 0)
    backbone, precision = open_backbone(name, device or config.device, wanted_precision, fast=config.fast, image_size=size)
    task = task_of(backbone, wanted, config)
    if adapted and wanted:
        put_on(task, wanted, merge=True)
    return task, precision


def put_on(task: Task, wanted: Adapter, merge: bool, precision: str = "fp32") -> None:
    """The adapter onto the task's backbone, with what it learned beside the weights, which are then cast once."""
    adapter.load(task.backbone, wanted)
    if merge:
        merging.bake(task.backbone.model)
    weights.cast_once(task.backbone, precision)
    if wanted.task.get("name") == task.name:
        task.load_metadata(wanted.task)


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
    if wanted and attached.adapters(backbone.model):
        task.load_metadata(own)
    return task


def described(task: Task, wanted: Adapter | None, count: int, precision: str) -> str:
    """One line: what is asked, which adapter, of which base, trained how far."""
    what = f"{task.name}: {count} to do"
    if wanted is None:
        return printable(f"{what}, {task.backbone.name} as it is, {precision}")
    training = wanted.metadata.get("training", {})
    unfinished = "" if training.get("finished", True) else ", stopped before its end"
    steps = training.get("steps", "?")
    return printable(f"{what}, {task.backbone.name} with {wanted.path} ({steps} steps{unfinished}), {precision}")
