"""Write the adapters into the weights, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_blip.errors import LoRAError
from lora_blip.lora import attached
from lora_blip.lora.attached import (
    Loaded,
    adapted_linears,
    check_names,
    check_unheld,
    clear_if_bare,
    detach,
    model_of,
    share_routing,
)
from lora_blip.lora.layer import AdapterStack, LoRA
from lora_blip.lora.mergeable import check_mergeable, check_stored
from lora_blip.lora.model_lock import changing
from lora_blip.lora.sites import name_of
from lora_blip.lora.variants import FUSED, change_of, original_of


def merge(model: nn.Module | Loaded, *names: str) -> None:
    """Replace W by W + Σ ΔW of the named adapters. Without names, merge all adapters that belong to no `Captioner`.

    Merging the same adapters again changes nothing. Merging another one adds it to those that are merged. The sum is computed
    in float32. The original W is kept for `restore`, and every merge starts from it, not from a merged weight. If a merge
    fails, for example because memory runs out, every weight is put back.

    Raise LoRAError if there is no adapter to merge, for an unknown name, and for an adapter of a `Captioner`. Raise it too if a
    weight cannot be changed (see `mergeable`), if the sum is not finite, and while a thread or task is inside `use_adapters` or
    `disable_adapters`. In peft: `merge_adapter`.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> lora_blip.merge(backbone)
    """
    model = model_of(model, next(iter(names), None), 'lora_blip.merge(backbone, "default")')
    if len(names) == 1 and isinstance(names[0], list | tuple):
        raise LoRAError(f"merge takes names, not a list; call lora_blip.merge(backbone, {', '.join(map(repr, names[0]))})")
    with writing(model) as hooked:
        check_names(model, names)
        check_unheld(model, *names)
        chosen = names or set(attached.names(model)) - share_routing(model).dormant
        keys = {p: m.lora.merged | {k for k in m.lora if name_of(k) in chosen} for p, m in hooked.items()}
        keys = {path: own for path, own in keys.items() if own}
        _require_adapters(model, keys)
        check_mergeable(model, keys)
        fold_all(hooked, keys)


def restore(model: nn.Module | Loaded) -> None:
    """Undo `merge`. The weights are `torch.equal` to the originals, and the hooks add the updates again.

    Without merged adapters, nothing changes. In peft: `unmerge_adapter`, which subtracts the update and so rounds.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> lora_blip.merge(backbone)
    >>> lora_blip.restore(backbone)
    """
    model = model_of(model)
    with changing(model), share_routing(model).lock:
        merged = {path: linear for path, linear in adapted_linears(model).items() if linear.lora.merged}
        for path, linear in merged.items():
            check_stored(path, linear)
        for linear in merged.values():
            write_back(linear)


def bake(model: nn.Module | Loaded) -> None:
    """Merge all adapters and remove them, with their hooks and the original weights. The model is then a plain one.

    The adapters of a `Captioner` are removed without a merge. The captioner then raises LoRAError if it is used.
    The originals are kept in the CPU's memory until the last weight is written. If a merge fails, every weight is put back.
    Raise LoRAError as `merge` does. In peft: `merge_and_unload`.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> lora_blip.bake(backbone)
    """
    model = model_of(model)
    with writing(model) as hooked:
        dormant = share_routing(model).dormant
        keys = {path: frozenset(k for k in linear.lora if name_of(k) not in dormant) for path, linear in hooked.items()}
        keys = {path: own for path, own in keys.items() if own}
        _require_adapters(model, keys)
        check_mergeable(model, keys)
        fold_all(hooked, keys, torch.device("cpu"))
        for linear in hooked.values():
            detach(linear)
        clear_if_bare(model)


def _require_adapters(model: nn.Module, keys: dict[str, frozenset[str]]) -> None:
    """Raise LoRAError if no adapter would be merged: the caller has probably forgotten to load one."""
    if not keys:
        held = ", ".join(attached.names(model))
        reason = f"; those of a Captioner are not merged: {held}" if held else ""
        raise LoRAError(f'the model has no adapter to merge{reason}; first call lora_blip.load_adapter(backbone, "latest")')


@contextmanager
def writing(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Hold the model's lock, and prevent entry into `use_adapters` and `disable_adapters`. Raise LoRAError inside a block."""
    with changing(model), (routing := share_routing(model)).lock:
        if routing.blocks:
            raise LoRAError(
                "a block of `use_adapters` or `disable_adapters` is active, here or in another thread or task, and a merged "
                "adapter acts on every row; leave that block first"
            )
        yield adapted_linears(model)


