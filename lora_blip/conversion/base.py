"""The weights of an adapter's base, and whether they are those of the training. torch is imported late."""

from typing import TYPE_CHECKING

from lora_blip.errors import AdapterError
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.runtime.untrusted import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from lora_blip.lora.adapter_file import Adapter
    from lora_blip.models.weight_reader import WeightReader


def open_base(base: str) -> "WeightReader | None":
    """Return the weights of a base on this machine, or None if they are not there."""
    from lora_blip.errors import ModelError
    from lora_blip.models.weight_reader import open_local

    try:
        return open_local(base)
    except ModelError:
        return None


def check_base(adapter: "Adapter", weights: "WeightReader") -> None:
    """Raise AdapterError if a part of the model is missing in a base, or if a weight or a shape is not that of the training."""
    parts = {place.partition(".")[0] for place in weights.places}
    for module in adapter.metadata["base"]["samples"]:
        if module.partition(".")[0] not in parts:
            raise _other_base(adapter, weights, f"{weights.name!r} has no linear {quoted(module)}")
        weight_of(adapter, module, weights)


def weight_of(adapter: "Adapter", module: str, weights: "WeightReader") -> "Tensor | None":
    """Return the weight of a linear, or None if the base has it under another name or quantized.

    Raise AdapterError if it is not the weight of the training.
    """
    from lora_blip.lora.fingerprint import same_weights, sample_of

    W = weights.read(module)
    if W is None:
        return None
    for site in (site for site in adapter.sites if site.module == module):
        A, B = (adapter.tensors[f"{site.address}.lora_{half}"] for half in "AB")
        start, stop = site.rows or (0, len(W))
        if A.shape[1] != W.shape[1] or len(B) != stop - start or stop > len(W):
            raise _other_base(
                adapter, weights, f"{quoted(module)} of {weights.name!r} is {tuple(W.shape)}, which does not fit the adapter"
            )
    if not same_weights(adapter.metadata["base"]["samples"].get(module, {}), sample_of(W)):
        raise _other_base(
            adapter, weights, f"the weights of {quoted(module)} in {weights.name!r} are not those of the training"
        )
    return W


def _other_base(adapter: "Adapter", weights: "WeightReader", problem: str) -> AdapterError:
    own = adapter.base if adapter.base not in ("", weights.name) else "BASE"
    return AdapterError(f"{adapter.path}: {problem}; give the base of the training: --model {quoted_for_shell(own)}")
