"""Put adapters on a model, and remove them."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from lora_blip.errors import LoRAError
from lora_blip.lora.adapter_tensors import parameters_of
from lora_blip.lora.attached import (
    BAKED,
    BARE,
    MERGED_FOR_GOOD,
    Loaded,
    adapted_linears,
    adapters,
    add_fused_hooks,
    attach,
    check_names,
    check_unheld,
    clear_if_bare,
    detach,
    has_adapters,
    model_of,
    refuse_baked,
    share_routing,
)
from lora_blip.lora.attached import names as attached_names
from lora_blip.lora.layer import AdapterStack, LoRA
from lora_blip.lora.mergeable import check_mergeable, check_stored
from lora_blip.lora.merging import complete, fold_all, write_back
from lora_blip.lora.model_lock import changing, related
from lora_blip.lora.save_guard import guard
from lora_blip.lora.sites import ALPHA, R, Site, check_sites, list_sites, modules_of, name_of
from lora_blip.lora.targets import find
from lora_blip.lora.variants import check_decomposable
from lora_blip.runtime.process_state import PROCESS_STATE
from lora_blip.runtime.untrusted import quoted

KEPT = (
    "inject: the model already has the adapter {name!r} on these linears. Its weights are kept{dropout}. "
    "For new weights, first call lora_blip.eject(model, {name!r})"
)
ON_BAKED = (
    f"inject: {MERGED_FOR_GOOD}. The new adapter {{name!r}} fits only a base with this merge: to load it again, first merge "
    "that adapter with lora_blip.bake, or save this model with model.save_pretrained(folder)"
)

KAIMING = nn.init.kaiming_uniform_  # as PyTorch defines it
MOST = 100.0  # times 1/√in_features: a larger value of a new A is memory that was not drawn


def inject(
    model: nn.Module | Loaded,
    targets: str | Iterable[str | Site],
    dropout: float = 0.0,
    name: str = "default",
    *,
    r: int = R,
    alpha: float = ALPHA,
    variant: str = "lora",
) -> dict[str, LoRA]:
    """Put a new adapter called `name` on the targets, freeze all parameters of the base, and return {address: LoRA}.

    model: a backbone, or any model. targets: what `find_targets` accepts, or its result, which has r, alpha and the variant.
    variant: "lora", "rslora" or "dora"; see docs/variants.md. Each LoRA has the parameters A (r, in_features) and B
    (out_features, r), and a `DoRA` its magnitude (out_features,) too. Train the parameters whose `requires_grad` is true.
    Adapters that are already on the model stay trainable; to keep them, first call `model.requires_grad_(False)`. B is zero,
    so no output changes yet. A repeated call with the same sites changes only the dropout. In peft: `get_peft_model`, or
    `inject_adapter_in_model`.

    Raise TargetError if a target matches nothing. Raise LoRAError, before anything is changed, if there is no site, or if
    the model already has an adapter called `name` with other modules, r, alpha or variant. Raise it too if a site is not a
    linear of this model, shares its weight with the embeddings, or has a wrong range or rank.

    >>> adapters = lora_blip.inject(backbone, "vit", r=4)
    >>> optimizer = torch.optim.AdamW([p for p in backbone.model.parameters() if p.requires_grad], lr=1e-4)
    """
    model = model_of(model, targets, 'lora_blip.inject(backbone, "vit")')
    items: Any = list(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else [targets]
    names = targets if isinstance(targets, str) else items
    by_name = bool(items) and all(isinstance(item, str) for item in items)
    sites = find(model, names, r, alpha, variant) if by_name else list_sites(items)
    check_new_name(name)
    return changing(model, lambda: _put_new(model, sites, dropout, name))


def _put_new(model: nn.Module, sites: list[Site], dropout: float, name: str) -> dict[str, LoRA]:
    """Put a new adapter on the sites, or change the dropout of the present one, freeze the base, and return {address: LoRA}."""
    by_address = {site.address: site for site in sites}
    check_unheld(model, name)
    present = adapters(model, name)
    if present and {address: lora.site for address, lora in present.items()} != by_address:
        raise LoRAError(
            f"the model already has an adapter {name!r} on other modules, or with another r, alpha or variant; "
            f"first call lora_blip.eject(model, {name!r})"
        )
    check_sites(model, sites, dropout)
    if present:
        changed = any(lora.dropout != dropout for lora in present.values())
        note = f", and its dropout is now {dropout}" * changed
        print(KEPT.format(name=name, dropout=note), file=sys.stderr, flush=True)
    elif vars(model).get(BAKED):
        print(ON_BAKED.format(name=name), file=sys.stderr, flush=True)
    for lora in present.values():
        lora.dropout = dropout
    if not present:
        with PROCESS_STATE:
            was_off = nn.init.kaiming_uniform_ is not KAIMING
            put(model, sites, dropout, name)
        _check_start(model, name, was_off or nn.init.kaiming_uniform_ is not KAIMING)
    freeze(model)
    return adapters(model, name)


def put(
    model: nn.Module, sites: Iterable[Site], dropout: float, name: str, values: Mapping[str, Tensor] | None = None,
    dormant: bool = False,
) -> None:  # fmt: skip
    """Put a new adapter on sites that `check_sites` has checked. values: the tensors of a file; None: a new adapter.

    dormant: whether the adapter acts only in blocks of `use_adapters` that name it. It is then not in the state_dict, and not
    trained. The name is dormant before the first linear gets the adapter, because another thread may run the model.
    """
    check_new_name(name)
    modules = modules_of(model)
    for site in sites:
        check_decomposable(site, modules[site.module])
    routing = share_routing(model)
    if dormant:
        routing.sleep(name)
    try:
        for site in sites:
            attach(modules[site.module], site, dropout, name, values, routing)
    except BaseException:  # such as too little memory, or Ctrl-C
        for linear in adapted_linears(model).values():
            remove(linear, {key for key in linear.lora if name_of(key) == name})
        if dormant:
            routing.dormant -= {name}
        raise
    for lora in adapters(model, name).values() if dormant else ():
        lora.requires_grad_(False)
    add_fused_hooks(model)
    guard(model)


def _check_start(model: nn.Module, name: str, is_off: bool) -> None:
    """Remove a new adapter and raise LoRAError if an A does not have its random values, so that it would not learn.

    is_off: whether another thread has replaced the functions of torch.nn.init by empty ones.
    """
    for address, lora in adapters(model, name).items():
        largest = 0.0 if lora.A.is_meta else lora.A.detach().abs().max().item()
        if not lora.A.is_meta and (is_off or not 0 < largest <= MOST * lora.A.shape[1] ** -0.5):
            eject(model, name)
            raise LoRAError(
                f"A of {quoted(address)} has no random values, because torch.nn.init is off: another thread loads a model "
                "with transformers; call inject after that"
            )


def _remove_keys(hooked: dict[str, Any], leaving: dict[str, set[str]], staying: dict[str, frozenset[str]]) -> None:
    """Remove the adapters `leaving` of each linear. Put its original weight back if no merged adapter stays."""
    for path, linear in hooked.items():
        if has_adapters(linear):
            if not staying[path]:
                write_back(linear)
            remove(linear, leaving[path])


def remove(linear: Any, keys: Iterable[str]) -> None:
    """Remove adapters that are not merged from a linear, and our hooks if none is left."""
    for key in set(keys) & set(linear.lora):
        del linear.lora[key]
    if not linear.lora:
        detach(linear)


def freeze(model: nn.Module) -> None:
    """Freeze all parameters that belong to no adapter."""
    own = {id(parameter) for linear in adapted_linears(model).values() for parameter in linear.lora.parameters()}
    for module in modules_of(model).values():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad and id(parameter) not in own:
                parameter.requires_grad_(False)


def copy_values(loras: Mapping[str, LoRA], tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of an adapter file into the LoRA layers at these addresses."""
    for address, lora in loras.items():
        for key, parameter in parameters_of(address, lora).items():
            parameter.data.copy_(tensors[key])


