"""The record of what `verification` has checked on this machine: one small file for each combination."""

import hashlib
import json
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_blip.kernels import paths
from lora_blip.lora import attached, fingerprint
from lora_blip.lora.layer import AdapterStack
from lora_blip.models.loading import Backbone
from lora_blip.runtime.files import cache_folder, write_whole
from lora_blip.tasks.base import BaseTask
from lora_blip.tasks.differences import Difference
from lora_blip.version import __version__

COMPUTING = ("lora", "kernels", "models", "tasks")  # folders of the package


def base_of(backbone: Backbone) -> str:
    """Return a digest of a base: its configuration, and samples of its weights."""
    loras = [x for name in attached.names(backbone.model) for x in attached.adapters(backbone.model, name).values()]
    samples = backbone.samples or fingerprint.samples(backbone.model, loras)
    return fingerprint.digest_of({"config": fingerprint.settings_of(backbone.model.config), "weights": samples})


def key_of(task: BaseTask, base: str, precision: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return everything that decides what is computed and how, in JSON."""
    model, device = task.backbone.model, task.backbone.device
    sites = [str(x.site) for name in attached.names(model) for x in attached.adapters(model, name).values()]
    merged = any(isinstance(module, AdapterStack) and bool(module.merged) for module in model.modules())
    processor = task.backbone.image_processor
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {platform.processor()}"
    return {
        "base": base, "device": f"{device.type} {chip} {torch.backends.cpu.get_cpu_capability()}", "precision": precision,
        "weights": sorted({str(p.dtype) for p in model.parameters()}), "task": task.name, "adapters": sites, "merged": merged,
        "paths": paths.as_json(paths.row()),
        "image size": str(getattr(processor, "size", "")), "settings": settings,
        "torch": torch.__version__, "transformers": transformers.__version__, "lora_blip": __version__,
        "code": digest_of_code(),
    }  # fmt: skip


@cache
def digest_of_code(package: Path = Path(__file__).parents[1]) -> str:
    """Return a digest of the files of the package that compute. After an edit of one, all combinations are checked again."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in COMPUTING for path in (package / folder).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def path_of(key: dict[str, Any]) -> Path:
    """Return the file that records that a key has been checked on this machine."""
    return cache_folder() / "verified" / f"{fingerprint.digest_of(key)[:32]}.json"


def is_verified(key: dict[str, Any]) -> bool:
    """Return True if a key has been checked on this machine."""
    try:
        return json.loads(path_of(key).read_text(encoding="utf-8"))["key"] == json.loads(json.dumps(key, default=str))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: the user has no home folder
        return False


def remember(key: dict[str, Any], differences: list[Difference]) -> None:
    """Record that a key has been checked. If the file cannot be written, the key is checked again in the next run."""
    record = {"key": key, "differences": {each.what: each.value for each in differences}}
    with suppress(OSError, RuntimeError):
        write_whole(path_of(key), json.dumps(record, indent=1, default=str).encode(), synced=False)
