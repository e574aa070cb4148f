"""Prepare a training run: settings, task, data, adapters, and the checks before the first step."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lora_blip.config import TrainConfig
from lora_blip.data.dataset import NO_CACHES, Caches, ImageDataset
from lora_blip.data.example import FILE, Example
from lora_blip.data.loader import DeviceBatch, HostBatch, close, first_batch, loader
from lora_blip.data.split_leaks import Thumbnails, report_split_leaks
from lora_blip.errors import ConfigError
from lora_blip.kernels import paths
from lora_blip.lora import attached, targets
from lora_blip.lora.sites import base_size, quantization
from lora_blip.models import sharding, weights
from lora_blip.models.compilation import compile_blocks
from lora_blip.models.generation import check_generation, ignored_lines, unused_lines
from lora_blip.models.loading import Backbone, open_backbone
from lora_blip.models.precision import autocasting
from lora_blip.runtime import distributed
from lora_blip.runtime.agreement import require_same
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.files import refuse_unwritable
from lora_blip.runtime.progress import phase
from lora_blip.runtime.seeding import seed_everything
from lora_blip.runtime.untrusted import printable_lines
from lora_blip.runtime.user_paths import require_folder
from lora_blip.tasks import verification
from lora_blip.tasks.base import Generation, Task
from lora_blip.tasks.frozen_prefix import Prefix, first_adapted_block
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.tasks.text_length import fit_generation
from lora_blip.training import caching, preflight, resume
from lora_blip.training.best import few_images_warning
from lora_blip.training.diagnostics import describe_error
from lora_blip.training.early_checks import refuse_contradictions, refuse_quantized
from lora_blip.training.examples import Lines, read_examples
from lora_blip.training.initial_adapter import freeze_others, inject_adapters, restore_task, source_of
from lora_blip.training.learner import Autocast
from lora_blip.training.tensorboard import summary_writer

TINY = 20_000_000  # a base with at most this number of parameters gets a higher learning rate
MOST_WORKERS = 16  # processes that load images; each needs about half a gigabyte of memory
MANY_GROUPS = 10
NUMBERED = re.compile(r"(.+?)_\d+")  # a file name that ends with the number of a frame
VALIDATION_FACTOR = 4  # a validation batch may be this many times larger than a training batch: it keeps no activations


@dataclass
class RunInputs:
    """The data and the model of a run, with the adapters injected."""

    config: TrainConfig  # "auto" and 0 are replaced by the values that the run uses
    task: Task
    precision: str
    training: list[Example]
    validation: list[Example]
    drawn: bool  # the validation images were drawn at random, by VAL_FRACTION
    scored: str  # the split of the annotations that `evaluate` scores: "test" or "val", or "" if they have no splits
    identity: dict[str, Any]


@dataclass
class PreparedRun(RunInputs):
    """A run that has passed all checks before the first step."""

    autocast: Autocast
    batches: DataLoader[HostBatch]
    held_out: DataLoader[HostBatch] | None  # None without validation data
    first: DeviceBatch  # the first micro-batch
    prefix: Prefix | None  # computes the cached states of images; None if no states are cached


def prepare_run(ranks: Ranks, config: TrainConfig, closing: ExitStack) -> PreparedRun:
    """Load the data and the model, inject the adapters, and check the first batch.

    Raise LoraBlipError, whose message gives a fix, if the run cannot work. `closing` closes the loaders at its end.
    """
    paths.use(ranks.broadcast(paths.measured()))  # all processes use the same paths, also after an earlier run in this process
    inputs = ranks.together(lambda: load_inputs(ranks, config))
    require_same(ranks, inputs.identity)
    config, task = inputs.config, inputs.task
    print(f"\n{targets.table(task.backbone.model)}\n")
    if warning := targets.too_large_ranks(task.backbone.model):
        print(f"{warning}\n")
    if warning := few_images_warning(inputs.validation, inputs.drawn, config.annotations):
        print(f"{warning}\n")
    caches, prefix = apply_performance_settings(ranks, inputs)
    if prefix:
        closing.callback(prefix.writer.close)
    autocast = autocasting(task.backbone.device, inputs.precision)
    batches = loader_of(inputs.training, task, config, shuffle=True, caches=caches)
    held_out = loader_of(inputs.validation, task, config, shuffle=False, caches=caches) if inputs.validation else None
    for data_loader in filter(None, (batches, held_out)):
        closing.callback(close, data_loader)
    first = ranks.together(lambda: task.batch(first_batch(batches), prefix))
    prepared = PreparedRun(**vars(inputs), autocast=autocast, batches=batches, held_out=held_out, first=first, prefix=prefix)
    with phase("the checks before the first step"):
        run_checks(ranks, prepared)
    return prepared


def load_inputs(ranks: Ranks, config: TrainConfig) -> RunInputs:
    """Read the data, load the model and inject the adapters.

    Do not call a collective here: if one process failed, the others would wait in it. `Ranks.together` sends them the error.
    """
    seed_everything(config.seed)
    refuse_unwritable(config.output_dir)
    require_folder("image_root", config.image_root)
    refuse_impossible(config, ranks)
    device = ranks.device(config.device)
    with phase(f"loading {config.model}"):
        backbone, precision = open_backbone(
            config.model, device, config.precision, config.base_dtype, config.checkpointing, config.fast, config.image_size,
            move=not config.shard,
        )  # fmt: skip
    refuse_quantized(config, quantization(backbone.model))
    task = task_for(config, backbone)
    config = replace(config, lr=config.lr or default_rate(backbone.model), task=task.name, prompt=task.prompt)
    config = replace(config, best_by=task.score_names[0] if config.best_by == "auto" else config.best_by)
    thumbnails = Thumbnails() if ranks.main and (config.val_fraction or config.val_annotations) else None
    training, validation, drawn, scored = lines = read_examples(config, task, thumbnails)
    if config.best_by == "cider" and len({example.file for example in validation}) == 1:
        raise ConfigError(
            'best_by = "cider": CIDEr is always 0 if there is only one validation image; hold out more images (VAL_FRACTION or '
            'VAL_ANNOTATIONS), or set BEST_BY = "loss" (--best-by loss)'
        )
    if thumbnails:
        search = "search for validation images in the training data"
        with phase(search):
            attempt(search, partial(warn_of_leaks, config, lines, thumbnails))
    fitted = replace(config, max_new_tokens=fit_generation(task, [*training, *validation], config.max_new_tokens))
    if initial := inject_adapters(config, backbone):
        restore_task(task, initial, config)
        config = replace(config, init_adapter=str(initial.path))
    identity = resume.identity(fitted, precision, backbone, training, validation, ranks.count)
    identity["init_adapter"] = source_of(initial) if initial else ""
    return RunInputs(config, task, precision, training, validation, drawn, scored, identity)


def apply_performance_settings(ranks: Ranks, inputs: RunInputs) -> tuple[Caches, Prefix | None]:
    """Apply the settings that save time or memory: caches, the fused update, the base's dtype and sharding.

    Return the caches, and the frozen prefix that computes their states (None if no states are cached).
    """
    config, task, backbone = inputs.config, inputs.task, inputs.task.backbone
    views = caching.count_views(config, inputs.training, inputs.validation)
    caches, prefix = ranks.together(lambda: caching.caches_for(config, task, inputs.precision, inputs.identity, views))
    print(printable_lines(caching.describe_cache(config, prefix)), end="")
    inputs.identity["learned from"] = caching.cached_inputs(config, prefix)
    attached.fast(backbone.model, config.fast)
    if config.fast and backbone.device.type == "cpu":
        print(printable_lines(f"{paths.row().selection()}\n"), end="")
    if config.base_dtype == "auto" or quantization(backbone.model):
        weights.cast_once(backbone, inputs.precision)
    if config.shard:
        sharding.shard(backbone, ranks.count)
    freeze_others(config, backbone, attached.adapters(backbone.model))
    return caches, prefix


def run_checks(ranks: Ranks, prepared: PreparedRun) -> None:
    """Run the checks before the first step and print their results. Then compile the model if `compile` is set."""
    config, task, first, autocast = prepared.config, prepared.task, prepared.first, prepared.autocast
    model = task.backbone.model
    model.train()
    # with sharded weights, a forward calls collectives, which `Ranks.together` forbids
    independent = distributed.ALONE if config.shard else ranks
    unstored = replace(first, cached_states=None)  # the cache must not keep states of a fast path that is not yet verified
    print(independent.together(lambda: preflight_report(config, task, unstored, autocast)), "\n", sep="")
    if config.compile:
        print(f"torch.compile will compile {compile_step(task, config.shard)} in the first step\n")
    options = {name: getattr(config, name) for name in ("compile", "base_dtype", "checkpointing", "shard")}
    validates = prepared.held_out is not None
    verification.before_training(task, first, prepared.precision, autocast, options, ranks, validates)


def compile_step(task: Task, shards: bool) -> str:
    """Compile the loss of a task, or the blocks of the ViT if the loss cannot be one graph. Return what is compiled."""
    if not shards and task.compile_loss():  # sharded weights are gathered between the layers, outside a graph
        return "the whole loss and its backward pass"
    model = task.backbone.model
    frozen, blocks = first_adapted_block(model)[0], len(model.vision_model.encoder.layers)
    compile_blocks(model, frozen)
    return f"{blocks - frozen} of the {blocks} ViT blocks"


def preflight_report(config: TrainConfig, task: Task, first: DeviceBatch, autocast: Autocast) -> str:
    """Return the report of the preflight checks. Raise PreflightError if one fails, or TrainingError if memory runs out."""
    try:
        return preflight.check(task, first, autocast)
    except RuntimeError as error:
        raise describe_error(error, config, task) from None


def refuse_impossible(config: TrainConfig, ranks: Ranks) -> None:
    """Raise ConfigError if settings contradict each other or need something that is missing."""
    limit = {"max_new_tokens": config.max_new_tokens} if config.max_new_tokens else {}
    check_generation(config.generation | {"num_beams": config.num_beams} | limit)
    if config.shard and ranks.count == 1:
        raise ConfigError(
            "shard = True needs several processes: start them with torchrun --nproc-per-node 2 train.py, or set SHARD = False"
        )
    if config.tensorboard:
        summary_writer()
    refuse_contradictions(config)


def task_for(config: TrainConfig, backbone: Backbone) -> Task:
    """Return the task that the settings name. Raise ConfigError if it has no score named `best_by`."""
    name = default_task(backbone.architecture) if config.task == "auto" else config.task
    values = config.generation | {"max_new_tokens": config.max_new_tokens or 1, "num_beams": config.num_beams}
    task = TASKS[name](backbone, config.prompt, Generation.of(values, config.seed))
    lines = ignored_lines(task.generation.stored()) if task.writes_text else unused_lines(config)
    print("".join(f"{line}\n" for line in lines), end="")
    task.require_score(config.best_by)
    return task


def default_rate(model: Any) -> float:
    """Return the default peak learning rate: 1e-4, or more for a base with at most TINY parameters."""
    return 1e-4 if base_size(model) > TINY else 1.5e-3 if model.config.model_type == "blip-2" else 3e-3


def warn_of_leaks(config: TrainConfig, lines: Lines, thumbnails: Thumbnails) -> None:
    """Print the validation images that have an equal or similar image in the training data, and how to fix the split."""
    if config.val_annotations:
        fix = f"Remove them from {config.val_annotations} or from {config.annotations}"
        if Path(config.val_annotations).resolve() == Path(config.annotations).resolve():
            fix = 'Both files are the same: set VAL_ANNOTATIONS = "" (--val-annotations "") to hold out images at random'
    elif not lines.drawn:
        fix = f"Remove the similar training images from {config.annotations}"
    else:
        group = grouping_of([FILE(example) for example in (*lines.training, *lines.validation)])
        name = f"GROUP_BY = {group}" if group else 'GROUP_BY (--group-by) to a regex of its name, such as "(scene[0-9]+)"'
        keep = f"Keep the images of a scene together: if the paths contain a video or scene, and not a class, set {name}"
        if config.group_by:
            keep = f"GROUP_BY = {config.group_by!r} puts them into different groups: give one whose groups are scenes"
        hold_out = how_to_hold_out(config.annotations, lines.training)
        fix = f"{keep}. Otherwise choose images that resemble no other image, and {hold_out}"
    report_split_leaks(map(FILE, lines.validation), map(FILE, lines.training), thumbnails, fix)


def how_to_hold_out(annotations: str, training: Sequence[Example]) -> str:
    """Return how to hold out chosen images: a validation file of the same format beside the annotations, or a folder."""
    source = Path(annotations)
    if source.is_file() and source.suffix.lower() in (".jsonl", ".csv", ".tsv"):
        target = source.with_name(f"val{source.suffix}")
        header = "" if source.suffix.lower() == ".jsonl" else ", below the same first line"
        if target != source and not target.exists():
            return f"move their lines from {source} to {target}{header}, and set VAL_ANNOTATIONS to it (--val-annotations)"
    if source.is_dir() and training and training[0].image.with_suffix(".txt").is_file():
        return (
            f"move them with their text files to a folder outside {source}, and set VAL_ANNOTATIONS to it (--val-annotations)"
        )
    return "hold them out in a file of their own: VAL_ANNOTATIONS (--val-annotations)"


def grouping_of(files: list[str]) -> str:
    """Return a value of GROUP_BY that makes at least MANY_GROUPS groups of the files, or "".

    With few groups, the held-out ones often are all images of a class, which the adapter then cannot learn.
    """
    if len({Path(file).parent for file in files}) >= MANY_GROUPS:
        return '"folder" (--group-by folder)'
    starts = {match[1] for file in files if (match := NUMBERED.search(Path(file).name))}
    return r"""r"(.+?)_\d+" (--group-by '(.+?)_\d+')""" if MANY_GROUPS <= len(starts) < len(files) else ""


def loader_of(
    examples: list[Example], task: Task, config: TrainConfig, shuffle: bool, caches: Caches = NO_CACHES
) -> DataLoader[HostBatch]:
    """Return a loader of the training lines (`shuffle` is True) or of the validation lines, whose batches are larger."""
    augment = shuffle and config.augment
    dataset = ImageDataset(
        examples, task.backbone.image_processor, augment, config.seed, not task.needs_negatives, config.views, caches
    )
    device = task.backbone.device.type
    workers = config.num_workers if config.num_workers >= 0 else default_workers(device)
    size = config.batch_size * (1 if shuffle or task.needs_negatives else VALIDATION_FACTOR)
    return loader(dataset, size, shuffle, config.seed, workers, pin=device == "cuda")


def default_workers(device: str) -> int:
    """Return the number of processes that load images: 0 for a model on the CPU, else one for each core of this rank."""
    return 0 if device == "cpu" else max(1, min(MOST_WORKERS, distributed.cores_of_rank()))
