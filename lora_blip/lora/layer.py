"""LoRA for one linear layer, by a forward hook. Start here.

A frozen linear computes y = W x + b. LoRA (Hu et al. 2021, arXiv:2106.09685) adds a low-rank update, the only thing trained:

    y ← y + (alpha / r) · B A x        A: (r, in_features), Kaiming-uniform      B: (out_features, r), zeros

No module is replaced, and the model's code does not change. The adapters of a linear are its child `linear.lora`, and a
forward hook adds their updates to what the linear returns. In its simplest form, injecting an adapter is:

    linear.lora = AdapterStack()
    linear.lora["default"] = LoRA(site, linear.in_features, linear.out_features)
    linear.register_forward_hook(lora_hook, with_kwargs=True)

What runs by default: `inject` registers `dispatch.dispatching_hook` instead. It calls `lora_hook` if every adapter acts on
every row. If rows of a batch have different adapters, each update is added to the rows of its adapter. In training, `fused`
computes the same update with less memory. Tests compare both with `lora_hook`.

Read next: `injection` (put adapters on a model), `targets` (which linears), `merging` (write the update into W),
`routing` (which adapter acts on which row), `fused` (the same update, faster), `adapter_file` (save and load).
"""

import math
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.lora.call_batch import input_of
from lora_blip.lora.save_guard import refuse_inside_save_pretrained
from lora_blip.lora.sites import Site


class LoRA(nn.Module):
    """ΔW = (alpha / r) · B A for one linear, or for a range of its output rows.

    A is (r, in_features) and B is (rows, r). Both are float32, whatever the dtype of W. B starts at zero, so a new adapter
    changes no output. In peft: `LoraLayer`.

    >>> lora = lora_blip.inject(backbone, "vit")["vision_model.encoder.layers.0.self_attn.qkv"]
    >>> assert lora.A.shape == (8, 128) and lora.delta_weight().shape == (384, 128)
    """

    def __init__(self, site: Site, in_features: int, out_features: int, dropout: float = 0.0, device: Any = None) -> None:
        super().__init__()
        start, stop = site.rows or (0, out_features)
        self.site, self.scale, self.dropout = site, site.alpha / site.r, dropout
        self.padding = (start, out_features - stop)  # output rows before and after those that the update reaches
        self.A = nn.Parameter(torch.empty(site.r, in_features, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.zeros(stop - start, site.r, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return (alpha / r) · B A dropout(x), shape (..., out_features), in float32 or in the dtype of autocast."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.A.dtype)
        x = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(x, self.A), self.B) * self.scale
        return F.pad(update, self.padding) if any(self.padding) else update

    def delta_weight(self) -> Tensor:
        """Return ΔW = (alpha / r) · B A, shape (out_features, in_features), float32 (Hu et al. 2021, eq. 3)."""
        with torch.autocast(self.A.device.type, enabled=False):
            return F.pad(self.B.float() @ self.A.float() * self.scale, (0, 0, *self.padding))

    def extra_repr(self) -> str:
        return f"r={self.site.r}, alpha={self.site.alpha:g}, dropout={self.dropout:g}"


def lora_hook(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return y + Σ (alpha / r) · B A x over the adapters of a linear that are not merged (registered with_kwargs=True)."""
    x = input_of(args, kwargs)
    for key, adapter in linear.lora.items():
        if key not in linear.lora.merged:
            output = output + adapter(x).to(output.dtype)
    return output


class AdapterStack(nn.ModuleDict):
    """The adapters of one linear, by name. Their updates add up.

    A key is the adapter's name, with ":" and the block of rows if the adapter reaches only a block, such as "default:q".
    `merged` holds the keys whose update is in the weight, and `original` is W from before. A merged adapter is not in the
    state_dict, because the weight contains its update.
    """

    routing: Any  # `attached.attach` sets these two, for the dispatching hook
    pending: Any

    def __init__(self) -> None:
        super().__init__()
        self.original: Tensor | None = None
        self.merged: frozenset[str] = frozenset()

    @property
    def unmerged(self) -> list[str]:
        return [name_of(key) for key in self if key not in self.merged]

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the tensors of the unmerged adapters. Raise LoRAError inside `save_pretrained` if there are any."""
        if self.unmerged:
            refuse_inside_save_pretrained(self.unmerged)
        destination = OrderedDict() if destination is None else destination
        for key, adapter in self.items():
            if key not in self.merged:
                adapter.state_dict(destination=destination, prefix=f"{prefix}{key}.", keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Keep merged adapters whose tensors are not in the state_dict as they are."""
        super()._load_from_state_dict(state, prefix, *args)
        for key in self.merged:
            for half, value in self[key].state_dict(prefix=f"{prefix}{key}.").items():
                state.setdefault(half, value)


def name_of(key: str) -> str:
    """Return the adapter's name in a key of `AdapterStack`."""
    return key.split(":")[0]
