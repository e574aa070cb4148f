"""What a run starts from: its task, its examples, its rate; and what is refused before anything is loaded."""

import os
import random
from shutil import which
from typing import Any

from torch.utils.data import DataLoader

from lora_blip.config import TrainConfig
from lora_blip.data import annotations
from lora_blip.data.dataset import NO_CACHES, Caches, ImageDataset
from lora_blip.data.example import FILE, Example
from lora_blip.data.loader import HostBatch, loader
from lora_blip.data.split_leaks import Thumbnails, report_split_leaks
from lora_blip.errors import ConfigError
from lora_blip.models.loading import Backbone
from lora_blip.runtime.distributed import Ranks
from lora_blip.tasks.base import Generation, Task
from lora_blip.tasks.registry import TASKS, natural_task
from lora_blip.training.run_folder import summary_writer

COMPILERS = ("c++", "g++", "clang++", "cl")
TINY = 20_000_000  # parameters
WIDER = 4  # a batch of validation beside one of training: it keeps nothing for a backward pass


def refuse_impossible(config: TrainConfig, ranks: Ranks) -> None:
    """ConfigError for settings that contradict each other, or that need what is not there."""
    if config.shard and ranks.count == 1:
        raise ConfigError("shard = True spreads weights over several processes: torchrun --nproc-per-node 2 train.py")
    if config.compile and not ("CXX" in os.environ or any(map(which, COMPILERS))):
        raise ConfigError("compile = True needs a C++ compiler, and none is found: install g++, or set COMPILE = False")
    if config.tensorboard:
        summary_writer()
    blind = {"best_by": config.best_by not in ("auto", ""), "patience": config.patience > 0}
    held_out = config.val_fraction or config.val_annotations
    for name in (name for name, wanted in blind.items() if wanted and not held_out):
        raise ConfigError(
            f"{name} = {getattr(config, name)!r} needs images to validate on, and val_fraction is 0: set VAL_FRACTION"
        )


def task_for(config: TrainConfig, backbone: Backbone) -> Task:
    """The task that is to be learned; ConfigError if its score to pick the best by is none that it has."""
    name = natural_task(backbone.architecture) if config.task == "auto" else config.task
    task = TASKS[name](backbone, config.prompt, Generation(config.max_new_tokens or 1, config.num_beams))
    task.require_score(config.best_by)
    return task


def default_rate(model: Any) -> float:
    """Peak learning rates that suit LoRA on the Salesforce checkpoints, and on bases a hundred times smaller."""
    size = sum(p.numel() for p in model.parameters())
    return 1e-4 if size > TINY else 1.5e-3 if model.config.model_type == "blip-2" else 3e-3


def read_examples(config: TrainConfig, task: Task, thumbnails: Thumbnails | None = None) -> tuple[list[Example], list[Example]]:
    """Return checked lines to train on and to validate on, the latter in an order drawn from the seed.

    The validation lines are those of `val_annotations`, or a share of the images. `thumbnails` keeps one of each image
    that is decoded.
    """
    examples = read_file(config, task, config.annotations, thumbnails)
    if config.val_annotations:
        training, validation = examples, read_file(config, task, config.val_annotations, thumbnails)
        task.prepare_data([*training, *validation])
    else:
        task.prepare_data(examples)
        training, validation = annotations.split_by_image(examples, config.val_fraction, config.seed)
    random.Random(config.seed).shuffle(validation)  # an image's lines side by side would be no negatives of each other
    return training, validation


def read_file(config: TrainConfig, task: Task, source: str, thumbnails: Thumbnails | None) -> list[Example]:
    """Return the usable lines of an annotations file, and print what was left out and which tokens are unknown."""
    decode, keep = config.check_images == "all", thumbnails.add if thumbnails else None
    examples, problems = annotations.read(
        source, config.image_root, config.on_bad_data, task.check, decode, task.pretokenize, task.trim, decoded=keep
    )
    if problems:
        print(f"left out {len(problems)} line(s):\n{annotations.listing(problems)}")
    if report := task.unknown_report(examples):
        print(report)
    return examples


def warn_of_leaks(config: TrainConfig, training: list[Example], validation: list[Example], thumbnails: Thumbnails) -> None:
    """Print which validation images are in the training data, or nearly the same pictures, and what to do."""
    fix = (
        f"Remove them from {config.val_annotations} or from {config.annotations}"
        if config.val_annotations
        else "Keep all images of a video or scene on one side: move the lines of some of them to another file, and set "
        'VAL_ANNOTATIONS = "val.jsonl" (--val-annotations val.jsonl)'
    )
    report_split_leaks(map(FILE, validation), map(FILE, training), thumbnails, fix)


def loader_of(
    examples: list[Example], task: Task, config: TrainConfig, shuffle: bool, caches: Caches = NO_CACHES
) -> DataLoader[HostBatch]:
    augmented = shuffle and config.augment
    pictures = ImageDataset(
        examples, task.backbone.image_processor, augmented, config.seed, not task.needs_negatives, config.views, caches
    )
    device = task.backbone.device.type
    workers = config.num_workers if config.num_workers >= 0 else 0 if device == "cpu" else 4
    size = config.batch_size * (1 if shuffle or task.needs_negatives else WIDER)
    return loader(pictures, size, shuffle, config.seed, workers, pin=device == "cuda")
