"""torch.compile for the blocks of the ViT."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lora_blip.lora.sites import compiled


def compile_blocks(model: Any, first: int = 0) -> None:
    """torch.compile for the blocks of the ViT from `first` on, with the hooks they carry now: later ones would be ignored."""
    for block in model.vision_model.encoder.layers[first:]:
        block.compile()


def uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Inside the block a model that was compiled runs as it is written: other shapes, hooks to look at it, merged weights."""
    return torch.compiler.set_stance("force_eager") if compiled(model) else nullcontext()
