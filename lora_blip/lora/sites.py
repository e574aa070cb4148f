"""Places for adapters: which linear, which of its rows, and which linears can carry one."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lora_blip.errors import LoRAError
from lora_blip.kernels.linear import PLAIN_TENSORS
from lora_blip.runtime.untrusted import quoted

FLOAT32 = torch.finfo(torch.float32)
BLOCK = re.compile(r"[\w-]{1,64}")
MOST_DROPOUT = 0.999_999
MOST_RANK = 2**16  # that of the setting `r`: a larger one is a slip, and fills the memory
TIED = "tied_to"  # attribute of a head whose weight was shared, see `weights.cast_once`


@dataclass(frozen=True)
class Site:
    """One place for an adapter: a linear by its path, and which rows of its output the update reaches.

    `block` names those rows when they are not all of them: "q" of a fused qkv.
    """

    module: str
    r: int = 8
    alpha: float = 16.0
    block: str = ""
    rows: tuple[int, int] | None = None  # [start, stop) of out_features; None is all of them

    @property
    def address(self) -> str:
        return f"{self.module}.{self.block}" if self.block else self.module


def is_linear(module: nn.Module) -> bool:
    """A module that maps in_features to out_features: nn.Linear and its quantised kin."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)


def is_quantised(linear: Any) -> bool:
    """Return True if the weight is not a plain float matrix (out_features, in_features) of 16 bits or more.

    torchao's weight is a tensor subclass. A float8 weight needs a scale, which its linear stores elsewhere.
    """
    weight: Any = getattr(linear, "weight", None)
    if type(weight) not in PLAIN_TENSORS or weight.layout != torch.strided:
        return True
    if not weight.is_floating_point() or weight.itemsize < 2:
        return True
    return tuple(weight.shape) != (linear.out_features, linear.in_features)


def refuse_meta(path: str, linear: nn.Module) -> None:
    """Raise LoRAError if a linear is on the meta device, where tensors have shapes and no values."""
    if any(tensor.is_meta for tensor in (*linear.parameters(), *linear.buffers())):
        raise LoRAError(
            f"{path!r} is on the meta device, so the model has no weights yet; load them first, "
            "for example by from_pretrained, or by model.to_empty(device='cpu') and model.load_state_dict"
        )


def tied(model: nn.Module) -> dict[str, str]:
    """Linear path → the other owner of its weight, for every weight that two modules share, or did before it was cast."""
    return _tied(dict(model.named_modules()))


def _tied(modules: dict[str, nn.Module]) -> dict[str, str]:
    owners: dict[int, list[str]] = {}
    once = {path: vars(module)[TIED] for path, module in modules.items() if vars(module).get(TIED)}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    shared = [paths for paths in owners.values() if len(paths) > 1]
    return once | {path: next(p for p in paths if p != path) for paths in shared for path in paths}


def compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been called on a model or on a part of it: hooks added later are silently ignored."""
    return _compiled(model.modules())


def _compiled(modules: Iterable[nn.Module]) -> bool:
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in modules)


def list_sites(sites: Any) -> list[Site]:
    """Return the sites as a list. Raise LoRAError if they are something else, for example names."""
    found = list(sites) if isinstance(sites, Iterable) else [sites]
    for site in found:
        if not isinstance(site, Site):
            raise LoRAError(f"{site!r} is no Site; targets.find(model, 'vit') gives the sites of a target")
    return found


def check_sites(model: nn.Module, sites: Iterable[Site], dropout: float = 0.0) -> None:
    """Raise LoRAError if an adapter cannot be put on one of the sites, or if there is none."""
    sites, modules = list(sites), dict(model.named_modules())
    if not sites:
        raise LoRAError("the list of sites is empty, so there is nothing to train; targets.find(model, 'vit') gives sites")
    if _compiled(modules.values()):
        raise LoRAError("this model went through torch.compile, which would ignore adapters without a word; inject them first")
    if not isinstance(dropout, int | float) or not 0 <= dropout <= MOST_DROPOUT:  # False for NaN
        raise LoRAError(f"dropout = {dropout!r} is no share from 0 to below 1")
    shared, addresses = _tied(modules), set()
    for site in sites:
        _check_numbers(site)
        linear = modules.get(site.module)
        if linear is None or not is_linear(linear):
            raise LoRAError(f"{site.module!r} is no linear layer of {type(model).__name__}{_alias(model, site.module)}")
        if site.module in shared:
            raise LoRAError(
                f"{site.module!r} shares its weight with {shared[site.module]!r}: an update of one would be missing "
                "in the other, or merged into both; leave it out of the targets"
            )
        if site.address in addresses or (site.block and site.address in modules):
            raise LoRAError(f"{site.address!r} is named twice, by two sites or by a site and a module; keep one")
        addresses.add(site.address)
        refuse_meta(site.module, linear)
        _check_place(site, linear)


def _check_numbers(site: Site) -> None:
    """The numbers that a file can hold and float32 can compute with."""
    if type(site.r) is not int or not 1 <= site.r <= MOST_RANK:
        raise LoRAError(f"{site.address!r}: r={quoted(site.r)} is no whole number from 1 to {MOST_RANK}")
    if isinstance(site.alpha, bool) or not isinstance(site.alpha, int | float) or not 0 < site.alpha < math.inf:
        raise LoRAError(f"{site.address!r}: alpha={quoted(site.alpha)} is no positive finite number")
    if site.alpha > FLOAT32.max * site.r or site.alpha / site.r < FLOAT32.tiny:
        raise LoRAError(f"{site.address!r}: alpha / r = {quoted(site.alpha)} / {site.r} is beyond float32")


def _check_place(site: Site, linear: Any) -> None:
    if (site.block and site.rows is None) or not BLOCK.fullmatch(site.block or "whole"):
        raise LoRAError(f"{site.address!r}: a block is a name of letters, digits, '-' and '_', with the rows that it names")
    start, stop = site.rows or (0, linear.out_features)
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= linear.out_features:
        raise LoRAError(f"{site.address!r}: rows {start}..{stop} of {linear.out_features} make no update")
    if linear.in_features < 1 or any(map(is_lazy, linear.parameters(recurse=False))):
        raise LoRAError(f"{site.module!r} has no shape yet; run the model once before")
    there = getattr(linear, "lora", None)
    if there is not None and not (isinstance(there, nn.ModuleDict) and hasattr(there, "merged")):
        raise LoRAError(f"{site.module!r} has an attribute 'lora' of its own, in the place of the adapters; leave it out")


def _alias(model: nn.Module, path: str) -> str:
    """A module that two parents share has one name here, the first."""
    every = dict(model.named_modules(remove_duplicate=False))
    first = next((name for name, module in model.named_modules() if module is every.get(path) and name != path), "")
    return f"; name it {first!r}" if first else ""
