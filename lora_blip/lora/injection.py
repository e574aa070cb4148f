"""Put adapters on a model, and take them off."""

from collections.abc import Iterable

from torch import nn

from lora_blip.errors import LoRAError
from lora_blip.lora.attached import (
    adapted_linears,
    adapters,
    attach,
    check_names,
    clear_if_bare,
    detach,
    routing_of,
)
from lora_blip.lora.layer import AdapterStack, LoRA, name_of
from lora_blip.lora.mergeable import check_mergeable
from lora_blip.lora.merging import fold_all, write_back
from lora_blip.lora.save_guard import guard
from lora_blip.lora.sites import Site, check_sites, list_sites


def inject(model: nn.Module, sites: Iterable[Site], dropout: float = 0.0, name: str = "default") -> dict[str, LoRA]:
    """Put a new adapter called `name` on every site, freeze every other parameter, and return {address: LoRA}.

    A repeated call changes only the dropout. Raise LoRAError, before anything is changed, if there is no site, or if `name` is
    on other modules already. Raise it too if a site is not a linear of this model, is a tied head, or has a wrong range or
    rank.
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
        check_new_name(name)
        for site in sites:
            attach(model.get_submodule(site.module), site, dropout, name)
        routing_of(model)
        guard(model)
    own = {id(parameter) for linear in adapted_linears(model).values() for parameter in linear.lora.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return adapters(model, name)


def eject(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all. The weights, the outputs and the state_dict are then those of the base.

    Raise LoRAError, before anything is changed, if a thread or task is in a block of `use_adapters` that names the adapter.
    """
    check_names(model, [name] if name else [])
    hooked = adapted_linears(model)
    leaving = {path: {key for key in linear.lora if name in (None, name_of(key))} for path, linear in hooked.items()}
    staying = {path: linear.lora.merged - leaving[path] for path, linear in hooked.items()}
    with routing_of(model).lock:
        for path, linear in hooked.items():
            named = {name_of(key) for key in leaving[path]}
            if any(block.active.names(each) for block in linear.lora.routing.blocks for each in named):
                raise LoRAError("a block of `use_adapters` names the adapter; leave that block first")
        refold = {path: keys for path, keys in staying.items() if keys and keys != hooked[path].lora.merged}
        check_mergeable(model, refold)
        fold_all(hooked, refold)
        for path, linear in hooked.items():
            if linear.lora.merged & leaving[path]:
                write_back(linear)
            for key in leaving[path]:
                del linear.lora[key]
            if not linear.lora:
                detach(linear)
    clear_if_bare(model)


def check_new_name(name: str) -> None:
    """Raise LoRAError if a name cannot be a key of an `AdapterStack`."""
    if not name.replace("_", "").replace("-", "").isalnum() or hasattr(AdapterStack(), name):
        raise LoRAError(f"adapter name {name!r} must be letters, digits, '-' and '_', and no word such as 'keys'")
