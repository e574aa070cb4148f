"""Fingerprints of a base: a few weights of each linear, to detect that an adapter is loaded on another base."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.lora.layer import AdapterStack, LoRA
from lora_blip.lora.sites import is_linear, is_quantized, modules_of, quantization, quantization_of, tied

SAMPLES = 16  # sampled weights of each linear, evenly spaced
LARGEST = torch.finfo(torch.float32).max
MAY_DIFFER = ("_name_or_path", "transformers_version")  # settings that may differ for the same base
ROUNDING = 2.0**-8  # relative error of a weight rounded to bf16, the coarsest dtype
RECORDED = "base_sample"  # attribute of a quantized linear: the fingerprint of its weight before it was quantized
HALF_STEP = {"int8": 0.57 / 127, "nf4": 0.16, "fp4": 0.17}  # largest rounding error, as a share of a block's largest weight


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value as JSON. Other objects are represented by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def settings_of(part: Any) -> dict[str, Any]:
    """Return the settings of a config or of an image processor, without its name and the version that wrote it."""
    return {name: value for name, value in part.to_dict().items() if name not in MAY_DIFFER}


def sampled(model: nn.Module, adapters: Iterable[LoRA]) -> list[str]:
    """Return the paths of the linears to sample: those with adapters, and all others that do not share their weight.

    The second group shows whether the rest of the base is the same. Earlier versions sampled fewer.
    """
    paths, shared = [lora.site.module for lora in adapters], tied(model)
    inside = [path for path, module in modules_of(model).items() if path and is_linear(module) and ".lora" not in path]
    return list(dict.fromkeys([*paths, *(path for path in inside if path not in shared)]))


def samples(
    model: nn.Module, adapters: Iterable[LoRA], earlier: dict[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return {path: fingerprint} of the sampled linears of a base.

    earlier: fingerprints from before the weights were cast. One is used if it still fits the weight: `bake` changes weights,
    but not those of a quantized linear.
    """
    result, earlier = {}, earlier or {}
    for path in sampled(model, adapters):
        linear, before = model.get_submodule(path), earlier.get(path)
        now = before if before and is_quantized(linear) else sample(linear)
        result[path] = before if before and same_weights(before, now) else now
    return result


def sample(linear: Any) -> dict[str, Any]:
    """Return the fingerprint of a weight: SAMPLES of its values, evenly spaced, and its dtype.

    For a weight of bitsandbytes, it is that of the weight before it was quantized. If the checkpoint contains only quantized
    weights, the values are the dequantized ones, with the largest error of each. Return {} for other quantized weights.
    """
    if recorded := vars(linear).get(RECORDED):
        return dict(recorded)
    if quantization_of(linear):
        return _dequantized_sample(linear)
    if is_quantized(linear):
        return {}
    stack = linear._modules.get("lora")
    merged = isinstance(stack, AdapterStack) and stack.original is not None
    weight: Tensor = stack.original if merged else linear.weight
    return sample_of(weight)


def sample_of(weight: Tensor) -> dict[str, Any]:
    """Return the fingerprint of a weight that is not quantized."""
    flat = weight.detach().flatten()
    values = flat[positions(flat.numel()).to(flat.device)].float().tolist()
    return {"dtype": str(weight.dtype).removeprefix("torch."), "values": values}


def positions(count: int) -> Tensor:
    """Return the positions of the sampled values in a weight with `count` values."""
    return torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()


def _dequantized_sample(linear: Any) -> dict[str, Any]:
    """Return the fingerprint of a weight of bitsandbytes whose original is not known."""
    from lora_blip.kernels.quantized import dequantized, int8_scale, largest  # late: it imports bitsandbytes

    W, kind = dequantized(linear).flatten(), quantization_of(linear)
    at = positions(W.numel()).to(W.device)
    is_int8 = kind == "int8"
    scales = int8_scale(linear) if is_int8 else largest(linear.weight.quant_state)
    block = linear.in_features if is_int8 else linear.weight.quant_state.blocksize
    errors = scales.float()[at // block] * HALF_STEP[kind]
    return {"dtype": kind, "values": W[at].tolist(), "error": errors.tolist()}


def same_weights(expected: dict[str, Any], actual: dict[str, Any]) -> bool:
    """Return True if two fingerprints are equal, or differ by one rounding if the dtypes differ.

    A fingerprint {} is equal to any: that of a quantized weight which is not of bitsandbytes.
    """
    if not expected or not actual:
        return True
    a, b = (torch.tensor(sample["values"], dtype=torch.float32) for sample in (expected, actual))
    if a.shape != b.shape:
        return False
    if expected["dtype"] == actual["dtype"]:
        return torch.equal(a, b)
    allowed = ROUNDING * b.abs() + 1e-7
    for each in (expected, actual):
        allowed += torch.tensor(each.get("error") or [0.0] * len(b), dtype=torch.float32)
    return bool(((a - b).abs() <= allowed).all())


def weights_dtype(model: nn.Module, adapters: Iterable[LoRA]) -> str:
    """Return "int8", "nf4" or "fp4" for a quantized base, else the dtype of the linears with adapters, such as "float32"."""
    weight = getattr(model.get_submodule(next(iter(adapters)).site.module), "weight", None)
    return quantization(model) or str(getattr(weight, "dtype", "unknown")).removeprefix("torch.")


def dtype_note(trained: str, model: nn.Module) -> str:
    """Return a note if the base of the training and this one are quantized in different ways, or only one is; else ""."""
    before, now = trained if trained in HALF_STEP else "", quantization(model)
    if before == now:
        return ""
    names = [f"in {kind}" if kind else "not quantized" for kind in (before, now)]
    return f"note: in training, the base was {names[0]}, and now it is {names[1]}, so texts may differ a little"


def is_sample(entry: Any) -> bool:
    """Return True for a fingerprint of `sample`: {}, or a dtype and up to SAMPLES numbers, which may have errors."""
    if entry == {}:
        return True
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str) or not isinstance(entry.get("values"), list):
        return False
    values, errors = entry["values"], entry.get("error", [])
    if not isinstance(errors, list) or len(errors) not in (0, len(values)):
        return False
    return 1 <= len(values) <= SAMPLES and all(type(x) in (int, float) and abs(x) <= LARGEST for x in (*values, *errors))
