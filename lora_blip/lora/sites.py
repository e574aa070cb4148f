"""The site of an adapter: a linear, and a range of its output rows. Check that a linear can have an adapter."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lora_blip.errors import LoRAError
from lora_blip.kernels.linear import PLAIN_TENSORS
from lora_blip.runtime.setting_checks import VARIANTS
from lora_blip.runtime.untrusted import quoted

FLOAT32 = torch.finfo(torch.float32)
BLOCK = re.compile(r"[\w-]{1,64}")
MOST_DROPOUT = 0.999_999
MOST_RANK = 2**16  # the limit of the setting `r`; a larger value is a mistake, and fills the memory
R, ALPHA = 8, 32.0  # the defaults of the settings `r` and `alpha` too
TIED = "tied_to"  # an attribute that `cast_once` sets on a head: the path of the module that shared its weight


@dataclass(frozen=True)
class Site:
    """The site of an adapter: the path of a linear, and the output rows that the update reaches.

    An output row is a row of W: it computes one output feature. If the update does not reach all rows, `block` is the name of
    the range, such as "q" in a fused qkv. All sites of an adapter have the same variant.
    """

    module: str
    r: int = R
    alpha: float = ALPHA
    block: str = ""
    rows: tuple[int, int] | None = None  # [start, stop) of out_features; None is all of them
    variant: str = "lora"  # one of `setting_checks.VARIANTS`

    @property
    def scale(self) -> float:
        """Return the factor of B A: alpha / r, or alpha / √r of rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (self.r**0.5 if self.variant == "rslora" else self.r)

    @property
    def address(self) -> str:
        """Return the path of the module, and the block after it, such as "encoder.layers.0.self_attn.qkv.q"."""
        return f"{self.module}.{self.block}" if self.block else self.module


def modules_of(model: nn.Module) -> dict[str, Any]:
    """Return {path: module}, as `dict(model.named_modules())` does.

    `named_modules` is a generator inside a generator for each level, so each module costs as many steps as its depth.
    """
    found: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", model)]
    seen = set[int]()
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found[path] = module
        prefix = f"{path}." if path else ""
        children = list(module._modules.items())  # a copy, because another thread may put an adapter on this module
        waiting += [(prefix + name, child) for name, child in reversed(children) if child is not None]
    return found


def is_linear(module: nn.Module) -> bool:
    """Return True for a module with in_features and out_features: nn.Linear and quantized linears."""
    return isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)


def is_quantized(linear: Any) -> bool:
    """Return True if the weight is not a plain float matrix (out_features, in_features) of 16 bits or more.

    torchao's weight is a tensor subclass. A float8 weight needs a scale, which its linear stores elsewhere.
    """
    weight: Any = getattr(linear, "weight", None)
    if type(weight) not in PLAIN_TENSORS or weight.layout != torch.strided:
        return True
    if not weight.is_floating_point() or weight.itemsize < 2:
        return True
    return tuple(weight.shape) != (linear.out_features, linear.in_features)


def quantization_of(linear: Any) -> str:
    """Return "int8", "nf4" or "fp4" for a linear whose weight bitsandbytes has quantized, "" for any other module."""
    weight: Any = getattr(linear, "weight", None)
    kind = type(weight).__name__  # by name: bitsandbytes may not be installed
    return "int8" if kind == "Int8Params" else str(weight.quant_type) if kind == "Params4bit" else ""


def quantization(model: nn.Module) -> str:
    """Return `quantization_of` the first quantized linear of a model, "" if there is none."""
    return next(filter(None, map(quantization_of, modules_of(model).values())), "")


def parameter_size(module: Any, parameter: nn.Parameter) -> int:
    """Return the number of values of a module's parameter. Two values of a weight in 4 bits share a byte."""
    packed = parameter is module._parameters.get("weight") and quantization_of(module)
    return int(module.out_features * module.in_features) if packed else parameter.numel()


