"""Create the disk caches of a training run: decoded images, and the outputs of the frozen layers before the first adapter."""

from pathlib import Path
from typing import Any

import PIL
import torch
import transformers

from lora_blip.config import TrainConfig
from lora_blip.data.dataset import NO_CACHES, Caches
from lora_blip.data.disk_cache import Store
from lora_blip.lora.fingerprint import settings_of
from lora_blip.tasks.base import Task
from lora_blip.tasks.frozen_prefix import Prefix
from lora_blip.version import __version__

FOLDER = ".cache"  # in the output folder; all runs share it


def caches_for(config: TrainConfig, task: Task, precision: str, identity: dict[str, Any]) -> tuple[Caches, Prefix | None]:
    """Return the caches that the settings allow, and the frozen prefix that reads and writes cached states (or None).

    Call this after `inject`. `identity` is the identity of the run, with the digests of the loaded base.
    """
    if not config.cache_gb:
        return NO_CACHES, None
    folder, limit = Path(config.output_dir) / FOLDER, int(config.cache_gb * 1e9)
    backbone = task.backbone
    decoding: dict[str, Any] = {
        "processor": settings_of(backbone.image_processor),
        "pillow": PIL.__version__,
        "lora_blip": __version__,
    }
    pixels = Store(folder, {"of": "pictures", **decoding}, limit)
    prefix = Prefix(task.encoder)
    if not prefix.skips_blocks or config.shard:  # with sharded weights, all processes must run the same forwards
        return Caches(pixels), None
    computed: dict[str, Any] = {
        "base": identity["base weights"], "settings": identity["base processors"], "precision": precision,
        "base_dtype": config.base_dtype, "fast": config.fast, "device": backbone.device.type,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    prefix.store = Store(folder, {"of": "states", **prefix.description, **computed, **decoding}, limit)
    return Caches(pixels, prefix.store), prefix


def describe_cache(config: TrainConfig, prefix: Prefix | None) -> str:
    """Return a line to print: the folder of the cached states, or the settings that allow a cache of training images.

    Return "" if the run caches no states.
    """
    if not prefix:
        return ""
    if not views_repeat(config):
        return (
            "AUGMENT = True changes each training image in every epoch, so training images cannot be cached. For faster steps, "
            "set AUGMENT = False, or VIEWS = 4 (four versions of each image): the layers before the first adapter then run "
            "once per version\n\n"
        )
    folder = Path(config.output_dir) / FOLDER
    return (
        "the layers before the first adapter are computed once per image, and their output is cached in "
        f"{folder} (at most {config.cache_gb:g} GB)\n\n"
    )


def cached_inputs(config: TrainConfig, prefix: Prefix | None) -> dict[str, Any]:
    """Return a description of the cached states, for the identity of the run; {} if training reads no cached states."""
    return prefix.description if prefix and views_repeat(config) else {}


def views_repeat(config: TrainConfig) -> bool:
    """Return True if the same pixels are used more than once: without augmentation, or with a limited number of views."""
    return config.views > 0 or not config.augment
