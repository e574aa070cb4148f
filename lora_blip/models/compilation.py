"""torch.compile for the blocks of the ViT."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lora_blip.kernels import paths
from lora_blip.lora.sites import is_compiled


def compile_blocks(model: Any, first: int = 0, **options: Any) -> None:
    """Compile the blocks of the ViT from `first` on. Hooks that are added later are ignored. options: of `torch.compile`."""
    paths.row()  # torch.compile cannot trace the code that reads the table
    for block in model.vision_model.encoder.layers[first:]:
        block.compile(**options)


def uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Run a compiled model uncompiled inside the block, for other shapes, added hooks or merged weights."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