def base_size(model: nn.Module) -> int:
    """Return the number of values of all parameters, without those of adapters. A shared parameter counts once."""
    sizes: dict[int, int] = {}
    for path, module in modules_of(model).items():
        for parameter in module._parameters.values() if ".lora." not in f".{path}." else ():
            if parameter is not None:
                sizes[id(parameter)] = parameter_size(module, parameter)
    return sum(sizes.values())


def refuse_meta(path: str, linear: nn.Module) -> None:
    """Raise LoRAError if a linear is on the meta device, where tensors have shapes and no values."""
    if any(tensor.is_meta for tensor in (*linear.parameters(), *linear.buffers())):
        raise LoRAError(
            f"{path!r} is on the meta device, so the model has no weights yet; load them first, "
            "for example by from_pretrained, or by model.to_empty(device='cpu') and model.load_state_dict"
        )


def tied(model: nn.Module) -> dict[str, str]:
    """Return {path: another owner of its weight} for modules that share a weight, or shared it before it was cast."""
    return _tied(modules_of(model))


def _tied(modules: dict[str, nn.Module]) -> dict[str, str]:
    owners: dict[int, list[str]] = {}
    earlier = {path: vars(module)[TIED] for path, module in modules.items() if vars(module).get(TIED)}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    shared = [paths for paths in owners.values() if len(paths) > 1]
    return earlier | {path: next(p for p in paths if p != path) for paths in shared for path in paths}


def is_compiled(model: nn.Module) -> bool:
    """Return True if a model or a part of it was compiled by torch.compile, which ignores hooks that are added later."""
    return _any_compiled(modules_of(model).values())


def _any_compiled(modules: Iterable[nn.Module]) -> bool:
    return any(
        m._compiled_call_impl is not None
        or "_orig_mod" in m._modules
        or _is_compiled_function(vars(m).get("forward"))  # model.forward = torch.compile(model.forward)
        for m in modules
    )


def _is_compiled_function(function: Any) -> bool:
    """Return True for a result of torch.compile. That of torch.compiler.disable has the first attribute too."""
    return hasattr(function, "_torchdynamo_orig_callable") and not getattr(function, "_torchdynamo_disable", False)


def list_sites(sites: Any) -> list[Site]:
    """Return the sites as a list. Raise LoRAError if they are something else, for example modules."""
    result = list(sites) if isinstance(sites, Iterable) else [sites]
    for site in result:
        if not isinstance(site, Site):
            raise LoRAError(
                f"{site!r} is not a target; give presets or module names, such as lora_blip.inject(model, 'vit'), or the sites "
                "that lora_blip.find_targets(model, 'vit') returns"
            )
    return result


def refuse_peft(modules: Mapping[str, nn.Module]) -> None:
    """Raise LoRAError if peft has put its layers into a model, so that two adapters would add up."""
    layer = next((path for path, module in modules.items() if type(module).__module__.partition(".")[0] == "peft"), None)
    if layer is not None:
        raise LoRAError(
            f"peft has changed this model: {layer or 'the model'} is one of its layers; load the base again, or remove the "
            "adapter of peft: model = peft_model.unload()"
        )


def refuse_compiled(modules: Mapping[str, nn.Module]) -> None:
    """Raise LoRAError if torch.compile has compiled a model or a part of it."""
    if _any_compiled(modules.values()):
        raise LoRAError(
            "this model was compiled by torch.compile, which would ignore adapters; inject them before it is compiled"
        )


