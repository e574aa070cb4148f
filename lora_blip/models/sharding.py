"""Shard frozen weights over the ranks with FSDP2 (`fully_shard`), for backbones that are too large for one device."""

from typing import Any

import torch
from torch import nn

from lora_blip.lora import attached, fingerprint
from lora_blip.models.loading import Backbone

LARGE = ("vision_model", "language_model")  # the parts whose blocks are sharded; the Q-Former is small


def shard(backbone: Backbone, ranks: int) -> None:
    """Keep a share of each block's frozen weights on each rank. Move the model to the device of the backbone.

    A rank has all weights of a block on its device only while it computes the forward or the backward of the block, and while
    it divides the block here. So the model may be in the CPU's memory before this call. A device never contains all of it.

    Adapters are not sharded: DistributedDataParallel keeps them equal. After this call, every rank must run the same forwards.
    Sharded weights cannot be merged or sampled, so their fingerprints are taken first.
    """
    from torch.distributed.device_mesh import init_device_mesh  # imported here: it takes a second, and few runs need it
    from torch.distributed.fsdp import fully_shard

    model = backbone.model
    adapters = attached.adapters(model).values()
    backbone.samples = fingerprint.samples(model, adapters)
    own = {parameter for adapter in adapters for parameter in adapter.parameters()}
    mesh = init_device_mesh(backbone.device.type, (ranks,))
    for part in filter(None, (getattr(model, name, None) for name in LARGE)):
        for block in blocks_of(part):
            # True: FSDP takes each block for a root, and by default a root keeps its weights after the forward
            fully_shard(block, mesh=mesh, ignored_params=own, reshard_after_forward=True)
    model.to(backbone.device)


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """Return the members of the outermost module lists: the layers of a ViT, of an OPT, of a T5's encoder and decoder."""
    lists = {path: module for path, module in part.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [m for path, m in lists.items() if not any(path.startswith(f"{other}.") for other in lists)]
    return [block for blocks in outermost for block in blocks]


def local_part(parameter: Any) -> torch.Tensor:
    """Return the part of a parameter that is on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
