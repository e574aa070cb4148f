"""Blend adapters of one base into one: its update is Σ wᵢ ΔWᵢ.

Exactly, by stacked ranks: with sᵢ, Aᵢ and Bᵢ of each adapter, B = [w₁ s₁ B₁, w₂ s₂ B₂, …] and A = [A₁; A₂; …], and B A is the
sum. Its rank is the sum of the ranks. Or with a chosen rank r, by the largest r singular values: the best approximation of that
rank in the Frobenius norm (Eckart and Young 1936).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from lora_blip.errors import AdapterError
from lora_blip.lora.adapter_file import Adapter, digest, write
from lora_blip.lora.adapter_tensors import check_values
from lora_blip.lora.fingerprint import same_weights
from lora_blip.lora.formula import other_formula
from lora_blip.lora.header import entry_of, version_of
from lora_blip.lora.sites import MOST_RANK, Site
from lora_blip.lora.spectrum import delta_svd
from lora_blip.runtime.untrusted import quoted
from lora_blip.version import __version__

CANCELLED = 1e-6  # a sum whose norm is below this share of the largest possible one is rounding error


@dataclass(frozen=True)
class WeightedUpdate:
    """ΔW = B A of a site, in float64. The scale and the weight of the adapter are in B."""

    site: Site
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Blend:
    """A blend of adapters. errors: {address: (‖ΔW − ΔWᵣ‖, ‖ΔW‖)}; the first is 0 if the blend is exact."""

    updates: list[WeightedUpdate]
    errors: dict[str, tuple[float, float]]
    metadata: dict[str, Any]

    @property
    def relative_error(self) -> float:
        """Return ‖ΔW − ΔWᵣ‖ / ‖ΔW‖ over all modules."""
        error, norm = (torch.tensor([pair[part] for pair in self.errors.values()]).norm().item() for part in (0, 1))
        return error / norm if norm else 0.0


def blend(adapters: Sequence[Adapter], weights: Sequence[float], r: int = 0) -> Blend:
    """Return the blend Σ wᵢ ΔWᵢ of adapters. r: the rank of each module; 0: exact, with the sum of the ranks.

    A module that only some adapters have gets the sum of these. Raise AdapterError if the adapters have different bases, image
    sizes or tasks, or if one is DoRA, whose change of a weight is no product B A.
    """
    for adapter in adapters:
        check_blendable(adapters[0], adapter)
    every = [_updates(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    whole = {update.site.module: len(update.B) for updates in every for update in updates if not update.site.block}
    grouped: dict[str, list[WeightedUpdate]] = {}
    for update in (_widened(update, whole) for updates in every for update in updates):
        grouped.setdefault(update.site.address, []).append(update)
    results, errors = list[WeightedUpdate](), dict[str, tuple[float, float]]()
    for address, updates in grouped.items():
        _check_rows(adapters[0], updates)
        A, B = torch.cat([update.A for update in updates]), torch.cat([update.B for update in updates], 1)
        A, B, errors[address] = truncated(A, B, r) if r else (A, B, (0.0, float(delta_svd(A, B)[1].norm())))
        if len(A) > MOST_RANK:
            raise AdapterError(
                f"the rank of {quoted(address)} would be {len(A):,}, above {MOST_RANK:,}; give a smaller one: --r 64"
            )
        first = updates[0].site
        site = Site(first.module, len(A), float(len(A)), first.block, first.rows)  # alpha = r: the scale is 1
        results.append(WeightedUpdate(site, A, B))
    largest = sum(float(update.A.norm() * update.B.norm()) for updates in grouped.values() for update in updates)
    if sum(norm for _, norm in errors.values()) <= CANCELLED * largest:
        raise AdapterError("the weighted sum of the adapters is zero; give other weights")
    return Blend(results, errors, _metadata(adapters, weights, r))


def truncated(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Return A and B of the best approximation of rank r to ΔW = B A, and (‖ΔW − ΔWᵣ‖, ‖ΔW‖) in the Frobenius norm."""
    U, S, Vh = delta_svd(A, B)
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root, (float(S[r:].norm()), float(S.norm()))


