"""The names of runs and of the files in a run folder, and the search for an adapter."""

import re
from datetime import datetime
from pathlib import Path

from lora_blip.errors import AdapterError

RUNS = Path("lora_blip_output")  # the default OUTPUT_DIR
ADAPTER_NAME, BEST_NAME, METRICS_NAME = "adapter.safetensors", "best.safetensors", "metrics.jsonl"
GALLERY_NAME = "gallery.html"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the files of an adapter of peft
LONGEST_PART = 40  # characters of the base and of the targets in the name of a run; a file system allows 255 bytes in all


def run_name(task: str, base: str, targets: str, now: datetime) -> str:
    """Return `2026-11-28_123105_caption_tiny-blip_vit`. Names of runs are in the order of time.

    base: a path or a name on the hub, of which the last part is used.
    """
    parts = [part for part in re.split(r"[\\/]+", base) if part.strip(". ")]
    return "_".join([f"{now:%Y-%m-%d_%H%M%S}", task, name_part(parts[-1] if parts else ""), name_part(targets)])


def name_part(text: str) -> str:
    """Return a text as a part of a file name that each system allows: letters, digits, "." and "-", "x" if none is left."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:LONGEST_PART].strip("-.") or "x"


def locate(adapter: str | Path, runs: str | Path = RUNS) -> Path:
    """Return the path of an adapter: a file, or that of the newest run in a folder. "latest" is the newest run in `runs`.

    Return the best.safetensors of a run, which has the weights with the best validation, or else its adapter.safetensors. Raise
    AdapterError if there is no adapter.
    """
    path = Path(runs if adapter == "latest" else adapter)
    try:
        refuse_peft(path)
        if path.is_file():
            return path
        adapters = [p for p in path.rglob(ADAPTER_NAME) if p.is_file()] if path.is_dir() else []
        if not adapters and (path / BEST_NAME).is_file():
            return path / BEST_NAME  # of a run that was killed before its end
    except OSError:  # the name is too long for the file system
        adapters = []
    if not adapters:
        folder = "" if path.is_absolute() else f" in {str(Path.cwd())!r}"
        raise AdapterError(
            f"no adapter at {str(path)!r}{folder}; train one: lora-blip train (or python train.py); or give the path of one"
        )
    last = max(adapters, key=lambda p: p.stat().st_mtime)
    best = last.with_name(BEST_NAME)
    return best if best.is_file() else last


def refuse_peft(path: Path) -> None:
    """Raise AdapterError if `path` is an adapter of peft: its folder, or its weights."""
    if (path / PEFT_CONFIG).is_file() or (path.name == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file()):
        raise AdapterError(
            f"{path} is an adapter of peft, not of lora_blip; train one here: lora-blip train; or merge it into its base "
            "in peft (model.merge_and_unload().save_pretrained(folder)), and give that folder as MODEL without an adapter"
        )
