"""The files of a run folder, and how a run is found."""

from pathlib import Path

from lora_blip.errors import AdapterError

RUNS = Path("lora_blip_output")  # the default OUTPUT_DIR
ADAPTER_NAME, BEST_NAME, METRICS_NAME = "adapter.safetensors", "best.safetensors", "metrics.jsonl"


def locate(adapter: str | Path, runs: str | Path = RUNS) -> Path:
    """Return the path of an adapter: of a file, of the newest one in a folder, or of the newest of `runs` if it is "latest".

    Raise AdapterError if there is none.
    """
    path = Path(runs if adapter == "latest" else adapter)
    try:
        found = [p for p in path.rglob(ADAPTER_NAME) if p.is_file()] if path.is_dir() else [path] if path.is_file() else []
    except OSError:  # a name longer than names can be
        found = []
    if found:
        return sorted(found, key=lambda p: p.stat().st_mtime)[-1]
    raise AdapterError(f"no adapter at {str(path)!r}; train one with train.py, or give the path of an {ADAPTER_NAME}")
