"""Names of weights that differ between a checkpoint and its model: prefixes, shared weights, missing and unused weights.

A training program may save a model inside a wrapper, so that each name begins with a prefix, such as "module.".
"""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lora_blip.errors import ModelError
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import PointerError, printable, quoted

ANCHOR = "vision_model.embeddings.class_embedding"  # a weight of every BLIP and BLIP-2
SAFE_WEIGHTS, SAFE_INDEX, SAFE_SHARDS = "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"
HEAD = "text_decoder.cls.predictions"
SHARED = {f"{HEAD}.decoder.bias": f"{HEAD}.bias", f"{HEAD}.bias": f"{HEAD}.decoder.bias"}  # one bias before transformers 5
HEADS = (f"{HEAD}.decoder.weight", "language_model.lm_head.weight")
SHOWN = 3  # names in a message
Value = TypeVar("Value")


def prefix_of(names: Iterable[str]) -> str:
    """Return the prefix of a checkpoint's names, such as "module." (DistributedDataParallel), or "" if there is none."""
    prefixes = {name.removesuffix(ANCHOR) for name in names if name.endswith(f".{ANCHOR}")}
    return prefixes.pop() if len(prefixes) == 1 else ""


def without_prefix(weights: Mapping[str, Value]) -> dict[str, Value]:
    """Return {name without the prefix of `prefix_of`: value}. A name without the prefix stays as it is."""
    prefix = prefix_of(weights)
    return {name.removeprefix(prefix): value for name, value in weights.items()}


def check_names(model: Any, missing: Iterable[str], unused: Iterable[str], name: str, prefix: str) -> None:
    """Raise ModelError if the checkpoint lacks weights of the model. Print one line for each other difference.

    missing, unused: the names that transformers reports. prefix: what was removed from each name.
    """
    absent = {key for key in missing if not key.endswith("position_ids")}  # a constant, which older versions saved
    shared = {key for key in absent if SHARED.get(key) in model.state_dict() and SHARED[key] not in absent}
    for key in shared:
        model.get_parameter(key).data.copy_(model.get_parameter(SHARED[key]).data)
    kind, absent = type(model).__name__, absent - shared
    if absent:
        fix = "It is a checkpoint for another task, or its download is incomplete: download it again, or give another one"
        if absent <= set(HEADS):
            fix = 'If the head has the weight of the embeddings, set "tie_word_embeddings": true in its config.json'
        raise ModelError(f"{name!r} lacks {listed(absent)} of {kind}, which would be random. {fix}")
    if prefix:
        print(printable(f"{name!r}: the names of its weights begin with {quoted(prefix)}, which is removed"))
    if shared:
        print(f"{name!r}: its head has one bias, as in older versions of transformers; {min(shared)} is a copy of it")
    extra = {key for key in unused if not key.endswith("position_ids")}
    if extra:
        print(printable(f"{name!r}: {listed(extra)} {'is' if len(extra) == 1 else 'are'} not part of {kind} and not used"))


def listed(names: Iterable[str]) -> str:
    """Return the number of weights and the first names, such as "2 weights (a, b)"."""
    ordered = sorted(names)
    more = ", …" if len(ordered) > SHOWN else ""
    return f"{counted(len(ordered), 'weight')} ({', '.join(ordered[:SHOWN])}{more})"


def unreadable(base: str, file_name: str, error: Exception) -> ModelError:
    """Return the error for a file of weights that cannot be read. base: the name of the base in messages."""
    reason = str(error) if isinstance(error, PointerError) else f"{quoted(str(error))}; download the checkpoint again"
    return ModelError(f"the weights of {base!r} cannot be loaded: {quoted(file_name)}: {reason}")
