"""Write adapters in the format of peft, without peft.

peft has one update per linear, so the blocks of a fused linear become one update: their A are stacked, and B is zero outside of
the blocks. If the blocks have different scales, B contains their ratio.
"""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lora_blip.lora.formula import other_formula
from lora_blip.lora.header import HeaderError
from lora_blip.lora.peft_format import OWN
from lora_blip.lora.peft_names import PARTS, PREFIX
from lora_blip.lora.sites import Site
from lora_blip.runtime.untrusted import quoted

KEPT = ("task", "training", "merge_drift")  # parts of a header of lora_blip that peft has no field for
VERSION = "0.19.0"  # of peft, whose settings the written file has
BLOCKS = ("q", "k", "v")  # the thirds of a fused qkv, in their order


@dataclass(frozen=True)
class PeftUpdate:
    """The update of one linear, as peft has it: s · B A, with A (r, in) and B (out, r)."""

    module: str
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        return len(self.A)


def updates_of(
    sites: list[Site], tensors: dict[str, Tensor], weight_of: Callable[[str], Tensor | None] = lambda _: None
) -> list[PeftUpdate]:
    """Return one update for each linear, in the order of the sites.

    weight_of: returns the weight of a linear in the base, or None if the base is not there. It is needed for the magnitudes of
    rows that no block reaches, and for the number of rows of a block that is no third of a qkv. Raise HeaderError without it.
    """
    if problem := other_formula(sites[0].variant):
        raise HeaderError(f"it cannot be written for peft: {problem}")
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.module, []).append(site)
    return [_update(module, group, tensors, weight_of) for module, group in groups.items()]


def _update(
    module: str, sites: list[Site], tensors: dict[str, Tensor], weight_of: Callable[[str], Tensor | None]
) -> PeftUpdate:
    scale, dora = sites[0].scale, sites[0].variant == "dora"
    if len(sites) == 1 and sites[0].rows is None:
        A, B, magnitude = (tensors.get(f"{module}.{part}") for part in ("lora_A", "lora_B", "magnitude"))
        assert A is not None and B is not None
        return PeftUpdate(module, A, B, scale, magnitude)
    if dora:
        _refuse_overlap(module, sites)
    count = _row_count(module, sites, tensors, weight_of)
    A = torch.cat([tensors[f"{site.address}.lora_A"] for site in sites])
    B = torch.zeros(count, len(A))
    magnitude = _norms(module, weight_of) if dora else None
    column = 0
    for site in sites:
        start, stop = site.rows or (0, count)
        block = tensors[f"{site.address}.lora_B"]
        B[start:stop, column : column + site.r] = block if site.scale == scale else block * (site.scale / scale)
        column += site.r
        if magnitude is not None:
            magnitude[start:stop] = tensors[f"{site.address}.magnitude"]
    return PeftUpdate(module, A, B, scale, magnitude)


def _refuse_overlap(module: str, sites: list[Site]) -> None:
    """Raise HeaderError if two updates of DoRA reach the same row: peft has one magnitude for each row."""
    ranges = sorted(site.rows or (0, math.inf) for site in sites)
    if any(start < stop for (_, stop), (start, _) in pairwise(ranges)):
        raise HeaderError(
            f"it has two updates of DoRA for the same rows of {quoted(module)}, and peft has one; write the merged model "
            "instead: lora-blip export ADAPTER --output-dir FOLDER"
        )


def _row_count(module: str, sites: list[Site], tensors: dict[str, Tensor], weight_of: Callable[[str], Tensor | None]) -> int:
    """Return the number of output features of a linear with several updates."""
    if any(site.rows is None for site in sites):
        return len(tensors[f"{module}.lora_B"])
    weight = weight_of(module)
    if weight is not None:
        return len(weight)
    thirds = set()
    for site in sites:
        start, stop = site.rows or (0, 0)
        is_third = site.block in BLOCKS and start == BLOCKS.index(site.block) * (stop - start)
        thirds.add(3 * (stop - start) if is_third else 0)
    if len(thirds) != 1 or 0 in thirds:
        raise HeaderError(
            f"the blocks of {quoted(module)} are no thirds, so its number of rows is unknown; give the base: --model BASE"
        )
    return int(thirds.pop())


