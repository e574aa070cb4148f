"""Variants of LoRA. Each is a class, and differs from `layer.LoRA` in a few lines.

    lora      W + ΔW with ΔW = (alpha / r) · B A                      Hu et al. 2021, arXiv:2106.09685
    rslora    the same with (alpha / √r) · B A                        Kalajdzievski 2023, arXiv:2312.03732
    dora      g ⊙ (W + ΔW) with g = m / ‖W + ΔW‖ for each row         Liu et al. 2024, arXiv:2402.09353

LoRA+ (arXiv:2402.12354) is no class: it is the setting LR_RATIO, a higher learning rate of B.
Read next: `routing_state.AdapterRouting.add_updates`, which calls `update_of`, and `merging`, which calls `change_of`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.errors import LoRAError
from lora_blip.kernels.linear import PLAIN_FORWARDS
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import Site, is_quantized, quantization_of


class RsLoRA(LoRA):
    """Rank-stabilized LoRA: ΔW = (alpha / √r) · B A, so that the size of ΔW does not shrink as r grows (theorem 3.2)."""

    def __init__(self, site: Site, in_features: int, out_features: int, dropout: float = 0.0, device: Any = None) -> None:
        super().__init__(site, in_features, out_features, dropout, device)
        self.scale = site.scale


class DoRA(LoRA):
    """Weight-decomposed LoRA: W' = g ⊙ (W + ΔW) with g = m / ‖W + ΔW‖ (eq. 5). It trains m, A and B.

    ‖·‖ and m have one number for each row of W, that is for each output feature; the paper calls them columns. m is ‖W‖ at the
    start, so that g is 1. The norm is a constant for the gradient (section 4.3). No copy of W is kept. In peft: `use_dora`.
    """

    strength = 1.0  # factor of W' − W; `rescale` sets it

    def __init__(self, site: Site, in_features: int, out_features: int, dropout: float = 0.0, device: Any = None) -> None:
        super().__init__(site, in_features, out_features, dropout, device)
        self.magnitude = nn.Parameter(torch.ones(len(self.B), dtype=torch.float32, device=device))  # `start_at` sets it

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        """Raise LoRAError: the update of DoRA needs W and y too. `inject` sets up the hook that calls `update`."""
        raise LoRAError("the update of DoRA needs the weight of its linear; put the adapter on it by lora_blip.inject")

    def update(self, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return W' x − W x = u + (g − 1) ⊙ (y − b + u), with y = W x + b and u = ΔW x. Shape of y. Dropout acts on u only."""
        u = super().forward(x)
        update = torch.addcmul(u, (y if bias is None else y - bias) + u, self.gain(weight) - 1)
        return update if self.strength == 1 else update * self.strength

    def gain(self, weight: Tensor) -> Tensor:
        """Return g = m / ‖W + ΔW‖, shape (out_features,): 1 for the features that the update does not reach."""
        norm = self.norm(weight)
        g: Tensor = self.magnitude / norm.where(norm > 0, 1)  # a row of zeros has no direction, and m = 0
        return F.pad(g, self.padding, value=1.0) if any(self.padding) else g

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:
        """Return ‖W + ΔW‖ of the rows that the update reaches, in float32 or wider."""
        rows = weight[self.padding[0] : len(weight) - self.padding[1]]
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            B, A = self.B.to(dtype), self.A.to(dtype)
            changed = torch.addmm(rows.to(dtype), B, A, alpha=self.scale)
            norm: Tensor = torch.linalg.vector_norm(changed, dim=1)
        return norm

    @torch.no_grad()
    def start_at(self, weight: Tensor) -> None:
        """Set m = ‖W‖. B must be zero: then g is exactly 1."""
        self.magnitude.copy_(self.norm(weight))


CLASSES: dict[str, type[LoRA]] = {"lora": LoRA, "rslora": RsLoRA, "dora": DoRA}  # the keys are `setting_checks.VARIANTS`
EXTRA = {"dora": ("magnitude",)}  # variant → its parameters other than A and B; a file has them by these names


def update_of(lora: LoRA, linear: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return what an adapter adds to the output y of its linear, shape of y. x: the input of the linear."""
    if not isinstance(lora, DoRA):
        update: Tensor = lora(x)
        return update
    if linear.lora.original is None:
        return lora.update(x, y, linear.weight, linear.bias)
    weight = original_of(linear)  # another adapter is merged, and y is not W x + b
    return lora.update(x, F.linear(x, weight, linear.bias), weight, linear.bias)


def change_of(lora: LoRA, weight: Tensor) -> Tensor:
    """Return what a merge adds to the original weight W: ΔW, or W' − W of DoRA. Shape of W, in float32 or wider."""
    delta = lora.delta_weight()
    if not isinstance(lora, DoRA):
        return delta
    change = delta + (lora.gain(weight) - 1)[:, None] * (weight + delta)
    return change if lora.strength == 1 else change * lora.strength


def rescale(lora: LoRA, factor: float) -> None:
    """Multiply the change that an adapter makes by a factor: 1: as trained; 0: the base. Call this once for a new adapter."""
    if isinstance(lora, DoRA):  # its scale is also in the norm, so it would not multiply the whole change
        lora.strength = factor
    else:
        lora.scale *= factor


def is_rescaled(lora: LoRA) -> bool:
    """Return True if the adapter has another scale than a new one of its site, for example by `rescale`."""
    new = type(lora)(lora.site, 1, len(lora.B) + sum(lora.padding), device="meta")
    return lora.scale != new.scale or (isinstance(lora, DoRA) and lora.strength != 1)


def original_of(linear: Any) -> Tensor:
    """Return W before the first merge, on the device of W."""
    weight: Tensor = linear.weight if linear.lora.original is None else linear.lora.original
    return weight.to(linear.weight.device)


def check_decomposable(site: Site, linear: Any) -> None:
    """Raise LoRAError if the variant is DoRA and the linear does not compute W x + b with a plain float weight."""
    kind = type(linear)
    plain = kind.forward in PLAIN_FORWARDS and "forward" not in vars(linear)
    if site.variant == "dora" and (not plain or is_quantized(linear)):
        fix = 'load the base in full precision: BASE_DTYPE = "fp32" (--base-dtype fp32), or train with VARIANT = "lora"'
        raise LoRAError(
            f"{site.module!r} is a {kind.__name__} with a {type(linear.weight).__name__}, and DoRA needs an nn.Linear with a "
            "weight of 16 or 32 bits; "
            + (
                fix
                if quantization_of(linear)
                else 'use VARIANT = "lora" (--variant lora), or leave this module out of the targets'
            )
        )
