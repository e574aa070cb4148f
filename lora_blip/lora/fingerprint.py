"""Fingerprints of a base: a few weights of some linears, to detect that an adapter is loaded on another base."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.lora.layer import AdapterStack, LoRA
from lora_blip.lora.sites import is_linear, is_quantized, tied

SAMPLES = 16  # sampled weights of each linear, evenly spaced
LARGEST = torch.finfo(torch.float32).max
MAY_DIFFER = ("_name_or_path", "transformers_version")  # settings that may differ for the same base
ROUNDING = 2.0**-8  # relative error of a weight rounded to bf16, the coarsest dtype


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value as JSON. Other objects are represented by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def settings_of(part: Any) -> dict[str, Any]:
    """Return the settings of a config or of an image processor, without its name and the version that wrote it."""
    return {name: value for name, value in part.to_dict().items() if name not in MAY_DIFFER}


def sampled(model: nn.Module, adapters: Iterable[LoRA]) -> list[str]:
    """Return the paths of the linears to sample: those with adapters, and the last linear of each child of the model.

    The second group shows whether the rest of the base is the same. A linear that shares its weight is not in it.
    """
    paths, shared = [lora.site.module for lora in adapters], tied(model)
    for part, child in model.named_children():
        inside = [f"{part}.{path}" for path, module in child.named_modules() if path and is_linear(module)]
        paths += [path for path in inside if path not in shared][-1:]
    return list(dict.fromkeys(paths))


def samples(model: nn.Module, adapters: Iterable[LoRA]) -> dict[str, dict[str, Any]]:
    """Return {path: fingerprint} of the sampled linears of a base."""
    return {path: sample(model.get_submodule(path)) for path in sampled(model, adapters)}


def sample(linear: Any) -> dict[str, Any]:
    """Return the fingerprint of a weight: SAMPLES of its values, evenly spaced, and its dtype; {} if it is quantized."""
    if is_quantized(linear):
        return {}
    stack = linear._modules.get("lora")
    merged = isinstance(stack, AdapterStack) and stack.original is not None
    weight: Tensor = stack.original if merged else linear.weight
    flat = weight.detach().flatten()
    positions = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return {"dtype": str(weight.dtype).removeprefix("torch."), "values": flat[positions.to(flat.device)].float().tolist()}


def same_weights(expected: dict[str, Any], actual: dict[str, Any]) -> bool:
    """Return True if two fingerprints are equal, or differ by one rounding if the dtypes differ.

    A quantized weight has no fingerprint ({}), and is equal to any.
    """
    if not expected or not actual:
        return True
    a, b = (torch.tensor(sample["values"], dtype=torch.float32) for sample in (expected, actual))
    if a.shape != b.shape:
        return False
    if expected["dtype"] == actual["dtype"]:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=ROUNDING, atol=1e-7)


def is_sample(entry: Any) -> bool:
    """Return True for a fingerprint of `sample`: {} for a quantized weight, else a dtype and up to SAMPLES numbers."""
    if entry == {}:
        return True
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("values"), list):
        return False
    values = entry["values"]
    return 1 <= len(values) <= SAMPLES and all(type(x) in (int, float) and -LARGEST <= x <= LARGEST for x in values)
