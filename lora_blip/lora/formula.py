"""Compare what an adapter adds with ΔW x, so that an edit of `layer.LoRA` is not lost in a merge or in a command on files.

`fused.is_product` is the same check for the fused update.
"""

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_blip.lora.fused import is_product
from lora_blip.lora.layer import AdapterStack, lora_hook
from lora_blip.lora.sites import Site
from lora_blip.lora.variants import CLASSES, EXTRA, DoRA, change_of, original_of


@torch.no_grad()
def adds_delta(linear: Any, key: str) -> bool:
    """Return True if the hook of an adapter adds ΔW x, up to rounding, for 16 random inputs x and 64 rows of ΔW.

    key: the key of the adapter in the stack of the linear. Its own A and B are used, and no dropout.
    """
    lora = copy.deepcopy(linear.lora[key]).to("cpu", torch.float64).eval()
    first, rows = lora.padding[0], min(64, len(lora.B))
    with torch.autocast("cpu", enabled=False):
        generator, out_features = torch.Generator("cpu").manual_seed(0), len(lora.B) + sum(lora.padding)
        widths = lora.A.shape[1], out_features
        x, y = (torch.randn(16, width, generator=generator, dtype=torch.float64, device="cpu") for width in widths)
        x[8:] *= 100
        if isinstance(lora, DoRA):
            weight = original_of(linear).double().cpu()
            bias = None if linear.bias is None else linear.bias.double().cpu()
            change = change_of(lora, weight)[first : first + rows]
            update = lora.update(x, F.linear(x, weight, bias), weight, bias)
        else:  # if `is_product`, the other rows need not be computed
            change = lora.delta_weight(slice(rows)) if is_product(lora) else lora.delta_weight()[first : first + rows]
            y *= max(float(F.linear(x, change.double()).abs().max()), torch.finfo(torch.float32).tiny)
            stack = AdapterStack()
            stack["default"] = lora
            update = lora_hook(SimpleNamespace(lora=stack), (x,), {}, y) - y
        expected: Tensor = F.linear(x, change.double())
    difference = float((update[:, first : first + rows] - expected).abs().max())
    terms = abs(lora.scale) * float(lora.B.abs().max()) * float(F.linear(x, lora.A).abs().max())
    return not math.isfinite(difference) or difference <= 1e-3 * float(expected.abs().max()) + 1e-9 * terms


def other_formula(variant: str) -> str:
    """Return why a command that reads only files would be wrong about adapters of a variant, or "".

    Such a command computes s · B A, and m of DoRA. A class may compute something else after an edit, or have more parameters.
    """
    kind, extra = CLASSES[variant], EXTRA.get(variant, ())
    plain = extra == ("magnitude",) if kind is DoRA else not extra and is_product(kind(Site("", 2, variant=variant), 4, 6))
    return (
        "" if plain else f"this computes {variant} by its formula, but the class {kind.__name__} here computes something else"
    )
