"""LoRA by forward hooks. Start here.

A frozen linear computes y = W x + b. LoRA (Hu et al. 2021, arXiv:2106.09685) leaves W alone and adds a
low-rank update, the only thing that is trained:

    y ← y + (alpha / r) · B A x        A: (r, in), Kaiming-uniform      B: (out, r), zero at the start

No module is replaced and no code of the model is touched: the adapter lives as a child of its linear
(`linear.lora`), and one forward hook, `add_update`, adds its update to what the linear returns.

    inject   puts fresh adapters on          eject   takes them off: the base is bit for bit what it was
    merge    writes W + ΔW into the weights  restore puts the kept W back: `torch.equal`, never subtracted
    bake     merges for good and forgets the adapters
    chosen   lets one adapter act alone, or each row of a batch its own      disabled   lets some rest
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.choice import ALL, ALL_ACT, Acting, Choice, LoRAError, in_force
from lora_blip.fused import Entered, hand_over, updated
from lora_blip.sites import Site, check_sites, is_quantised

FAST = "fast_update"  # attribute of a model: whether its adapters may use `fused`


class LoRA(nn.Module):
    """ΔW = (alpha / r) · B A for one linear, or for a range of its output rows.

    A is (r, in_features) and B (rows, r), both float32 whatever the base's dtype. With B = 0, a fresh
    adapter changes nothing.
    """

    def __init__(self, site: Site, in_features: int, out_features: int, dropout: float, device: torch.device) -> None:
        super().__init__()
        start, stop = site.rows or (0, out_features)
        self.site = site
        self.scale = site.alpha / site.r
        self.dropout = dropout
        self.padding = (start, out_features - stop)  # zeros on either side of the rows reached
        self.A = nn.Parameter(torch.empty(site.r, in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(stop - start, site.r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(alpha / r) · B A dropout(x), shape (..., out_features); float32, or autocast's dtype inside autocast."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(x, self.A), self.B) * self.scale
        return F.pad(update, self.padding) if any(self.padding) else update

    def delta_weight(self) -> Tensor:
        """ΔW = (alpha / r) · B A, shape (out_features, in_features), float32 (Hu et al. 2021, eq. 3)."""
        with torch.autocast(self.A.device.type, enabled=False):
            return F.pad(self.B.float() @ self.A.float() * self.scale, (0, 0, *self.padding))

    def extra_repr(self) -> str:
        return f"r={self.site.r}, alpha={self.site.alpha:g}, dropout={self.dropout:g}"


class Updates(nn.ModuleDict):
    """The adapters of one linear, by name; their updates add. `original` is W while some are merged."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = Choice()
        self.entered = Entered()
        self.original: Tensor | None = None
        self.merged: frozenset[str] = frozenset()


