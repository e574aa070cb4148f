"""Compare two runs, or the processes of one: the same settings, data, weights and versions."""

import sys
from typing import Any

import numpy as np
import PIL
import transformers

from lora_blip.runtime.distributed import Ranks
from lora_blip.version import __version__

ADDED = {"image_size": 0, "scale": 1.0, "base_dtype": ""}  # settings that older runs lack, with the values that they used
DIGESTS = ("lines", "weights", "processors")  # endings of names whose value is a digest, which is not printed


def changes(earlier: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Return what has changed since an earlier run, in words."""
    earlier = ADDED | earlier
    return [_change(name, earlier.get(name), current[name]) for name in current if earlier.get(name) != current[name]]


def _change(name: str, earlier: Any, current: Any) -> str:
    if name.endswith(DIGESTS):
        return f"{name} are not the same"
    if name == "adapter" and "none" not in (earlier, current):
        return "the adapter is not the same"
    if name == "init_adapter" and earlier and current:  # digests too
        return "init_adapter has other weights"
    return f"{name} was {_shown(name, earlier)} and is {_shown(name, current)}"


def _shown(name: str, value: Any) -> str:
    if value in ("", None):
        return "not set"
    return "set" if name == "init_adapter" else repr(value)


def require_same(ranks: Ranks, inputs: dict[str, Any], verb: str = "train") -> None:
    """Raise an error on every rank if one has other data, settings, base weights or library versions than rank 0."""
    versions = {"Python": sys.version, "transformers": transformers.__version__, "numpy": np.__version__}
    inputs = inputs | versions | {"pillow": PIL.__version__, "lora_blip": __version__}
    every = ranks.all_gather(inputs)
    for rank, other in enumerate(every):
        changed = [
            f"{name} are not the same" if name.endswith(DIGESTS)
            else f"{name} is {other.get(name)!r} there and {every[0].get(name)!r} in process 0"
            for name in inputs if other.get(name) != every[0].get(name)
        ]  # fmt: skip
        if changed:
            raise ranks.error(
                f"process {rank} would {verb} something else than process 0: {'; '.join(changed)}. Start all processes with "
                "the same settings, files and library versions"
            )
