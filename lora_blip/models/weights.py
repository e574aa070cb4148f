"""Frozen weights kept in the dtype in which autocast reads them.

Under autocast every linear casts its weight to 16 bits in every forward pass. What never changes may be cast once: the
outputs are the same bits, for half the memory and none of the time. What autocast leaves in float32, as embeddings and
norms, stays so.
"""

from typing import Any

import torch
from torch import nn

from lora_blip.kernels.linear import PLAIN_LINEARS, PLAIN_TENSORS
from lora_blip.lora import attached, fingerprint
from lora_blip.lora.sites import TIED, tied
from lora_blip.models.loading import Backbone
from lora_blip.models.precision import DTYPES


def cast_once(backbone: Backbone, precision: str) -> None:
    """Cast the linears of a float32 base, a decoder's head too, which then no longer shares the memory of the embeddings.

    The model's own heads stay, in whose dtype retrieval compares and matches under autocast, too (`matching.projected`).

    Adapters stay as they are; merge them before, and ΔW is rounded together with W. The base's fingerprint is taken
    before. Does nothing in fp32, nor to weights that are in 16 bits already. Repeating a call changes nothing.
    """
    if precision == "fp32":
        return
    model, dtype = backbone.model, DTYPES[precision]
    backbone.samples = backbone.samples or fingerprint.samples(model, attached.adapters(model).values())
    shared = tied(model)
    for path, module in model.named_modules():
        plain = type(module) in PLAIN_LINEARS and type(module.weight) in PLAIN_TENSORS
        if plain and module.weight.dtype == torch.float32 and "." in path:
            setattr(module, TIED, shared.get(path, getattr(module, TIED, "")))
            module.weight = frozen_copy(module.weight, dtype)
            module.bias = None if module.bias is None else frozen_copy(module.bias, dtype)


def frozen_copy(parameter: Any, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
