"""Prepare an inference run: read the input files, load the model and its adapter, and create the task."""

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.column_check import two_files
from lora_blip.data.example import Example
from lora_blip.data.formats import keys_of
from lora_blip.data.image_sources import ImageSource, open_example
from lora_blip.errors import AdapterError, ConfigError, ImageError
from lora_blip.inference import output
from lora_blip.inference.adapter_choice import chosen_adapter
from lora_blip.inference.other_runs import advice, base_named_by, other_task_warning
from lora_blip.inference.questions import (
    OtherTaskError,
    WithPrompts,
    examples_to_predict,
    read_references,
    read_texts,
    trim_references,
)
from lora_blip.lora import adapter_file, attached, merging
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.fit import check_fit
from lora_blip.lora.mergeable import OtherUpdateError
from lora_blip.lora.peft_config import TASK_OF
from lora_blip.lora.sites import quantization
from lora_blip.metrics.names import validation_score
from lora_blip.models import weights
from lora_blip.models.generation import OPTIONS, check_generation, generation_fault, ignored_lines, unused_lines
from lora_blip.models.identity import processors_digest, weights_digest
from lora_blip.models.loading import Backbone, open_backbone
from lora_blip.runtime import runs
from lora_blip.runtime.agreement import require_same
from lora_blip.runtime.counts import counted, lr_ratio_of, steps_of
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.progress import phase
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import Generation, PredictionTask
from lora_blip.tasks.registry import TASKS, default_task

COMPARED_IMAGES = 8  # the processes compare the pixels of the first images before the first prediction


@dataclass
class Inputs:
    """The content of the input files. It is read before the model is loaded, so the model has not checked it yet."""

    images: ImageSource
    references: dict[Path, list[Example]]
    texts: list[str]
    adapter: Adapter | None


def read_inputs(config: InferConfig) -> Inputs:
    """Read the image paths, the references, the texts and the adapter. Raise LoraBlipError if one cannot be read."""
    images = ImageSource(config.images, config.image_root)
    has_questions = two_files(config)
    references = read_references(config.references, config.image_root, images, keys_of(config), has_questions=has_questions)
    return Inputs(
        images,
        references,
        read_texts(config.texts),
        chosen_adapter(config.adapter, config.scale, config.task, config.runs),
    )


def open_inputs(config: InferConfig, inputs: Inputs) -> tuple[PredictionTask, str, Any, dict[str, Any]]:
    """Load the model, and return the task, the precision, the examples to predict and the identity of the run."""
    task, precision = open_task(config, inputs.adapter)
    inputs.references = trim_references(task, config.references, inputs.references)
    try:
        examples = examples_to_predict(
            task, inputs.images, config.question, inputs.references, inputs.texts, keys_of(config), config.image_root
        )
    except OtherTaskError as error:
        raise ConfigError(f"{error}{advice(error.wanted, config.adapter, inputs.adapter, config.runs)}") from None
    run_identity = output.identity(config, task, inputs.adapter, precision, by_references=isinstance(examples, WithPrompts))
    return task, precision, examples, run_identity


def require_same_inputs(
    ranks: Ranks, config: InferConfig, task: PredictionTask, run_identity: dict[str, Any], examples: Any
) -> None:
    """Raise an error on every rank if the inputs of a rank differ from those of rank 0.

    Compare the settings, the adapter, the weights of the base, and the pixels of the first COMPARED_IMAGES images. The path
    of the base may differ between machines.
    """
    base = {"base weights": weights_digest(task.backbone.model), "base processors": processors_digest(task.backbone)}
    execution = {name: getattr(config, name) for name in ("merge", "fast", "batch_size")}
    require_same(ranks, {key: value for key, value in run_identity.items() if key != "model"} | execution | base, "predict")
    first = ranks.broadcast(ranks.on_main(lambda: list(islice(examples, COMPARED_IMAGES))))
    gathered = ranks.all_gather([image_digest(example) for example in first])
    for rank, digests in enumerate(gathered):
        for example, digest, expected in zip(first, digests, gathered[0], strict=True):
            if digest != expected:
                raise ranks.error(
                    f"{example.image} has other pixels on process {rank} than on process 0; copy the file from the machine "
                    f"of process 0 to the machine of process {rank}"
                )


