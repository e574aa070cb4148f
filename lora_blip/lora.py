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
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.call_batch import call_batch, forget_batch, note_batch, watch
from lora_blip.choice import ALL, Acting, Choice, enter, in_force, leave
from lora_blip.errors import LoRAError
from lora_blip.fused import Entered, hand_over, input_of, updated
from lora_blip.mergeable import check_mergeable, summed
from lora_blip.save_guard import guard, refuse_inside_save_pretrained, unguard
from lora_blip.sites import Site, check_sites, list_sites

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
    """The adapters of one linear, by name; their updates add. `original` is W while some are merged.

    An adapter that is merged is not in the state_dict: the weight contains its update.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choice = Choice()
        self.entered = Entered()
        self.original: Tensor | None = None
        self.merged: frozenset[str] = frozenset()

    @property
    def unmerged(self) -> list[str]:
        return [_name(key) for key in self if key not in self.merged]

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the tensors of the unmerged adapters. Raise LoRAError inside of a `save_pretrained` if there are any."""
        if self.unmerged:
            refuse_inside_save_pretrained(self.unmerged)
        destination = OrderedDict() if destination is None else destination
        for key, lora in self.items():
            if key not in self.merged:
                lora.state_dict(destination=destination, prefix=f"{prefix}{key}.", keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keep merged adapters whose tensors are not in the state_dict as they are."""
        super()._load_from_state_dict(state, prefix, *args)
        for key in self.merged:
            for half, value in self[key].state_dict(prefix=f"{prefix}{key}.").items():
                state.setdefault(half, value)


def add_update(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """The forward hook: y + Σ (alpha / r) · B A x over the adapters that act on a row and are not merged."""
    updates: Updates = linear.lora
    if updates.entered.x is not None:  # taken in by `hand_over`: the same update, faster
        return updated(linear, output)
    if updates.merged and not updates.choice.everyone:
        raise LoRAError("adapters were merged after they had been chosen or disabled here; call lora.restore(model) first")
    x = input_of(args, kwargs)
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

    Repeating a call changes nothing but the dropout. Raises LoRAError, before anything is changed, when there is no site,
    when one is no linear of this model, a tied head, of a wrong range or rank, or when `name` already sits elsewhere.
    """
    sites = list_sites(sites)
    wanted = {site.address: site for site in sites}
    present = adapters(model, name)
    if present and {address: lora.site for address, lora in present.items()} != wanted:
        raise LoRAError(f"adapter {name!r} is already on other modules of this model; eject it first")
    check_sites(model, sites, dropout)
    for lora in present.values():
        lora.dropout = dropout
    if not present:
        _check_new_name(name)
        for site in sites:
            _attach(model.get_submodule(site.module), site, dropout, name)
        _choice(model)
        guard(model)
    own = {id(parameter) for linear in _hooked(model).values() for parameter in linear.lora.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return adapters(model, name)


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all: the weights, the outputs and the state_dict are the base's own again.

    Raises LoRAError, before anything is changed, inside a `chosen` that names it, in whichever thread or task.
    """
    _check_names(model, [name] if name else [])
    hooked = _hooked(model)
    leaving = {path: {key for key in linear.lora if name in (None, _name(key))} for path, linear in hooked.items()}
    staying = {path: linear.lora.merged - leaving[path] for path, linear in hooked.items()}
    with _choice(model).lock:
        for path, linear in hooked.items():
            named = {_name(key) for key in leaving[path]}
            if any(block.acting.names(each) for block in linear.lora.choice.blocks for each in named):
                raise LoRAError("the adapter is chosen by name in a block of `chosen`; leave that block first")
        refold = {path: keys for path, keys in staying.items() if keys and keys != hooked[path].lora.merged}
        check_mergeable(model, refold)
        _fold_all(hooked, refold)
        for path, linear in hooked.items():
            if linear.lora.merged & leaving[path]:
                _write_back(linear)
            for key in leaving[path]:
                del linear.lora[key]
            if not linear.lora:
                _detach(linear)
    _clear_if_bare(model)


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
    """Use `fused` instead of `add_update` if both give the same update (the default), also for copies and adapters to come."""
    for module in model.modules():
        vars(module).pop(FAST, None)  # of a part
    setattr(model, FAST, on)
    _choice(model).fast = on


# ---------------------------------------------------------------- into the weights and back


def merge(model: nn.Module, *names: str) -> None:
    """W ← W + Σ ΔW, summed in float32, over the named adapters (all, without names). Merging twice is merging once.

    The original W is kept beside the linear for `restore`, and every merge starts from it. A merge that fails, such as
    out of memory, puts every weight back. Raises LoRAError, before any weight is written, for an unknown name, for a
    weight that cannot take the update (see `mergeable`), for a sum that is not finite, and while any thread or task is
    inside `chosen` or `disabled`.
    """
    _check_names(model, names)
    with _writing(model) as hooked:
        keys = {p: m.lora.merged | {k for k in m.lora if not names or _name(k) in names} for p, m in hooked.items()}
        keys = {path: some for path, some in keys.items() if some}
        check_mergeable(model, keys)
        _fold_all(hooked, keys)


def restore(model: nn.Module) -> None:
    """Undo `merge`: the weights are `torch.equal` to the originals, and the adapters act by their hooks again."""
    with _choice(model).lock:
        for linear in _hooked(model).values():
            _write_back(linear)


def bake(model: nn.Module) -> None:
    """Merge for good: the weights keep the update; adapters, hooks and originals are gone, and no memory is held.

    Until the last weight is written, the originals are kept in the CPU's memory. A bake that fails puts every weight
    back. Raises LoRAError as `merge` does.
    """
    with _writing(model) as hooked:
        keys = {path: frozenset(linear.lora) for path, linear in hooked.items()}
        check_mergeable(model, keys)
        _fold_all(hooked, keys, torch.device("cpu"))
        for linear in hooked.values():
            _detach(linear)
    _clear_if_bare(model)


@contextmanager
def _writing(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keep every thread and task out of `chosen` while weights are written; LoRAError if one is inside."""
    choice = _choice(model)
    with choice.lock:
        if choice.blocks:
            raise LoRAError(
                "adapters are chosen or disabled here or in another thread or task, and merged ones act on every row; "
                "leave that block first"
            )
        yield _hooked(model)


def _fold_all(hooked: dict[str, Any], keys: dict[str, frozenset[str]], keep_on: torch.device | None = None) -> None:
    """Merge the adapters `keys` (path → keys), or put every weight back if one fails: out of memory, or interrupted."""
    before = {path: hooked[path].lora.merged for path in keys}
    try:
        for path, some in keys.items():
            _fold(hooked[path], some, keep_on)
    except BaseException:
        for path, some in before.items():
            _fold(hooked[path], some) if some else _write_back(hooked[path])
        raise


@torch.no_grad()
def _fold(linear: Any, keys: frozenset[str], keep_on: torch.device | None = None) -> None:
    """Write original + Σ ΔW of `keys` into the weight. Keep the original on a device, by default the weight's own."""
    updates: Updates = linear.lora
    if updates.original is None:
        updates.original = linear.weight.detach().to(device=keep_on, copy=True)
    linear.weight.copy_(summed(linear, keys))
    updates.merged = frozenset(keys)


@torch.no_grad()
def _write_back(linear: Any) -> None:
    if linear.lora.original is not None:
        linear.weight.copy_(linear.lora.original)
    linear.lora.original, linear.lora.merged = None, frozenset()


# ---------------------------------------------------------------- which adapter acts on which row


@contextmanager
def chosen(model: nn.Module, names: str | Sequence[str | None] | None, beams: int = 1) -> Iterator[None]:
    """Inside the block one adapter alone acts, or each row of a batch has its own: `["caption", "vqa", None]`.

    None in a list is the base as it is, and None instead of a list changes nothing. Switching copies no weight; a
    batch of mixed rows gives each row what it gets apart; of nested blocks the inner one counts. It holds in the thread
    or asyncio task that enters it, and in tasks that are started inside, so that all may share a model. `beams`: a search
    repeats every row so many times. Leave the block before `yield` in a generator: it holds for the caller too until the
    generator continues, as torch.no_grad does. Raises LoRAError for an unknown name, no name at all, when adapters are
    merged, and in the forward when the model is called with another number of rows.

    Two mistakes cannot be detected. With `beams`, a plain forward of len(names) · beams texts is taken for a search; images
    are never repeated by one, so they are checked. A model whose tensors put time before the rows gives the adapters to
    wrong rows if there are as many steps as rows, or if it flattens both; BLIP and BLIP-2 put rows first.
    """
    if names is None:
        yield
        return
    each = [names] if isinstance(names, str) else list(names)
    _check_names(model, [name for name in each if name is not None])
    if not each or beams < 1:
        raise LoRAError("the list of adapters is empty; name one for every row of the batch, or None for the base; beams ≥ 1")

    def acting(off: frozenset[str]) -> Acting:
        if isinstance(names, str):
            return Acting(off, alone=names)
        device = next((lora.A.device for _, lora in _every(model)), None)
        rows = {name: [row for row, own in enumerate(each) if own == name] for name in each if name is not None}
        return Acting(off, "", {n: torch.tensor(r, device=device) for n, r in rows.items()}, len(each), beams)

    if not isinstance(names, str):
        watch(model, skip=_has_adapters)
    with _inside(model, "chosen", acting):
        yield


@contextmanager
def disabled(model: nn.Module, *names: str) -> Iterator[None]:
    """Inside the block, in this thread or task, the named adapters (all, without names) add nothing; LoRAError if merged."""
    _check_names(model, names)
    more = frozenset(names or (owner for (owner, _), _ in _every(model)))
    choice = _choice(model)
    with _inside(model, "disabled", lambda off: replace(choice.acting, off=off | more)):
        yield


@contextmanager
def _inside(model: nn.Module, what: str, acting: Callable[[frozenset[str]], Acting]) -> Iterator[None]:
    """A block of `chosen` or `disabled`; `acting` is given what is disabled already."""
    choice = _choice(model)
    with choice.lock:  # no merge in between
        if any(linear.lora.merged for linear in _hooked(model).values()):
            raise LoRAError(f"adapters are merged into the weights, so none can be {what}; call restore(model) first")
        block = enter(choice, acting(choice.acting.off))
    try:
        yield
    finally:
        leave(block)


def as_chosen(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`torch.utils.checkpoint(…, context_fn=partial(as_chosen, model))`: what the backward pass computes again acts as it did.

    The backward pass may run when the block of `chosen` or `disabled` has ended, inside another, or in another thread.
    """
    choices = {updates.choice: None for updates in model.modules() if isinstance(updates, Updates)}
    blocks = [(choice, choice.block) for choice in choices]
    again = [(c, c.acting, b.batch if b and b.again else call_batch()) for c, b in blocks]
    return nullcontext(), in_force(again)


def _choice(model: nn.Module) -> Choice:
    """The choice of a model, from now on that of all its linears, though some were injected as parts of it."""
    updates = [linear.lora for linear in _hooked(model).values()]
    found = list(dict.fromkeys(each.choice for each in updates)) or [Choice()]
    busy = [choice for choice in found if choice.blocks]
    if len(busy) > 1:
        raise LoRAError("parts of this model have each a block of `chosen` or `disabled`; leave these blocks first")
    choice = (busy or found)[0]
    choice.fast = all(each.fast for each in found) and all(getattr(module, FAST, True) for module in model.modules())
    choice.used, choice.made = any(each.used for each in found), any(each.made for each in found)
    for each in updates:
        each.choice = choice
    return choice


# ---------------------------------------------------------------- looking and checking


def _every(model: nn.Module) -> Iterator[tuple[tuple[str, str], LoRA]]:
    for linear in _hooked(model).values():
        for key, lora in linear.lora.items():
            yield (_name(key), key), lora


def _hooked(model: nn.Module) -> dict[str, Any]:
    return {path: m for path, m in model.named_modules() if _has_adapters(m)}


def _has_adapters(module: nn.Module) -> bool:
    return isinstance(module._modules.get("lora"), Updates)


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


def _attach(linear: Any, site: Site, dropout: float, name: str) -> None:
    if not _has_adapters(linear):
        linear.lora = Updates()
        linear.register_forward_pre_hook(hand_over, with_kwargs=True)
        linear.register_forward_hook(add_update, with_kwargs=True, prepend=True)  # other hooks see W + ΔW, as if merged
    device = next((tensor.device for tensor in (*linear.parameters(), *linear.buffers())), torch.device("cpu"))
    lora = LoRA(site, linear.in_features, linear.out_features, dropout, device)
    linear.lora[f"{name}:{site.block}" if site.block else name] = lora.train(linear.training)


def _detach(linear: Any) -> None:
    _remove_hooks(linear)
    del linear.lora


def _clear_if_bare(model: nn.Module) -> None:
    """Leave no trace on a model without adapters."""
    if not _hooked(model):
        unguard(model)
        for module in model.modules():
            _remove_hooks(module)


def _remove_hooks(module: nn.Module) -> None:
    """Remove our hooks by what they are, not by a handle, so that a deepcopy or an unpickled model can do it too."""
    of: Any = module
    for hooks, *flags in (
        (of._forward_pre_hooks, of._forward_pre_hooks_with_kwargs),
        (of._forward_hooks, of._forward_hooks_with_kwargs, of._forward_hooks_always_called),
    ):
        for number in [number for number, hook in hooks.items() if hook in OURS]:
            for table in (hooks, *flags):
                table.pop(number, None)


OURS = (hand_over, add_update, note_batch, forget_batch)
