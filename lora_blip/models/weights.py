"""Cast frozen weights once to the dtype of autocast.

Under autocast, every linear casts its weight to 16 bits in every forward. A frozen weight can be cast once instead. The outputs
have the same bits, the weights need half the memory, and no time is spent on casts. Modules that autocast keeps in float32,
such as embeddings and norms, are not cast.
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
    """Cast the linears of a float32 base. Do nothing in fp32 or to weights in 16 bits. Repeating a call changes nothing.

    The head of a decoder is cast too, so it no longer shares its memory with the embeddings. Direct children of the model are
    not cast: they are the heads of retrieval, which compute similarities and ITM in float32 (`matching.projected`). Unmerged
    adapters are not cast. If adapters are merged before the cast, ΔW is rounded together with W. The fingerprint of the base is
    taken before the cast.
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
    """Return a frozen copy of a parameter in another dtype."""
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