def fold_all(hooked: dict[str, Any], keys: dict[str, frozenset[str]], keep_on: torch.device | None = None) -> None:
    """Merge adapters. `keys`: {path of a linear: keys in its stack}. If one merge fails, put every weight back."""
    before = {path: hooked[path].lora.merged for path in keys}
    try:
        for path, chosen in keys.items():
            fold(path, hooked[path], chosen, keep_on)
    except BaseException:
        for path, earlier in before.items():
            fold(path, hooked[path], earlier) if earlier else write_back(hooked[path])
        raise


@torch.no_grad()
def fold(path: str, linear: Any, keys: frozenset[str], keep_on: torch.device | None = None) -> None:
    """Write original + Σ ΔW of `keys` into the weight. Keep the original on `keep_on`, by default the weight's device.

    Raise LoRAError if the sum is not finite in the weight's dtype.
    """
    stack: AdapterStack = linear.lora
    if adds_in_place(linear, keys):
        add_in_place(linear, cast(LoRA, stack[min(keys)]), keep_on)
        merged = linear.weight
    else:
        merged = summed(linear, keys).to(linear.weight.dtype)
    if not is_finite(merged):
        name, largest = str(merged.dtype).removeprefix("torch."), torch.finfo(merged.dtype).max
        raise LoRAError(
            f"{path!r} would be NaN or beyond the largest {name}, {largest:g}, when merged; nothing was changed. Use the "
            "adapter unmerged, load the base in bf16 or fp32, or train with a lower lr"
        )
    if merged is not linear.weight:
        keep_original(linear, keep_on)
        linear.weight.copy_(merged)
    stack.merged = frozenset(keys)


def keep_original(linear: Any, keep_on: torch.device | None) -> None:
    """Copy W to `linear.lora.original` before the first merge."""
    if linear.lora.original is None:
        linear.lora.original = linear.weight.detach().to(device=keep_on, copy=True)


def adds_in_place(linear: Any, keys: frozenset[str]) -> bool:
    """Return True if W + ΔW is one float32 sum, which `add_in_place` computes without a copy of W."""
    loras = [linear.lora[key] for key in keys]
    return len(loras) == 1 and type(loras[0]) in FUSED and linear.weight.dtype == loras[0].A.dtype == torch.float32


def add_in_place(linear: Any, lora: LoRA, keep_on: torch.device | None) -> None:
    """Write original + ΔW into W, and keep the original. `fold_all` puts it back if the result is not finite."""
    if linear.lora.original is None:
        keep_original(linear, keep_on)
    else:
        linear.weight.copy_(linear.lora.original)
    linear.weight.add_(lora.delta_weight())


def is_finite(values: Tensor) -> bool:
    """Return True if no value is NaN or infinite. `aminmax` needs no other matrix of this size, as `isfinite` does."""
    return not values.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


@torch.no_grad()
def summed(linear: Any, keys: frozenset[str]) -> Tensor:
    """Return W + Σ ΔW over the adapters `keys`, in float32 or wider, from the original W. For DoRA, ΔW is W' − W."""
    stack = linear.lora
    start = original_of(linear)
    wide = torch.promote_types(start.dtype, torch.float32)
    original = start.to(wide)
    total: Tensor = original.clone()
    for key in sorted(keys):
        total += change_of(stack[key], original)
    return total


@torch.no_grad()
def write_back(linear: Any) -> None:
    """Put the original weight back, if an adapter is merged."""
    if linear.lora.original is not None:
        linear.weight.copy_(linear.lora.original)
    linear.lora.original, linear.lora.merged = None, frozenset()
