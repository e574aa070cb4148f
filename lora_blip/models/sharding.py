"""Frozen weights spread over the ranks, for backbones that are too large for each: FSDP2 (`fully_shard`), block by block."""

from typing import Any

import torch
from torch import nn

from lora_blip.lora import attached, fingerprint
from lora_blip.models.loading import Backbone

LARGE = ("vision_model", "language_model")  # the parts whose blocks are spread; the Q-Former is small beside them


def shard(backbone: Backbone, ranks: int) -> None:
    """Leave each rank its share of the blocks' frozen weights; a block is put together while it computes, then let go.

    Adapters stay whole on every rank, where DistributedDataParallel keeps them equal. From here on every rank must run the
    same forwards, and weights can be neither merged nor sampled: their fingerprints are taken now.
    """
    from torch.distributed.device_mesh import init_device_mesh  # late: a second's import that few runs need
    from torch.distributed.fsdp import fully_shard

    model = backbone.model
    found = attached.adapters(model).values()
    backbone.samples = fingerprint.samples(model, found)
    own = {parameter for each in found for parameter in each.parameters()}
    mesh = init_device_mesh(backbone.device.type, (ranks,))
    for part in filter(None, (getattr(model, name, None) for name in LARGE)):
        for block in blocks_of(part):
            fully_shard(block, mesh=mesh, ignored_params=own)


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """The members of the outermost lists of modules: the layers of a ViT, of an OPT, of both halves of a T5."""
    lists = {path: module for path, module in part.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    return [block for each in outermost for block in each]


def local_part(parameter: Any) -> torch.Tensor:
    """The part of a parameter that this rank holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
