"""LoRA for one linear layer, by a forward hook. Start here.

A frozen linear computes y = W x + b. LoRA (Hu et al. 2021, arXiv:2106.09685) adds a low-rank update, the only thing trained:

    y ← y + (alpha / r) · B A x        A: (r, in_features), Kaiming-uniform      B: (out_features, r), zeros

No module is replaced, and the model's code does not change. The adapters of a linear are in its child `linear.lora`. A forward
hook adds their updates to the output of the linear. Putting an adapter on a linear takes three lines. They do not freeze W:

    linear.lora = AdapterStack()
    linear.lora["default"] = LoRA(Site("fc1", r=8, alpha=32.0), linear.in_features, linear.out_features)
    linear.register_forward_hook(lora_hook, with_kwargs=True)

`inject` does this for every target, and freezes all parameters that belong to no adapter. By default, `fused_hook` replaces
`lora_hook`: it computes the same in fewer operations or with less memory. After an edit, `lora_hook` runs.

Read next: `sites` (`Site`), `injection` (put adapters on a model), `targets` (which linears), `merging` (add the update to W).
Then `routing` (which adapter acts on which row of a batch), `fused` (the same update, less memory), `adapter_file` (files).
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.errors import LoRAError
from lora_blip.lora.save_guard import refuse_inside_save_pretrained
from lora_blip.lora.sites import Site, name_of


class LoRA(nn.Module):
    """ΔW = (alpha / r) · B A in float32, for all or some output features. In peft: `lora_A[name]` and `lora_B[name]`.

    >>> lora = lora_blip.inject(backbone, "vit")["vision_model.encoder.layers.0.self_attn.qkv"]
    >>> assert lora.A.shape == (8, 128) and lora.B.shape == (384, 8) and not lora.B.any()  # so no output changes yet
    """

    def __init__(self, site: Site, in_features: int, out_features: int, dropout: float = 0.0, device: Any = None) -> None:
        super().__init__()
        start, stop = site.rows or (0, out_features)
        self.site, self.scale, self.dropout = site, site.alpha / site.r, dropout
        self.padding = (start, out_features - stop)  # number of output features before the range, and after it
        self.A = nn.Parameter(torch.empty(site.r, in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(stop - start, site.r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return (alpha / r) · B A dropout(x), shape (..., out_features), in float32 or in the dtype of autocast."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(x, self.A), self.B) * self.scale
        return F.pad(update, self.padding) if any(self.padding) else update

    def delta_weight(self, rows: slice | None = None) -> Tensor:
        """Return ΔW = (alpha / r) · B A in float32 or wider, shape (out_features, in_features), or only `rows` of B A."""
        dtype, B = torch.promote_types(self.A.dtype, torch.float32), self.B if rows is None else self.B[rows]
        with torch.autocast(self.A.device.type, enabled=False):
            delta = (B.to(dtype) @ self.A.to(dtype)).mul_(self.scale)
        return F.pad(delta, (0, 0, *self.padding)) if any(self.padding) and rows is None else delta

    def extra_repr(self) -> str:
        return f"r={self.site.r}, alpha={self.site.alpha:g}, dropout={self.dropout:g}"


def lora_hook(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return y + Σ (alpha / r) · B A x over the adapters that are not merged. `use_adapters` can choose among them."""
    stack, x = linear.lora, input_of(args, kwargs)
    if stack.routing is not None and stack.routing.used:  # an adapter is off, acts on some rows only, or is a DoRA
        return cast(Tensor, stack.routing.add_updates(linear, x, output))
    for key, adapter in stack.items():
        if key not in stack.merged:
            output = output + adapter(x).to(output.dtype)
    return output


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a linear, which was given by position or by a keyword of any name."""
    tensors = args or [value for value in kwargs.values() if isinstance(value, Tensor)]
    if not args and len(tensors) != 1:
        raise LoRAError(f"a linear with adapters was called with {', '.join(kwargs)}; give its input by position: linear(x)")
    return tensors[0]


class AdapterStack(nn.ModuleDict):
    """The adapters of one linear, by name. The output gets the sum of their updates.

    A key is the name of an adapter. The name of a block may follow: "default:q" changes only the rows of q in a fused qkv.
    """

    merged: frozenset[str] = frozenset()  # keys of the adapters whose update is in W
    original: Tensor | None = None  # W before the first merge; None if no adapter is merged
    routing: Any = None  # the model's `AdapterRouting`, set by `inject`

    @property
    def unmerged(self) -> list[str]:
        """Return the names of the adapters in `state_dict`: those that are not merged and belong to no `Captioner`."""
        return [name_of(key) for key in self if not self.is_left_out(key)]

    def is_left_out(self, key: str) -> bool:
        """Return True for an adapter that is not in the state_dict: it is merged, or a `Captioner` of this model loaded it."""
        return key in self.merged or (self.routing is not None and name_of(key) in self.routing.dormant)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the tensors of the adapters in `unmerged`. Raise LoRAError inside `save_pretrained` if there are any."""
        refuse_inside_save_pretrained(self.unmerged)
        destination = {} if destination is None else destination
        for key in (key for key in self if not self.is_left_out(key)):
            self[key].state_dict(destination=destination, prefix=f"{prefix}{key}.", keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load as usual. The tensors of the adapters that `state_dict` leaves out may be missing."""
        super()._load_from_state_dict(state, prefix, *args)
        for key in filter(self.is_left_out, self):
            if key in self.merged and any(name.startswith(f"{prefix}{key}.") for name in state):
                args[-1].append(f"{prefix}{key} is merged in this model only; call lora_blip.restore(model), and load again")
            for parameter, value in self[key].state_dict(prefix=f"{prefix}{key}.").items():
                state.setdefault(parameter, value)