def image_digest(example: Example) -> str:
    """Return the SHA-256 of the decoded image, or the name of the error class if it cannot be read."""
    try:
        picture = open_example(example)
    except ImageError as error:
        return type(error).__name__
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def open_task(
    config: InferConfig | EvaluateConfig, adapter: Adapter | None, adapted: bool = False, device: str = ""
) -> tuple[PredictionTask, str]:
    """Load the backbone, and return its task and the precision.

    adapted: whether to load the adapter into the backbone. Otherwise, only its task and image size are used.
    device: if not empty, it replaces the setting `device`, and the precision is fp32.
    """
    own = adapter.task if adapter and config.task in ("auto", adapter.task.get("name")) else {}
    generation_of(own, config, str(adapter.path) if adapter else "")  # an error before the model is loaded
    name = config.model or (adapter.base if adapter else "")
    requested_precision = "fp32" if device else config.precision
    size = config.image_size or (adapter.image_size if adapter else 0)
    if not name:
        named = adapter.path if adapter else ""
        raise AdapterError(f"{named} names no base; give it: MODEL (--model; in Python: base=…, or model=… in a config)")
    with base_named_by(None if config.model else adapter), phase(f"loading {name}"):
        backbone, precision = open_backbone(
            name, device or config.device, requested_precision, config.base_dtype, fast=config.fast, image_size=size,
            trained_dtype=adapter.base_dtype if adapter else "",
        )  # fmt: skip
    task = task_of(backbone, adapter, config)
    if adapter:
        require_fit(backbone, adapter)
    if adapted and adapter:
        apply_adapter(task, adapter, config.merge if isinstance(config, InferConfig) else True)
    return task, precision


def require_fit(backbone: Backbone, adapter: Adapter) -> None:
    """Raise AdapterError if the adapter was trained on another base. The message gives the setting that loads that base."""
    try:
        check_fit(backbone, adapter)
    except AdapterError as error:
        own = ' by MODEL = "" (--model ""; in Python: without base or model)' * (backbone.name != adapter.base)
        raise AdapterError(f"{error}{own * str(error).endswith('load that base')}") from None


def apply_adapter(task: PredictionTask, adapter: Adapter, merge: bool, precision: str = "fp32") -> None:
    """Load the adapter and its task metadata, merge it if `merge`, and cast the weights to `precision`.

    The hooks stay if the base is quantized, or if they add something other than ΔW x, after an edit of `layer.py`.
    """
    merge, difference = merge and not quantization(task.backbone.model), ""
    with phase(f"loading {adapter.path}" + ", and merging it" * merge):
        adapter_file.load(task.backbone, adapter)
        try:
            if merge:
                merging.bake(task.backbone.model)
        except OtherUpdateError as error:
            difference = error.difference
    if difference:
        print(printable(f"warning: {difference}, so the adapter is not merged, and the hook predicts"), flush=True)
    weights.cast_once(task.backbone, precision)
    if adapter.task.get("name") == task.name:
        task.load_metadata(adapter.task)


def task_of(
    backbone: Backbone, adapter: Adapter | None = None, config: InferConfig | EvaluateConfig | None = None
) -> PredictionTask:
    """Return the task of an adapter, with its prompt and generation settings.

    Non-empty settings of `config` replace them. Without an adapter, return the task that the backbone was trained for.
    """
    metadata: dict[str, Any] = adapter.task if adapter else {}
    chosen = config.task if config and config.task != "auto" else ""
    name = chosen or metadata.get("name") or task_by_base(backbone, adapter)
    own = metadata if metadata.get("name") == name else {}
    generation = generation_of(own, config, str(adapter.path) if adapter else "")
    if unknown := own.get("generation", {}).keys() - OPTIONS.keys():
        print(printable(f"ignored generation options of the adapter, unknown here: {', '.join(sorted(unknown))}"))
    generates = not getattr(config, "texts", "") and (name not in TASKS or TASKS[name].writes_text)
    lines = ignored_lines(generation.stored()) if generates else unused_lines(config)
    print("".join(f"{line}\n" for line in lines), end="")
    prompt = (config.prompt if config else "") or str(own.get("prompt", ""))
    if name not in TASKS:
        raise ConfigError(
            f"the adapter was trained for the unknown task {name!r}; set TASK (--task) to one of {', '.join(TASKS)}"
        )
    other = metadata.get("name") in TASKS and metadata.get("name") != name
    if adapter and other and backbone.architecture not in TASKS[name].architectures:
        raise ConfigError(
            f'TASK = {name!r}, but the adapter {adapter.path} is for the task {metadata["name"]}; set TASK = "auto" '
            f'(--task auto; in Python: task="auto"), or give another adapter{advice(name, "", adapter)}'
        )
    if adapter and config and config.model and backbone.architecture not in TASKS[name].architectures:
        raise ConfigError(
            f"MODEL = {config.model!r} is a {backbone.architecture}, but the adapter {adapter.path} is for the task {name}; "
            'to use the base of the adapter, set MODEL = "" (--model ""; in Python: give no base or model)'
        )
    if warning := other_task_warning(name, backbone.architecture, adapter):
        print(printable(warning))
    task = TASKS[name](backbone, "" if prompt == "none" else prompt, generation)
    if adapter and attached.names(backbone.model):
        task.load_metadata(own)
    return task


