"""Places for adapters: which linear, which of its rows, and which linears can carry one."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lora_blip.choice import LoRAError

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
    """True when the weight is not a plain float matrix (out_features, in_features)."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return True
    return tuple(weight.shape) != (linear.out_features, linear.in_features)


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


def check_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """LoRAError when a site is no linear of this model, a tied head, or of a wrong range, or the model is compiled."""
    modules = dict(model.named_modules())
    if _compiled(modules.values()):
        raise LoRAError("this model went through torch.compile, which would ignore adapters without a word; inject them first")
    shared = _tied(modules)
    for site in sites:
        linear = modules.get(site.module)
        if linear is None or not is_linear(linear):
            raise LoRAError(f"{site.module!r} is no linear layer of {type(model).__name__}")
        if site.module in shared:
            raise LoRAError(
                f"{site.module!r} shares its weight with {shared[site.module]!r}: an update of one would be missing "
                "in the other, or merged into both; leave it out of the targets"
            )
        start, stop = site.rows or (0, linear.out_features)
        if not 0 <= start < stop <= linear.out_features or site.r < 1:
            raise LoRAError(f"{site.address!r}: rows {start}..{stop} of {linear.out_features} with r={site.r} make no update")