def save(path: Path, blended: Blend) -> Path:
    """Write a blend as an adapter file, and return its path. Raise AdapterError if it is zero or not finite."""
    tensors = {
        f"{update.site.address}.lora_{half}": getattr(update, half).float().contiguous()
        for update in blended.updates
        for half in "AB"
    }
    check_values(path, tensors, [update.site for update in blended.updates])
    modules = {update.site.address: entry_of(update.site) for update in blended.updates}
    metadata = {
        "format_version": version_of("lora"),
        "sha256": digest(tensors),
        "lora": {"dropout": 0.0, "modules": modules},
        **blended.metadata,
        "versions": {"lora_blip": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    write(path, tensors, metadata)
    return path


# ---------------------------------------------------------------- checks


def check_blendable(first: Adapter, other: Adapter) -> None:
    """Raise AdapterError if two adapters cannot be blended."""
    if other.variant == "dora":
        raise AdapterError(
            f"{other.path} is DoRA, which also scales the rows of each weight, so its change is no product B A of a low rank. "
            'Blend adapters of VARIANT = "lora" or "rslora"'
        )
    if problem := other_formula(other.variant):
        raise AdapterError(f"{other.path} cannot be blended: {problem}")
    facts: list[tuple[str, object, object]] = [
        ("task", quoted(first.task.get("name", "")), quoted(other.task.get("name", ""))),
        ("image size", first.image_size or other.image_size, other.image_size or first.image_size),
    ]
    for fact, one, two in facts:
        if one != two:
            raise AdapterError(f"{first.path} has the {fact} {one}, and {other.path} has {two}; blend adapters of one {fact}")
    mine, theirs = (adapter.metadata["base"]["samples"] for adapter in (first, other))
    for module in mine.keys() & theirs.keys():
        if not same_weights(mine[module], theirs[module]):
            raise AdapterError(
                f"{first.path} and {other.path} were trained on different bases, {quoted(first.base)} and "
                f"{quoted(other.base)}: the weights of {quoted(module)} differ. Blend adapters of one base"
            )


def _check_rows(first: Adapter, updates: Iterable[WeightedUpdate]) -> None:
    """Raise AdapterError if the updates of one address have different rows or columns."""
    shapes = {(len(update.B), update.A.shape[1], update.site.rows) for update in updates}
    if len(shapes) > 1:
        address = next(iter(updates)).site.address
        raise AdapterError(f"{first.path}: {quoted(address)} has another shape in another adapter; blend adapters of one base")


# ---------------------------------------------------------------- parts


def _updates(adapter: Adapter, weight: float) -> list[WeightedUpdate]:
    """Return the updates of an adapter, multiplied by its weight."""
    updates = []
    for site in adapter.sites:
        A, B = (adapter.tensors[f"{site.address}.lora_{half}"].double() for half in "AB")
        updates.append(WeightedUpdate(site, A, B * (weight * site.scale)))
    return updates


def _widened(update: WeightedUpdate, whole: dict[str, int]) -> WeightedUpdate:
    """Return the update of a block of rows as one of all rows, if another adapter updates all rows of this linear."""
    site = update.site
    if not site.rows or site.module not in whole:
        return update
    start, stop = site.rows
    if stop > whole[site.module]:
        raise AdapterError(f"{quoted(site.address)} has rows that another adapter does not have; blend adapters of one base")
    return WeightedUpdate(
        Site(site.module, site.r, site.alpha), update.A, F.pad(update.B, (0, 0, start, whole[site.module] - stop))
    )


def _metadata(adapters: Sequence[Adapter], weights: Sequence[float], r: int) -> dict[str, Any]:
    """Return the entries of the header that do not depend on the tensors: those of the first adapter, and the sources."""
    first = adapters[0].metadata
    samples = {
        module: sample for adapter in reversed(adapters) for module, sample in adapter.metadata["base"]["samples"].items()
    }
    sources = [
        {"adapter": str(adapter.path), "weight": weight, "sha256": digest(adapter.tensors)}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    return {
        "base": first["base"] | {"samples": samples},
        "task": first["task"],
        "training": {"blend": {"sources": sources, "r": r}},
        "merge_drift": {},
    }
