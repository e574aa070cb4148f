"""What a training keeps on the disk between epochs and runs: decoded pictures, and what comes before the first adapter."""

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

FOLDER = ".cache"  # in the output folder, for all its runs


def caches_for(config: TrainConfig, task: Task, precision: str, identity: dict[str, Any]) -> Caches:
    """Return the caches that the settings allow. If states of images are kept, set `task.prefix`, which continues from them.

    Call this after the adapters are on the model. `identity` is that of the run, with digests of the base as it was loaded.
    """
    if not config.cache_gb:
        return NO_CACHES
    folder, limit = Path(config.output_dir) / FOLDER, int(config.cache_gb * 1e9)
    backbone = task.backbone
    read: dict[str, Any] = {
        "processor": settings_of(backbone.image_processor),
        "pillow": PIL.__version__,
        "lora_blip": __version__,
    }
    pixels = Store(folder, {"of": "pictures", **read}, limit)
    prefix = Prefix(backbone.model, task.project_vision)
    if not prefix.worthwhile or config.shard:  # with sharded weights, all ranks must run the same forwards
        return Caches(pixels)
    computed: dict[str, Any] = {
        "base": identity["base weights"], "settings": identity["base processors"], "precision": precision,
        "base_dtype": config.base_dtype, "fast": config.fast, "device": backbone.device.type,
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    prefix.store = Store(folder, {"of": "states", **prefix.about, **computed, **read}, limit)
    task.prefix = prefix
    return Caches(pixels, prefix.store)


def describe_cache(config: TrainConfig, task: Task) -> str:
    """What is kept where, or what would let it be, for the user to read; "" where there is nothing to gain."""
    if not task.prefix:
        return ""
    if not views_repeat(config):
        return (
            "each look at a picture is another: AUGMENT = False or VIEWS = 4 would keep what comes before the first adapter\n\n"
        )
    folder = Path(config.output_dir) / FOLDER
    return (
        f"what comes before the first adapter is computed once a picture, and kept: {folder}, up to {config.cache_gb:g} GB\n\n"
    )


def cached_inputs(config: TrainConfig, task: Task) -> dict[str, Any]:
    """What the training's pictures are read from, if not from their pixels, for the identity of a run."""
    return task.prefix.about if task.prefix and views_repeat(config) else {}


def views_repeat(config: TrainConfig) -> bool:
    """Whether pictures are looked at more than once as they were before."""
    return config.views > 0 or not config.augment