def check_sites(model: nn.Module, sites: Iterable[Site], dropout: float = 0.0) -> None:
    """Raise LoRAError if an adapter cannot be put on one of the sites, or if there is none."""
    sites, modules = list(sites), modules_of(model)
    if not sites:
        raise LoRAError(
            "the list of sites is empty, so there is nothing to train; give targets, such as lora_blip.inject(model, 'vit')"
        )
    refuse_peft(modules)
    refuse_compiled(modules)
    if not isinstance(dropout, int | float) or not 0 <= dropout <= MOST_DROPOUT:  # False for NaN
        raise LoRAError(f"dropout = {dropout!r}: expected a number from 0 to below 1, such as 0.1")
    variants = dict.fromkeys(str(site.variant) for site in sites)
    if len(variants) > 1:
        raise LoRAError(
            f"an adapter has one variant, and the sites have {' and '.join(variants)}; inject two adapters by name=…"
        )
    shared, addresses = _tied(modules), set()
    for site in sites:
        _check_numbers(site)
        linear = modules.get(site.module)
        if linear is None or not is_linear(linear):
            raise LoRAError(f"{site.module!r} is not a linear layer of {type(model).__name__}{_alias(model, site.module)}")
        if site.module in shared:
            raise LoRAError(
                f"{site.module!r} shares its weight with {shared[site.module]!r}, so an adapter would change only one of "
                "them, and a merge would change both; leave it out of the targets"
            )
        if site.address in addresses or (site.block and site.address in modules):
            raise LoRAError(f"{site.address!r} is named twice, by two sites or by a site and a module; leave one of them out")
        addresses.add(site.address)
        refuse_meta(site.module, linear)
        _check_place(site, linear)


def check_update(r: Any, alpha: Any, variant: Any, where: str = "") -> None:
    """Raise LoRAError for a wrong r, alpha or variant. where: the start of the message."""
    if type(r) is not int or not 1 <= r <= MOST_RANK:
        raise LoRAError(f"{where}r={quoted(r)}: expected a whole number from 1 to {MOST_RANK}, such as r={R}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise LoRAError(f"{where}alpha={quoted(alpha)}: expected a positive finite number, such as alpha={ALPHA}")
    if variant not in VARIANTS:
        raise LoRAError(f"{where}variant={quoted(variant)}: expected one of {', '.join(VARIANTS)}")


def _check_numbers(site: Site) -> None:
    """Raise LoRAError for an r or alpha that a file cannot contain, or that is too large for float32."""
    check_update(site.r, site.alpha, site.variant, f"{site.address!r}: ")
    if site.alpha > FLOAT32.max * site.r or not FLOAT32.tiny <= site.scale <= FLOAT32.max:
        root = "√" if site.variant == "rslora" else ""
        raise LoRAError(
            f"{site.address!r}: alpha / {root}r = {quoted(site.alpha)} / {root}{site.r} is beyond float32; give alpha = 32"
        )


def _check_place(site: Site, linear: Any) -> None:
    if (site.block and site.rows is None) or not BLOCK.fullmatch(site.block or "whole"):
        raise LoRAError(
            f"{site.address!r}: a block needs a name of letters, digits, '-' and '_', and its rows, such as "
            "Site(…, block='q', rows=(0, 128))"
        )
    start, stop = site.rows or (0, linear.out_features)
    if type(start) is not int or type(stop) is not int or not 0 <= start < stop <= linear.out_features:
        raise LoRAError(
            f"{site.address!r}: rows=({start}, {stop}): expected two whole numbers, 0 ≤ start < stop ≤ {linear.out_features}"
        )
    if linear.in_features < 1 or any(map(is_lazy, linear.parameters(recurse=False))):
        raise LoRAError(f"{site.module!r} has no shape yet; run the model on one batch first, then call inject")
    other = getattr(linear, "lora", None)
    if other is not None and not (isinstance(other, nn.ModuleDict) and hasattr(other, "merged")):
        raise LoRAError(f"{site.module!r} already has another attribute 'lora'; leave this module out of the targets")


def name_of(key: str) -> str:
    """Return the adapter's name in a key of `AdapterStack`."""
    return key.split(":")[0]


def _alias(model: nn.Module, path: str) -> str:
    """Return a hint with the right name if `path` is a second name of a shared module, or ""."""
    every = dict(model.named_modules(remove_duplicate=False))
    first = next((name for name, module in model.named_modules() if module is every.get(path) and name != path), "")
    return f"; name it {first!r}" if first else ""
