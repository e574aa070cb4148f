"""Prepare an inference run: read what the settings name, and open the model with its adapter and task."""

import hashlib
import re
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.example import Example
from lora_blip.data.image_sources import ImageSource, open_example
from lora_blip.errors import AdapterError, ConfigError, ImageError
from lora_blip.inference import output
from lora_blip.inference.questions import Prompted, asked, read_references, read_texts, trim_references
from lora_blip.lora import adapter_file, attached, merging
from lora_blip.lora.adapter_file import Adapter
from lora_blip.metrics.names import validation_score
from lora_blip.models import weights
from lora_blip.models.identity import processors_digest, weights_digest
from lora_blip.models.loading import Backbone, open_backbone
from lora_blip.runtime import runs
from lora_blip.runtime.agreement import require_same
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.progress import phase
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import Generation, PredictionTask
from lora_blip.tasks.registry import TASKS, natural_task

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
GLIMPSED = 8  # images that several processes compare before the first prediction


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
    return Inputs(images, references, read_texts(config.texts), wanted_adapter(config.adapter, config.runs))


def open_inputs(config: InferConfig, inputs: Inputs) -> tuple[PredictionTask, str, Any, dict[str, Any]]:
    """Return the task, the precision, the examples to predict, and the identity of the run."""
    task, precision = open_task(config, inputs.adapter)
    inputs.references = trim_references(task, config.references, inputs.references)
    examples = asked(task, inputs.images, config.question, inputs.references, inputs.texts)
    what = output.identity(config, task, inputs.adapter, precision, by_references=isinstance(examples, Prompted))
    return task, precision, examples, what


def require_same_inputs(ranks: Ranks, config: InferConfig, task: PredictionTask, what: dict[str, Any], examples: Any) -> None:
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


def wanted_adapter(name: str, folder: str | Path = runs.RUNS) -> Adapter | None:
    """Read the adapter that a setting names, or return None if it is "none". `folder` contains the runs for "latest"."""
    return None if name in ("", "none") else adapter_file.read(runs.locate(name, folder))


def read_adapter(adapter: str | Path) -> Adapter:
    """Read the adapter that a path or "latest" names. Raise AdapterError, with the right call if it looks like a base."""
    try:
        return adapter_file.read(runs.locate(adapter))
    except AdapterError as error:
        looks_like_base = (Path(adapter) / "config.json").is_file() or HUB_NAME.fullmatch(str(adapter))
        if not looks_like_base or Path(adapter).is_file():
            raise
        raise AdapterError(f"{error}. If it is a base: Captioner.from_adapter(None, base={str(adapter)!r})") from None


def open_task(
    config: InferConfig | EvaluateConfig, wanted: Adapter | None, adapted: bool = False, device: str = ""
) -> tuple[PredictionTask, str]:
    """The backbone that the settings and the adapter name, with its task; the adapter is merged in if `adapted`."""
    name = config.model or (wanted.base if wanted else "")
    wanted_precision = "fp32" if device else config.precision
    size = config.image_size or (wanted.image_size if wanted else 0)
    with phase(f"loading {name}"):
        backbone, precision = open_backbone(name, device or config.device, wanted_precision, fast=config.fast, image_size=size)
    task = task_of(backbone, wanted, config)
    if adapted and wanted:
        put_on(task, wanted, merge=True)
    return task, precision


def put_on(task: PredictionTask, wanted: Adapter, merge: bool, precision: str = "fp32") -> None:
    """The adapter onto the task's backbone, with what it learned beside the weights, which are then cast once."""
    with phase(f"loading {wanted.path}" + ", and merging it" * merge):
        adapter_file.load(task.backbone, wanted)
        if merge:
            merging.bake(task.backbone.model)
    weights.cast_once(task.backbone, precision)
    if wanted.task.get("name") == task.name:
        task.load_metadata(wanted.task)


def task_of(
    backbone: Backbone, wanted: Adapter | None = None, config: InferConfig | EvaluateConfig | None = None
) -> PredictionTask:
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


def described(task: PredictionTask, adapter: Adapter | None, count: int, precision: str) -> str:
    """Return two lines: the adapter with its task, steps and validation score; and what is predicted with which base."""
    work = f"{task.name}: {count:,} to do with {task.backbone.name}, {precision}"
    if adapter is None:
        return printable(f"{work}, without an adapter")
    training = adapter.metadata.get("training", {})
    facts = [str(adapter.task.get("name", "unknown task")), f"{training.get('steps', '?')} steps"]
    facts += ["stopped before its end"] * (not training.get("finished", True))
    facts += ["the best weights by validation"] * (adapter.path.name == runs.BEST_NAME)
    score = validation_score(training)
    facts += [f"{score} on the validation images" if score else "not validated"]
    return "\n".join(map(printable, (f"adapter {adapter.path}: {', '.join(facts)}", work)))