def eject(model: nn.Module | Loaded, name: str | None = None) -> None:
    """Take one adapter off, or all. Without adapters, the weights, the outputs and the state_dict are those of the base.

    Adapters that a `Captioner` loaded are taken off too. The captioner then raises LoRAError if it is used.
    Raise LoRAError for an unknown name. Raise it too, before anything is changed, if a thread or task is in a block of
    `use_adapters` that names the adapter. In peft: `unload`; with a name, `delete_adapter`.

    >>> adapter = lora_blip.load_adapter(backbone, "latest")
    >>> lora_blip.eject(backbone)
    """
    model = model_of(model, name, 'lora_blip.eject(backbone, "default")')

    def change() -> None:
        with share_routing(model).lock:
            check_names(model, [] if name is None else [name])
            refuse_baked(model)
            _remove_from_all(model, name)
            clear_if_bare(model)

    changing(model, change)


def _remove_from_all(model: nn.Module, name: str | None) -> None:
    """Take one adapter off all linears, or all adapters. Put the original weights back if it is merged."""
    hooked, routing = adapted_linears(model), share_routing(model)
    leaving = {path: {key for key in linear.lora if name in (None, name_of(key))} for path, linear in hooked.items()}
    staying = {path: linear.lora.merged - leaving[path] for path, linear in hooked.items()}
    for keys in leaving.values():
        if any(block.active.selects(name_of(key)) for block in routing.blocks for key in keys):
            raise LoRAError("a block of `use_adapters` names the adapter; leave that block first, then eject")
    refold = {path: keys for path, keys in staying.items() if keys and keys != hooked[path].lora.merged}
    check_mergeable(model, refold)
    for path, linear in hooked.items():
        if linear.lora.merged & leaving[path]:
            check_stored(path, linear)
    fold_all(hooked, refold)
    complete(lambda: _remove_keys(hooked, leaving, staying))
    if routing.blocks and not adapted_linears(model):
        BARE[model] = routing
    gone = {name_of(key) for keys in leaving.values() for key in keys}
    # `model` may be a part of a model, and a linear outside it may still have the adapter
    routing.dormant -= gone.difference(name for whole in related(model) for name in attached_names(whole))


def check_new_name(name: str) -> None:
    """Raise LoRAError if a name cannot be a key of an `AdapterStack`."""
    is_name = isinstance(name, str) and name.replace("_", "").replace("-", "").isalnum()
    if not is_name or hasattr(AdapterStack(), name):
        raise LoRAError(
            f"adapter name {quoted(name)} is not allowed; use letters, digits, '-' and '_', such as 'cubes'. Names of methods "
            "of a dict, such as 'keys', are not allowed either"
        )