def task_by_base(backbone: Backbone, adapter: Adapter | None) -> str:
    """Return the task that the base was trained for.

    An adapter of peft names no task. Raise ConfigError for one on a BLIP-2, which captions and answers questions.
    """
    if adapter and adapter.note and backbone.architecture not in TASK_OF:
        raise ConfigError(
            f"{adapter.path} has the format of peft and names no task, and {backbone.architecture} has several; store one: "
            f"lora-blip convert {quoted_for_shell(str(adapter.path.parent))} --to lora_blip --task caption --output-dir FOLDER"
            ". infer, evaluate and Captioner also accept TASK (--task caption, or task='caption')"
        )
    return default_task(backbone.architecture)


def generation_of(own: dict[str, Any], config: InferConfig | EvaluateConfig | None, path: str = "") -> Generation:
    """Return the generation settings of an adapter. Those that `config` sets replace them.

    own: the task in the adapter file. Its unknown options are ignored. Raise ConfigError for an option of `config` that cannot
    be used, and AdapterError for one of the adapter.
    """
    chosen: dict[str, Any] = {}
    if config:
        settings = {"max_new_tokens": config.max_new_tokens, "num_beams": config.num_beams}
        settings["do_sample"] = getattr(config, "sample", False)
        chosen = {name: value for name, value in settings.items() if value} | config.generation
    known = {name: value for name, value in own.get("generation", {}).items() if name in OPTIONS}
    if generation_fault(known | chosen) and (fault := generation_fault(known)):
        wrong = [name for name in known if not generation_fault({n: v for n, v in known.items() if n != name})]
        fix = f"to use the adapter without it: --generation {wrong[0]}=null" if wrong else "train the adapter again"
        raise AdapterError(f"{path}: {fault}; {fix}")
    check_generation(known | chosen)
    return Generation.of(known | chosen, config.seed if config else 0)


def work_of(adapter: Adapter) -> str:
    """Return how an adapter was made, and its scale: "1,200 steps", "1,200 steps, dora, scaled by 0.5", "a blend"."""
    training = adapter.metadata.get("training", {})
    work = ["a blend" if "blend" in training else steps_of(training)]
    work += [adapter.variant] * (adapter.variant != "lora")
    work += filter(None, [lr_ratio_of(training)])
    work += [f"scaled by {adapter.scale:g}"] * (adapter.scale != 1)
    return ", ".join(work)


def describe(task: PredictionTask, adapter: Adapter | None, count: int, precision: str) -> str:
    """Return a line on the adapter, its training and its score, and a line on the task, the number of inputs and the base.

    Without an adapter, return only the second line.
    """
    work = f"{task.name}: {counted(count, 'prediction')} with {task.backbone.name}, {precision}"
    if adapter is None:
        return printable(f"{work}, without an adapter")
    training = adapter.metadata.get("training", {})
    facts = [str(adapter.task.get("name", "unknown task")), work_of(adapter)]
    facts += ["stopped early"] * (not training.get("finished", True))
    facts += ["the weights with the best validation score"] * (adapter.path.name == runs.BEST_NAME)
    score = validation_score(training)
    facts += [f"{score} on the validation images" if score else "not validated"]
    lines = (f"adapter {adapter.path}: {', '.join(facts)}", *([f"note: {adapter.note}"] if adapter.note else []), work)
    return "\n".join(map(printable, lines))
