"""Read single weights of a base from its safetensors. The model is not built, and only the weight that is asked for is read."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_blip.errors import ModelError
from lora_blip.models.local_base import locate_base
from lora_blip.models.weight_names import SAFE_SHARDS, SAFE_WEIGHTS, unreadable, without_prefix
from lora_blip.runtime.untrusted import open_regular


class WeightReader:
    """The weights in the safetensors of a checkpoint's folder. `name` is the name of the base in messages."""

    def __init__(self, folder: str | Path, name: str) -> None:
        """Read the names of the weights. Raise ModelError if the folder has no safetensors, or if one cannot be read."""
        self.name = name
        single = Path(folder) / SAFE_WEIGHTS
        self.files = [single] if single.exists() else sorted(Path(folder).glob(SAFE_SHARDS))
        if not self.files:
            raise ModelError(f"{name!r} has no {SAFE_WEIGHTS}; give a folder of a checkpoint with weights")
        stored: dict[str, tuple[Path, str]] = {}
        for path in self.files:
            try:
                with open_regular(path), safe_open(path, "pt") as file:
                    stored |= {weight: (path, weight) for weight in file.keys()}
            except (OSError, SafetensorError) as error:
                raise unreadable(name, path.name, error) from None
        self.places = without_prefix(stored)

    def read(self, module: str) -> Tensor | None:
        """Return the weight of a linear, shape (out_features, in_features), or None if there is no matrix of this name."""
        if f"{module}.weight" not in self.places:
            return None
        path, weight = self.places[f"{module}.weight"]
        try:
            with safe_open(path, "pt") as file:  # opened for each weight, so that the pages of the last one are given back
                tensor: Tensor = file.get_tensor(weight)
        except (OSError, SafetensorError) as error:
            raise unreadable(self.name, path.name, error) from None
        return tensor if tensor.ndim == 2 and tensor.is_floating_point() and tensor.itemsize > 1 else None

    def sample(self, module: str, positions: Tensor) -> dict[str, Any] | None:
        """Return the values of a weight at positions of the flat matrix, with its dtype, or None if there is no matrix.

        It is the fingerprint of the weight (`lora.fingerprint.sample`). Only the rows of these positions are read.
        """
        if f"{module}.weight" not in self.places:
            return None
        path, weight = self.places[f"{module}.weight"]
        try:
            with safe_open(path, "pt") as file:
                part = file.get_slice(weight)
                shape = part.get_shape()
                if len(shape) != 2 or positions.max() >= shape[0] * shape[1]:
                    return None
                cells = [divmod(position, shape[1]) for position in positions.tolist()]
                values: list[Tensor] = [part[row : row + 1, column : column + 1].flatten() for row, column in cells]
        except (OSError, SafetensorError) as error:
            raise unreadable(self.name, path.name, error) from None
        dtype = str(values[0].dtype).removeprefix("torch.")
        return {"dtype": dtype, "values": [float(value.float()) for value in values]}


def open_local(name: str) -> WeightReader | None:
    """Return the weights of a base on this machine: a folder, or a hub name in the cache. Download nothing.

    Return None if a hub name is not in the cache. Raise ModelError if a folder does not exist, or has no weights.
    """
    folder = locate_base(name)
    if not folder:
        from lora_blip.models.hub import cached  # late: it imports transformers, which takes seconds

        folder = cached(name)
    return WeightReader(_converted(folder, name), name) if folder else None


def open_any(name: str) -> WeightReader:
    """Return the weights of a base. Download a hub name that is not in the cache. Raise ModelError if there is no such base."""
    folder = locate_base(name)
    if not folder:
        from lora_blip.models.hub import fetch

        folder = fetch(name)
    return WeightReader(_converted(folder, name), name)


def _converted(folder: str, name: str) -> str:
    """Return the folder, or that of its copy with safetensors if it has only `.bin` weights."""
    if (Path(folder) / SAFE_WEIGHTS).exists() or any(Path(folder).glob(SAFE_SHARDS)):
        return folder
    from lora_blip.models.bin_weights import with_safetensors

    return with_safetensors(folder, name)
