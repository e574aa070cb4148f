"""Measure each module of an adapter, with the weights of its base if there are any, and compare two adapters."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lora_blip.errors import AdapterError, ModelError
from lora_blip.lora import spectrum
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.fingerprint import same_weights, sample_of
from lora_blip.lora.intruders import count_intruders
from lora_blip.lora.sites import Site
from lora_blip.lora.targets import PARTS
from lora_blip.models.weight_reader import WeightReader, open_any, open_local
from lora_blip.reports.inspection import ModuleView, PairView
from lora_blip.runtime.progress import track
from lora_blip.runtime.untrusted import quoted

NUMBERED = re.compile(r"(.*?\.(?:layers?|block))\.(\d+)\.(.+)")
LEFT_OUT = "‖ΔW‖ / ‖W‖, intruder dimensions and the amplification, which need it, are left out"
MOST_THREADS = 4  # each needs about 100 MB for a weight of 4096 × 1024
MOST_DIRECTIONS = 64  # of an adapter, in a heat map


def base_of(adapter: Adapter, model: str) -> tuple[WeightReader | None, str]:
    """Return the weights of the base, or None and a note that says what is left out.

    model: the setting MODEL. A base that the user names is an error if it cannot be read, and is downloaded if necessary.
    """
    if model == "none":
        return (
            None,
            "The base was not read (--model none), so ‖ΔW‖ / ‖W‖, intruder dimensions and the amplification are left out.",
        )
    if model:
        return open_any(model), ""
    try:
        weights, reason = open_local(adapter.base), "it is not on this machine"
    except ModelError as error:
        weights, reason = None, str(error).splitlines()[0]
    if weights:
        return weights, ""
    return None, f"The base {adapter.base!r} was not read ({reason}), so {LEFT_OUT}. To read it: --model FOLDER_OR_HUB_NAME"


def measure(adapter: Adapter, weights: WeightReader | None) -> list[ModuleView]:
    """Return the measures of each module of an adapter, in the order of the file.

    Raise AdapterError if a module is missing in the base, or has other weights than the base of the training.
    """
    sites, threads = adapter.sites, torch.get_num_threads()
    try:  # a thread per module is faster than many threads in each of its small products
        with ThreadPoolExecutor(min(threads, MOST_THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            views = pool.map(lambda site: _measure(adapter, site, _weight(adapter, site, weights) if weights else None), sites)
            return list(track(views, "inspect", len(sites), "module", delay=2.0))
    finally:
        torch.set_num_threads(threads)


def _measure(adapter: Adapter, site: Site, weight: Tensor | None) -> ModuleView:
    A, B = halves(adapter, site)
    values = spectrum.delta_spectrum(A, B, site.scale)
    is_dora = site.variant == "dora"
    g, update = dora_change(adapter, site, weight) if is_dora and weight is not None else (None, values)
    layer = NUMBERED.fullmatch(site.address)
    return ModuleView(
        address=site.address,
        part=next((part for part, prefix in PARTS.items() if re.match(prefix, site.address)), "other"),
        group=layer[1] if layer else "outside of the layers",
        layer=int(layer[2]) if layer else 0,
        kind=layer[3] if layer else site.address,
        r=site.r,
        alpha=site.alpha,
        shape=(len(B), A.shape[1]),
        singular_values=values.tolist(),
        effective_rank=spectrum.effective_rank(values),
        norm=spectrum.frobenius_norm(update),
        relative_norm=None if weight is None else spectrum.relative_norm(update, weight),
        intruders=None if weight is None else count_intruders(weight, A, B * site.scale, g),
        amplification=None if weight is None else spectrum.amplification_factor(weight, A, B, site.scale),
        magnitudes=len(B) * is_dora,
    )


def dora_change(adapter: Adapter, site: Site, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factor g = m / ‖W + ΔW‖ of each row, and W' − W = g ⊙ (W + ΔW) − W of DoRA, in float64.

    weight: the rows of W that the update reaches.
    """
    A, B = halves(adapter, site)
    W = weight.double()
    changed = W + site.scale * B.double() @ A.double()
    norm = changed.norm(dim=1)
    g = adapter.tensors[f"{site.address}.magnitude"].double() / norm.where(norm > 0, 1)
    return g, g[:, None] * changed - W


def halves(adapter: Adapter, site: Site) -> tuple[Tensor, Tensor]:
    """Return A (r, in_features) and B (rows, r) of a site."""
    return adapter.tensors[f"{site.address}.lora_A"], adapter.tensors[f"{site.address}.lora_B"]


def _weight(adapter: Adapter, site: Site, weights: WeightReader) -> Tensor | None:
    """Return the rows of W that the update reaches, or None if the weight is quantized."""
    A, B = halves(adapter, site)
    W = weights.read(site.module)
    if W is None and f"{site.module}.weight" in weights.places:
        return None
    fix = f"the adapter was trained on {quoted(adapter.base)}; give that base (--model), or --model none"
    if W is None:
        raise AdapterError(f"{adapter.path}: {weights.name!r} has no linear {quoted(site.module)}; {fix}")
    start, stop = site.rows or (0, len(W))
    if W.shape[1] != A.shape[1] or stop > len(W) or stop - start != len(B):
        shapes = f"{tuple(W.shape)}, and the update is {len(B)} × {A.shape[1]}"
        raise AdapterError(f"{adapter.path}: {quoted(site.module)} of {weights.name!r} is {shapes}; {fix}")
    if not same_weights(adapter.metadata["base"]["samples"].get(site.module, {}), sample_of(W)):
        raise AdapterError(
            f"{adapter.path}: the weights of {quoted(site.module)} in {weights.name!r} are not those of the training; {fix}"
        )
    return W[start:stop]


def compare(first: Adapter, second: Adapter) -> tuple[list[PairView], list[str]]:
    """Return the subspace similarity of each module that both adapters have, and lines about the other modules."""
    others, pairs, alone = {site.address: site for site in second.sites}, list[PairView](), list[str]()
    for site in first.sites:
        if site.address not in others:
            alone.append(f"{site.address}: only in the first adapter")
            continue
        A, other = halves(first, site)[0], halves(second, others.pop(site.address))[0]
        if A.shape[1] != other.shape[1]:
            alone.append(f"{site.address}: {A.shape[1]} and {other.shape[1]} input features")
            continue
        phi = spectrum.subspace_similarity(A, other)[:MOST_DIRECTIONS, :MOST_DIRECTIONS]
        first_directions, all_directions = _summary(phi)
        chance = max(phi.shape) / A.shape[1]
        pairs.append(PairView(site.address, len(phi), phi.shape[1], _bytes(phi), first_directions, all_directions, chance))
    return pairs, alone + [f"{address}: only in the second adapter" for address in others]


def _bytes(phi: Tensor) -> str:
    """Return the similarities, from 0 to 1, as bytes from 0 to 255, row by row, in base64."""
    return base64.b64encode((phi.clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def _summary(phi: Tensor) -> tuple[float, float]:
    """Return φ of the strongest directions, and of all. An A of zeros has no direction, and 0."""
    return (float(phi[0, 0]), float(phi[-1, -1])) if phi.numel() else (0.0, 0.0)
