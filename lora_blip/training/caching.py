"""Create the disk caches of a training run: decoded images, and the outputs of the frozen layers before the first adapter."""

import math
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers

from lora_blip.config import TrainConfig
from lora_blip.data.dataset import NO_CACHES, Caches
from lora_blip.data.disk_cache import Store
from lora_blip.data.example import Example
from lora_blip.lora.fingerprint import settings_of
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable_lines
from lora_blip.tasks.base import Task
from lora_blip.tasks.frozen_prefix import Prefix
from lora_blip.version import __version__

FOLDER = ".cache"  # in the output folder; all runs share it
FILE_BYTES = 256  # header of a cached file, at most


def caches_for(
    config: TrainConfig, task: Task, precision: str, identity: dict[str, Any], views: int
) -> tuple[Caches, Prefix | None]:
    """Return the caches that the settings allow, and the frozen prefix that reads and writes cached states (or None).

    Call this after `inject`. `identity` is the identity of the run, with the digests of the loaded base. views: the number of
    different images, as `count_views` counts them. States are cached only if those of all views fit the limit.
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
    prefix = Prefix(task.encoder, chunk=chunk_of(config.batch_size, backbone.device.type))
    if not prefix.skips_blocks or config.shard:  # with sharded weights, all processes must run the same forwards
        return Caches(pixels), None
    side = backbone.image_size
    size = views and views * (prefix.bytes_per_image(side) + FILE_BYTES)
    if size > limit:
        print(printable_lines(too_small(config, views, size)), end="")
        return Caches(pixels), None
    computed: dict[str, Any] = {
        "base": identity["base weights"], "settings": identity["base processors"], "precision": precision,
        "base_dtype": config.base_dtype, "fast": config.fast, "device": backbone.device.type,
        "torch": torch.__version__, "transformers": transformers.__version__, "chunk": prefix.chunk,
    }  # fmt: skip
    prefix.store = Store(folder, {"of": "states", **prefix.description, **computed, **decoding}, limit)
    both_fit = size + views * (side * side * 3 + FILE_BYTES) <= limit  # states replace the pixels from the second epoch on
    return Caches(pixels if both_fit else None, prefix.store), prefix


def chunk_of(batch_size: int, device: str) -> int:
    """Return the number of images that are computed together: a power of two that divides the batch size.

    It is at most 4 on a CPU, where more images do not fit the processor's cache, and at most 16 on other devices.
    """
    return math.gcd(batch_size, 4 if device == "cpu" else 16)


def count_views(config: TrainConfig, training: list[Example], validation: list[Example]) -> int:
    """Return the number of different images that are read more than once: each version of each image counts."""
    of_training = len({example.file for example in training}) * max(config.views, 1) if views_repeat(config) else 0
    return of_training + len({example.file for example in validation})


def too_small(config: TrainConfig, views: int, size: int) -> str:
    """Return a line that explains why no states are cached, and the setting that allows it."""
    needed = math.ceil(size / 1e8) / 10
    return (
        f"the layers before the first adapter run in each step. Caching their output for {counted(views, 'image')} needs "
        f"{needed:,.1f} GB on the disk; the limit is {config.cache_gb:g} GB. To cache it, set CACHE_GB = {math.ceil(needed)} "
        f"(--cache-gb {math.ceil(needed)})\n\n"
    )


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
