"""The record of what `verification` has checked on this machine."""

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from lora_blip.lora import attached, fingerprint
from lora_blip.lora.layer import AdapterStack
from lora_blip.models.loading import Backbone
from lora_blip.runtime.files import write_whole
from lora_blip.tasks.base import Task
from lora_blip.tasks.differences import Difference
from lora_blip.version import __version__


def base_of(backbone: Backbone) -> str:
    """A digest of a base: its configuration, and samples of its weights."""
    found = [x for name in attached.names(backbone.model) for x in attached.adapters(backbone.model, name).values()]
    samples = backbone.samples or fingerprint.samples(backbone.model, found)
    return digest({"config": fingerprint.settings_of(backbone.model.config), "weights": samples})


def key_of(task: Task, base: str, precision: str, settings: dict[str, Any]) -> dict[str, Any]:
    """All that decides what is computed and how, in JSON."""
    model, device = task.backbone.model, task.backbone.device
    sites = [str(x.site) for name in attached.names(model) for x in attached.adapters(model, name).values()]
    merged = any(isinstance(module, AdapterStack) and bool(module.merged) for module in model.modules())
    processor = task.backbone.image_processor
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {platform.processor()}"
    return {
        "base": base, "device": f"{device.type} {where} {torch.backends.cpu.get_cpu_capability()}", "precision": precision,
        "weights": sorted({str(p.dtype) for p in model.parameters()}), "task": task.name, "adapters": sites, "merged": merged,
        "image size": str(getattr(processor, "size", "")), "settings": settings,
        "torch": torch.__version__, "transformers": transformers.__version__, "lora_blip": __version__,
    }  # fmt: skip


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def path_of(key: dict[str, Any]) -> Path:
    """The file that says that a key has been checked on this machine."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lora_blip" / "verified" / f"{digest(key)[:32]}.json"


def is_verified(key: dict[str, Any]) -> bool:
    try:
        return json.loads(path_of(key).read_text(encoding="utf-8"))["key"] == json.loads(json.dumps(key, default=str))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: there is no home
        return False


def remember(key: dict[str, Any], found: list[Difference]) -> None:
    """Write down that a key has been checked; where nothing can be written, it is checked again."""
    about = {"key": key, "differences": {each.what: each.value for each in found}}
    with suppress(OSError, RuntimeError):
        write_whole(path_of(key), json.dumps(about, indent=1, default=str).encode(), synced=False)