def _norms(module: str, weight_of: Callable[[str], Tensor | None]) -> Tensor:
    weight = weight_of(module)
    if weight is None:
        raise HeaderError(
            f"it has magnitudes for some rows of {quoted(module)}, and peft needs those of all rows. The others are norms of "
            "the base, which is not on this machine; give it: --model BASE"
        )
    norms: Tensor = weight.float().norm(dim=1)
    return norms


def written(
    metadata: dict[str, Any], sites: list[Site], updates: list[PeftUpdate]
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Return the tensors, the metadata of the safetensors, and the text of `adapter_config.json`."""
    tensors = {}
    for update in updates:
        tensors[f"{PREFIX}{update.module}.lora_A.weight"] = update.A.contiguous()
        tensors[f"{PREFIX}{update.module}.lora_B.weight"] = update.B.contiguous()
        if update.magnitude is not None:
            tensors[f"{PREFIX}{update.module}.lora_magnitude_vector"] = update.magnitude.contiguous()
    config = json.dumps(_config(metadata, sites[0].variant, updates), indent=2, ensure_ascii=True)
    return tensors, {"format": "pt", OWN: json.dumps(_own(metadata, updates))}, config + "\n"


def _own(metadata: dict[str, Any], updates: list[PeftUpdate]) -> dict[str, Any]:
    """Return a header with what peft has no field for. Its modules are those of peft, so that it is a valid header."""
    modules = {update.module: {"module": update.module, "r": update.r, "alpha": update.scale * update.r} for update in updates}
    return {
        "format_version": 1,
        "lora": {"modules": modules},
        "base": metadata["base"],
        "versions": metadata.get("versions", {}),
    } | {part: metadata.get(part, {}) for part in KEPT}


def _config(metadata: dict[str, Any], variant: str, updates: list[PeftUpdate]) -> dict[str, Any]:
    """Return `adapter_config.json` as an object. r and alpha are the most frequent ones, the others are in the patterns."""
    root = variant == "rslora"
    alphas = {u.module: _number(u.scale * (math.sqrt(u.r) if root else u.r)) for u in updates}
    (r, alpha), _ = Counter((u.r, alphas[u.module]) for u in updates).most_common(1)[0]
    name, _, revision = metadata["base"]["name"].partition("@")
    architecture = metadata["base"].get("architecture", "")
    family = "blip_2" if architecture.startswith("Blip2") else "blip"
    library = f"transformers.models.{family}.modeling_{family}"
    return {
        "peft_type": "LORA",
        "peft_version": VERSION,
        "task_type": None,
        "auto_mapping": {"base_model_class": architecture, "parent_library": library} if architecture else None,
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": metadata["lora"].get("dropout", 0.0),
        "use_rslora": root,
        "use_dora": variant == "dora",
        "target_modules": _targets([update.module for update in updates]),
        "rank_pattern": {u.module: u.r for u in updates if u.r != r},
        "alpha_pattern": {u.module: alphas[u.module] for u in updates if alphas[u.module] != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _targets(modules: list[str]) -> list[str] | str:
    """Return names, or a regex if a name may also be the end of another one, as it may in a model that is no BLIP."""
    if all(module.startswith(PARTS) for module in modules):
        return modules
    return "|".join(module.replace(".", r"\.") for module in modules)


def _number(value: float) -> float | int:
    """Return alpha as an int if it is one, up to the rounding of s · r, because peft's own alphas are ints."""
    nearest = round(value)
    return nearest if nearest and abs(value - nearest) <= 1e-12 * nearest else value
