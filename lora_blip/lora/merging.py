"""Write the adapters into the weights, and back."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_blip.errors import LoRAError
from lora_blip.lora import attached
from lora_blip.lora.attached import (
    BAKED,
    Loaded,
    adapted_linears,
    check_names,
    check_unheld,
    clear_if_bare,
    detach,
    has_adapters,
    model_of,
    refuse_baked,
    share_routing,
)
from lora_blip.lora.fused import is_product
from lora_blip.lora.layer import AdapterStack, LoRA
from lora_blip.lora.mergeable import check_mergeable, check_stored, largest_of
from lora_blip.lora.model_lock import changing
from lora_blip.lora.sites import name_of
from lora_blip.lora.variants import change_of, original_of

BLOCK = 2**18  # elements of ΔW that a merge in place computes at a time


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

    def change(hooked: dict[str, Any]) -> None:
        check_names(model, names)
        check_unheld(model, *names)
        chosen = names or set(attached.names(model)) - share_routing(model).dormant
        keys = {p: m.lora.merged | {k for k in m.lora if name_of(k) in chosen} for p, m in hooked.items()}
        keys = {path: own for path, own in keys.items() if own}
        _require_adapters(model, keys)
        check_mergeable(model, keys)
        fold_all(hooked, keys)

    writing(model, change)


def restore(model: nn.Module | Loaded) -> None:
    """Undo `merge`. The weights are `torch.equal` to the originals, and the hooks add the updates again.

    Without merged adapters, nothing changes. Raise LoRAError after `bake`, which keeps no originals.
    In peft: `unmerge_adapter`, which subtracts the update and so rounds.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> lora_blip.merge(backbone)
    >>> lora_blip.restore(backbone)
    """
    model = model_of(model)

    def change() -> None:
        with share_routing(model).lock:
            changed = {path: linear for path, linear in adapted_linears(model).items() if linear.lora.original is not None}
            refuse_baked(model)
            for path, linear in changed.items():
                check_stored(path, linear)
            complete(lambda: write_back_all(changed))

    changing(model, change)


def bake(model: nn.Module | Loaded) -> None:
    """Merge all adapters and remove them, with their hooks and the original weights. The model is then a plain one.

    The adapters of a `Captioner` are removed without a merge. The captioner then raises LoRAError if it is used.
    All sums are checked before a weight is changed, and no second copy of the weights is made. If the call is interrupted after
    the first change, for example by Ctrl-C, it writes the remaining weights before it raises.
    Raise LoRAError as `merge` does. In peft: `merge_and_unload`.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> lora_blip.bake(backbone)
    """
    model = model_of(model)

    def change(hooked: dict[str, Any]) -> None:
        dormant = share_routing(model).dormant
        keys = {path: frozenset(k for k in linear.lora if name_of(k) not in dormant) for path, linear in hooked.items()}
        keys = {path: own for path, own in keys.items() if own}
        _require_adapters(model, keys)
        check_mergeable(model, keys)
        check_sums(hooked, keys)
        try:
            complete(lambda: bake_all(hooked, keys))
        finally:
            setattr(model, BAKED, True)
            clear_if_bare(model)

    writing(model, change)


def bake_all(hooked: dict[str, Any], keys: dict[str, frozenset[str]]) -> None:
    """Merge the adapters `keys` of each linear, and remove all its adapters.

    A second call continues after an error: the original weight of a linear is kept until its adapters are removed, and `fold`
    starts from it.
    """
    for path, linear in hooked.items():
        if has_adapters(linear):
            if path in keys:
                fold(linear, keys[path])
            detach(linear)


def complete(work: Callable[[], None]) -> None:
    """Call `work`, and call it again if it raises, for example by Ctrl-C, so that all linears are changed or none. Then raise.

    work: a change of all linears that starts at the first unchanged linear.
    """
    try:
        work()
    except BaseException:
        work()
        raise


def _require_adapters(model: nn.Module, keys: dict[str, frozenset[str]]) -> None:
    """Raise LoRAError if no adapter would be merged: the caller has forgotten to load one, or has called `bake` before."""
    if not keys and vars(model).get(attached.BAKED) and not attached.names(model):
        again = "so its predictions are those of the adapter already; to merge another adapter, load the base again"
        raise LoRAError(f"{attached.MERGED_FOR_GOOD}, {again}")
    if not keys:
        held = ", ".join(attached.names(model))
        reason = f"; those of a Captioner are not merged: {held}" if held else ""
        fix = 'first call lora_blip.load_adapter(backbone, "latest"), or inject and train one'
        raise LoRAError(f"the model has no adapter to merge{reason}; {fix}")


def writing(model: nn.Module, change: Callable[[dict[str, Any]], None]) -> None:
    """Call `change` with {path: linear with adapters}, while no captioner predicts and no thread can enter a block.

    Raise LoRAError inside a block of `use_adapters` or `disable_adapters`.
    """

    def locked() -> None:
        with (routing := share_routing(model)).lock:
            if routing.blocks:
                raise LoRAError(
                    "a block of `use_adapters` or `disable_adapters` is active, here or in another thread or task, and a "
                    "merged adapter acts on every row; leave that block first"
                )
            change(adapted_linears(model))

    changing(model, locked)


def fold_all(hooked: dict[str, Any], keys: dict[str, frozenset[str]]) -> None:
    """Merge adapters. `keys`: {path of a linear: keys in its stack}. If one merge fails, put every weight back."""
    check_sums(hooked, keys)
    before = {path: hooked[path].lora.merged for path in keys}
    try:
        for path, chosen in keys.items():
            fold(hooked[path], chosen)
    except BaseException:
        complete(lambda: put_back(hooked, before))
        raise


def put_back(hooked: dict[str, Any], before: dict[str, frozenset[str]]) -> None:
    """Merge the adapters of `before` again, or put the original weight back if there are none."""
    for path, earlier in before.items():
        fold(hooked[path], earlier) if earlier else write_back(hooked[path])


@torch.no_grad()
def check_sums(hooked: dict[str, Any], keys: dict[str, frozenset[str]]) -> None:
    """Raise LoRAError if a merged weight would not be finite in its dtype. Nothing is changed.

    A bound of the values is computed first. The sum itself, which takes longer, is needed only if the bound is too large.
    """
    for path, chosen in keys.items():
        linear = hooked[path]
        dtype, largest = linear.weight.dtype, torch.finfo(linear.weight.dtype).max
        if bound_of(linear, chosen) < 0.99 * min(largest, torch.finfo(torch.float32).max):
            continue
        if math.isfinite(largest_of(summed(linear, chosen).to(dtype))):
            continue
        name = str(dtype).removeprefix("torch.")
        raise LoRAError(
            f"{path!r} would be NaN or beyond the largest {name}, {largest:g}, when merged; nothing was changed. Use the "
            "adapter unmerged, load the base in bf16 or fp32, or train with a lower lr"
        )


def bound_of(linear: Any, keys: frozenset[str]) -> float:
    """Return a bound of |W + Σ ΔW| and of |B A|, which is computed in float32. It is infinite for DoRA and own formulas.

    An element of B A is a sum of r products, so it is at most r · max |B| · max |A|. If W, A or B contains infinity or NaN, the
    bound is infinite or NaN.
    """
    loras = [linear.lora[key] for key in keys]
    if not all(map(is_product, loras)):
        return math.inf
    # max(NaN, 1.0) is NaN in this order
    updates = (max(abs(lora.scale), 1.0) * len(lora.A) * largest_of(lora.B) * largest_of(lora.A) for lora in loras)
    return sum(updates, largest_of(original_of(linear)))


@torch.no_grad()
def fold(linear: Any, keys: frozenset[str]) -> None:
    """Write original + Σ ΔW of `keys` into the weight, and keep the original."""
    stack: AdapterStack = linear.lora
    in_place = adds_in_place(linear, keys)
    merged = None if in_place else summed(linear, keys)
    if stack.original is None:
        stack.original = linear.weight.detach().clone()
    elif in_place:
        linear.weight.copy_(stack.original)
    if merged is None:
        add_in_place(linear.weight, cast(LoRA, stack[min(keys)]))
    else:
        linear.weight.copy_(merged)
    stack.merged = frozenset(keys)


def adds_in_place(linear: Any, keys: frozenset[str]) -> bool:
    """Return True if W + ΔW is one float32 sum, which `add_in_place` computes without a copy of W."""
    loras = [linear.lora[key] for key in keys]
    float32 = all(tensor.dtype == torch.float32 for lora in loras for tensor in (linear.weight, lora.A, lora.B))
    return float32 and len(loras) == 1 and is_product(loras[0])


def add_in_place(weight: Tensor, lora: LoRA) -> None:
    """Write W + ΔW into W as `summed` computes it, some rows at a time: a whole ΔW would need new memory, which is slow."""
    count = max(1, BLOCK // max(1, weight.shape[1]))
    target = weight[lora.padding[0] : len(weight) - lora.padding[1]]
    for first in range(0, len(target), count):
        rows = slice(first, first + count)
        target[rows].add_(lora.delta_weight(rows))


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


def write_back_all(hooked: dict[str, Any]) -> None:
    """Put the original weights back."""
    for linear in hooked.values():
        write_back(linear)


@torch.no_grad()
def write_back(linear: Any) -> None:
    """Put the original weight back, if one is kept."""
    if linear.lora.original is not None:
        linear.weight.copy_(linear.lora.original)
    linear.lora.original, linear.lora.merged = None, frozenset()
