"""The tensors of an adapter file: their names, and the checks of their shapes and values."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_blip.errors import AdapterError
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site
from lora_blip.runtime.untrusted import quoted

FLOAT32_MAX = torch.finfo(torch.float32).max


def tensors_of(address: str, lora: LoRA) -> dict[str, Tensor]:
    """Return the tensors of the adapter of one linear, in float32 on the CPU, with their names in a file."""
    halves = {f"{address}.lora_A": lora.A, f"{address}.lora_B": lora.B}
    return {key: half.detach().float().cpu().contiguous() for key, half in halves.items()}


def check_keys(path: Path, sites: list[Site], file: Any) -> None:
    """Raise AdapterError if the file does not have exactly the tensors, shapes and dtypes of its header."""
    expected = {f"{site.address}.lora_{half}": site for site in sites for half in "AB"}
    names = set(file.keys())
    missing, extra = sorted(expected.keys() - names), sorted(names - expected.keys())
    if missing:
        raise AdapterError(
            f"{path} is incomplete: {quoted(missing[0])} is missing ({len(missing)} of {len(expected)} tensors are missing); "
            "copy the file again, or train the adapter again"
        )
    if extra:
        raise AdapterError(
            f"{path}: {quoted(extra[0])} belongs to no module of its header ({len(extra)} such tensors); copy the file again"
        )
    for key, site in expected.items():
        tensor = file.get_slice(key)
        shape, dtype, is_b = tensor.get_shape(), tensor.get_dtype(), key.endswith("B")  # shape[is_b] is r: A (r, …), B (…, r)
        rows = site.rows[1] - site.rows[0] if site.rows and is_b else None
        if len(shape) != 2 or shape[is_b] != site.r or dtype != "F32" or 0 in shape or (rows and shape[0] != rows):
            needed = f"r={site.r} in float32" + f" for {rows} rows" * bool(rows)
            raise AdapterError(
                f"{path}: {quoted(key)} is {quoted(tuple(shape))} {dtype}, but its header says {needed}; copy the file again"
            )


def check_values(path: Path, tensors: dict[str, Tensor], sites: list[Site]) -> None:
    """Raise AdapterError if a value or a bound of |ΔW| is not finite, or if every B is zero."""
    largest = {key: max(map(abs, torch.stack(tensor.aminmax()).tolist())) for key, tensor in tensors.items()}  # or NaN
    for key, value in largest.items():
        if not math.isfinite(value):
            raise AdapterError(
                f"{path}: {quoted(key)} contains NaN or infinity: the training diverged. Use a lower lr, or bf16 or fp32"
            )
    for site in sites:  # each |ΔW| is at most s · r · max |A| · max |B|
        if not site.scale * site.r * largest[f"{site.address}.lora_A"] * largest[f"{site.address}.lora_B"] < FLOAT32_MAX:
            raise AdapterError(f"{path}: the update of {quoted(site.address)} overflows float32; train again with a lower lr")
    if not any(value for key, value in largest.items() if key.endswith(".lora_B")):
        raise AdapterError(f"{path}: every lora_B is zero, so the adapter has no effect; train it before it is saved")
