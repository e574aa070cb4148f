"""The tensors of an adapter file: their names, and the checks of their shapes and values."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.errors import AdapterError, LoRAError
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site
from lora_blip.lora.variants import CLASSES, EXTRA, is_rescaled
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import quoted

FLOAT32_MAX = torch.finfo(torch.float32).max


def parameters_of(address: str, lora: LoRA) -> dict[str, nn.Parameter]:
    """Return the parameters of the adapter of one linear, with their names in a file."""
    parameters = {f"{address}.lora_A": lora.A, f"{address}.lora_B": lora.B}
    return parameters | {f"{address}.{name}": getattr(lora, name) for name in EXTRA.get(lora.site.variant, ())}


def tensors_of(address: str, lora: LoRA) -> dict[str, Tensor]:
    """Return the tensors of a file for the adapter of one linear, in float32 on the CPU."""
    return {key: p.detach().float().cpu().contiguous() for key, p in parameters_of(address, lora).items()}


def names_of(site: Site) -> list[str]:
    """Return the names of the tensors of a site."""
    return [f"{site.address}.{part}" for part in ("lora_A", "lora_B", *EXTRA.get(site.variant, ()))]


def refuse_other_parameters(lora: LoRA) -> None:
    """Raise LoRAError if an adapter has a parameter or a buffer that a file would not contain, such as one that a user adds."""
    site, kind = lora.site, type(lora).__name__
    known = ("A", "B", *EXTRA.get(site.variant, ()))
    if others := tuple(name for name in lora.state_dict() if name not in known):
        fix = f"in lora_blip/lora/variants.py, set EXTRA = {EXTRA | {site.variant: (*known[2:], *others)}}"
        if not all(name in lora._parameters for name in others):  # a buffer, or a parameter of a child
            fix = f"keep the values in an nn.Parameter of {kind} itself: self.NAME = nn.Parameter(…)"
        raise LoRAError(f"{kind} has {' and '.join(others)}, which an adapter file would not contain; {fix}")


def refuse_unknown(name: str, lora: LoRA) -> None:
    """Raise AdapterError if a file cannot contain what an adapter computes: it is of an own class, or has another scale."""
    if type(lora) is not CLASSES[lora.site.variant]:
        kind = type(lora).__name__
        fix = "add the class to lora_blip/lora/variants.py, as CONTRIBUTING.md shows"
        raise AdapterError(f"adapter {name!r} is of the class {kind}, and a file has only {', '.join(CLASSES)}; {fix}")
    if is_rescaled(lora):
        fix = "load it without, or write it from its run: lora-blip blend RUN=0.5 --output-dir scaled"
        raise AdapterError(f"adapter {name!r} was loaded with another scale, which a file cannot contain; {fix}")
    refuse_other_parameters(lora)


def check_keys(path: Path, sites: list[Site], file: Any) -> None:
    """Raise AdapterError if the file does not have exactly the tensors, shapes and dtypes of its header."""
    expected = {key: site for site in sites for key in names_of(site)}
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
        if key.endswith(".magnitude"):
            _check_magnitude(path, key, tensor, file.get_slice(f"{site.address}.lora_B").get_shape()[0])
        if not key.endswith((".lora_A", ".lora_B")):
            continue
        shape, dtype, is_b = tensor.get_shape(), tensor.get_dtype(), key.endswith("B")  # shape[is_b] is r: A (r, …), B (…, r)
        rows = site.rows[1] - site.rows[0] if site.rows and is_b else None
        if len(shape) != 2 or shape[is_b] != site.r or dtype != "F32" or 0 in shape or (rows and shape[0] != rows):
            needed = f"r={site.r} in float32" + (f" for {counted(rows, 'row')}" if rows else "")
            raise AdapterError(
                f"{path}: {quoted(key)} is {quoted(tuple(shape))} {dtype}, but its header says {needed}; copy the file again"
            )


def _check_magnitude(path: Path, key: str, tensor: Any, rows: int) -> None:
    """Raise AdapterError if the magnitude of DoRA does not have a float32 for each row of B."""
    if tensor.get_shape() != [rows] or tensor.get_dtype() != "F32":
        actual = f"{quoted(tuple(tensor.get_shape()))} {tensor.get_dtype()}"
        raise AdapterError(f"{path}: {quoted(key)} is {actual}, but lora_B has {counted(rows, 'row')}; copy the file again")


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