def add_update(linear: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook: y + Σ (alpha / r) · B A x over the adapters that act on a row and are not merged."""
    updates: Updates = linear.lora
    if updates.entered.x is not None:  # taken in by `hand_over`: the same update, faster
        return updated(linear, output)
    x = args[0]
    for key, lora in updates.items():
        rows = None if key in updates.merged else updates.choice.rows(_name(key), x)
        if rows is ALL:
            output = output + lora(x).to(output.dtype)
        elif rows is not None:
            output = output.index_add(0, rows, lora(x[rows]).to(output.dtype))
    return output


# ---------------------------------------------------------------- on and off


def inject(model: nn.Module, sites: Iterable[Site], dropout: float = 0.0, name: str = "default") -> dict[str, LoRA]:
    """Put a fresh adapter called `name` on every site, freeze all that is no adapter, return address → LoRA.

    Repeating a call changes nothing. Raises LoRAError, before anything is changed, when a site is no
    linear of this model, a tied head, of a wrong range, or when `name` already sits elsewhere.
    """
    wanted = {site.address: site for site in sites}
    present = adapters(model, name)
    if present and {address: lora.site for address, lora in present.items()} != wanted:
        raise LoRAError(f"adapter {name!r} is already on other modules of this model; eject it first")
    for lora in present.values():
        lora.dropout = dropout
    if not present:
        _check_new_name(name)
        check_sites(model, wanted.values())
        for site in wanted.values():
            _attach(model.get_submodule(site.module), site, dropout, name)
        _choice(model)
    for parameter_name, parameter in model.named_parameters():
        if ".lora." not in f".{parameter_name}":
            parameter.requires_grad_(False)
    return adapters(model, name)


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all: the weights, the outputs and the state_dict are the base's own again."""
    _check_names(model, [name] if name else [])
    for linear in _hooked(model).values():
        leaving = {key for key in linear.lora if name in (None, _name(key))}
        if linear.lora.merged & leaving:
            staying = linear.lora.merged - leaving
            _fold(linear, staying) if staying else _write_back(linear)
        for key in leaving:
            del linear.lora[key]
        if not linear.lora:
            _detach(linear)


def adapters(model: nn.Module, name: str = "default") -> dict[str, LoRA]:
    """Address → LoRA of one adapter, in the model's order; empty when it is not there."""
    return {lora.site.address: lora for (owner, _), lora in _every(model) if owner == name}


def names(model: nn.Module) -> list[str]:
    """The adapters that are on this model."""
    return list(dict.fromkeys(owner for (owner, _), _ in _every(model)))


def unfired(model: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Addresses whose linear is not called while `forward` runs, so that a hook on it does nothing."""
    called: set[int] = set()

    def note(linear: nn.Module, _args: object, _output: object) -> None:
        called.add(id(linear))

    hooked = _hooked(model)
    handles = [linear.register_forward_hook(note) for linear in hooked.values()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [lora.site.address for m in hooked.values() if id(m) not in called for lora in m.lora.values()]


def fast(model: nn.Module, on: bool = True) -> None:
    """Use `fused` instead of `add_update` if both give the same update (the default), also for adapters to come."""
    setattr(model, FAST, on)
    _choice(model).fast = on


# ---------------------------------------------------------------- into the weights and back


def merge(model: nn.Module, *names: str) -> None:
    """W ← W + Σ ΔW, summed in float32, over the named adapters (all, without names). Merging twice is merging once.

    The original W is kept beside the linear for `restore`, and every merge starts from it. Raises
    LoRAError, before any weight is written, for an unknown name, a quantised linear, or inside `chosen` or `disabled`.
    """
    _check_names(model, names)
    hooked = _hooked(model)
    _refuse_unmergeable(hooked)
    for linear in hooked.values():
        chosen = {key for key in linear.lora if not names or _name(key) in names}
        _fold(linear, linear.lora.merged | chosen)


def restore(model: nn.Module) -> None:
    """Undo `merge`: the weights are `torch.equal` to the originals, and the adapters act by their hooks again."""
    for linear in _hooked(model).values():
        _write_back(linear)


def bake(model: nn.Module) -> None:
    """Merge for good: the weights keep the update; adapters, hooks and originals are gone, and no memory is held."""
    hooked = _hooked(model)
    _refuse_unmergeable(hooked)
    for linear in hooked.values():
        _fold(linear, frozenset(linear.lora), keep_original=False)
        _detach(linear)


@torch.no_grad()
def _fold(linear: Any, keys: frozenset[str], keep_original: bool = True) -> None:
    """Write original + Σ ΔW of `keys` into the weight, always starting from the original."""
    updates: Updates = linear.lora
    if not keys:
        return
    weight, kept = linear.weight.data, updates.original
    if kept is None and keep_original:
        updates.original = weight.clone()
    start = weight if kept is None else kept
    wide = torch.promote_types(start.dtype, torch.float32)
    total = weight if start is weight and weight.dtype == wide else start.to(weight.device, wide, copy=True)
    with torch.autocast(weight.device.type, enabled=False):
        for lora in (updates[key] for key in sorted(keys)):
            assert isinstance(lora, LoRA)
            rows = total[lora.padding[0] : len(total) - lora.padding[1]]
            rows.addmm_(lora.B.to(total.dtype), lora.A.to(total.dtype), alpha=lora.scale)
    if total is not weight:
        weight.copy_(total)
    updates.merged = frozenset(keys)


def _write_back(linear: Any) -> None:
    if linear.lora.original is not None:
        linear.weight.data.copy_(linear.lora.original)
    linear.lora.original, linear.lora.merged = None, frozenset()


# ---------------------------------------------------------------- which adapter acts on which row


@contextmanager
def chosen(model: nn.Module, names: str | Sequence[str | None] | None, beams: int = 1) -> Iterator[None]:
    """Inside the block one adapter alone acts, or each row of a batch has its own: `["caption", "vqa", None]`.

    None in a list is the base as it is, and None instead of a list changes nothing. Switching copies no weight; a
    batch of mixed rows gives each row what it gets apart; of nested blocks the inner one counts. As `torch.no_grad`, it
    holds in the thread that enters it, so that threads may share a model. `beams`: a search repeats every row so many
    times. Raises LoRAError for an unknown name, no name at all, when adapters are merged, and in the forward when a
    batch has another number of rows.
    """
    if names is None:
        yield
        return
    each = [names] if isinstance(names, str) else list(names)
    _check_names(model, [name for name in each if name is not None])
    choice = _unmerged(model, "chosen")
    off = choice.now.acting.off
    if isinstance(names, str):
        acting = Acting(off, alone=names)
    elif each:
        device = next((lora.A.device for _, lora in _every(model)), None)
        rows = {name: [row for row, own in enumerate(each) if own == name] for name in each if name is not None}
        acting = Acting(off, "", {n: torch.tensor(r, device=device) for n, r in rows.items()}, len(each), beams)
    else:
        raise LoRAError("the list of adapters is empty; name one for every row of the batch, or None for the base")
    with in_force(choice, acting):
        yield


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block, in this thread, the named adapters (all, without names) add nothing. Raises LoRAError if merged."""
    _check_names(model, names)
    choice = _unmerged(model, "disabled")
    off = frozenset(names or (owner for (owner, _), _ in _every(model)))
    with in_force(choice, replace(choice.now.acting, off=choice.now.acting.off | off)):
        yield


def as_chosen(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`torch.utils.checkpoint(…, context_fn=partial(as_chosen, model))`: what the backward pass computes again acts as it did.

    The backward pass may run when the block of `chosen` or `disabled` has ended, or inside another.
    """
    updates = next((module for module in model.modules() if isinstance(module, Updates)), None)
    return nullcontext(), in_force(updates.choice, updates.choice.now.acting, again=True) if updates else nullcontext()


def _choice(model: nn.Module) -> Choice:
    """The choice of a model, from now on that of all its linears, though some were injected as parts of it."""
    updates = [linear.lora for linear in _hooked(model).values()]
    choice = updates[0].choice if updates else Choice()
    choice.fast = choice.fast and getattr(model, FAST, True)
    for each in updates:
        each.choice = choice
    return choice


def _unmerged(model: nn.Module, what: str) -> Choice:
    if any(linear.lora.merged for linear in _hooked(model).values()):
        raise LoRAError(f"adapters are merged into the weights, so none can be {what}; call restore(model) first")
    return _choice(model)


# ---------------------------------------------------------------- looking and checking


def _every(model: nn.Module) -> Iterator[tuple[tuple[str, str], LoRA]]:
    for linear in _hooked(model).values():
        for key, lora in linear.lora.items():
            yield (_name(key), key), lora


def _hooked(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if isinstance(m._modules.get("lora"), Updates)}


def _name(key: str) -> str:
    """Keys of `Updates` are the adapter's name, then ":" and the block where there is one."""
    return key.split(":")[0]


def _check_names(model: nn.Module, wanted: Iterable[str]) -> None:
    there = names(model)
    for name in wanted:
        if name not in there:
            raise LoRAError(f"the model carries no adapter {name!r}; it has {', '.join(there) or 'none'}")


def _check_new_name(name: str) -> None:
    if not name.replace("_", "").replace("-", "").isalnum() or hasattr(Updates(), name):
        raise LoRAError(f"adapter name {name!r} must be letters, digits, '-' and '_', and no word such as 'keys'")


def _refuse_unmergeable(hooked: dict[str, Any]) -> None:
    for path, linear in hooked.items():
        if linear.lora.choice.now.acting is not ALL_ACT:
            raise LoRAError("adapters are chosen or disabled here, and merged ones act on every row; leave that block first")
        if is_quantised(linear):
            raise LoRAError(
                f"{path!r} is quantised ({type(linear).__name__}): merging would round the update away; "
                "use the adapter unmerged, or load the base in fp16, bf16 or fp32"
            )


def _attach(linear: Any, site: Site, dropout: float, name: str) -> None:
    if not isinstance(linear._modules.get("lora"), Updates):
        linear.lora = Updates()
        linear.register_forward_pre_hook(hand_over)
        linear.register_forward_hook(add_update)
    tensors = [*linear.parameters(recurse=False), *linear.buffers(recurse=False)]
    device = tensors[0].device if tensors else torch.device("cpu")
    lora = LoRA(site, linear.in_features, linear.out_features, dropout, device)
    linear.lora[f"{name}:{site.block}" if site.block else name] = lora.train(linear.training)


def _detach(linear: Any) -> None:
    """Remove the hook by what it is, not by a handle, so that a deepcopy or an unpickled model can do it too."""
    for hooks in (linear._forward_hooks, linear._forward_pre_hooks):
        for number in [number for number, hook in hooks.items() if hook in (add_update, hand_over)]:
            del hooks[number]
    del linear.lora
