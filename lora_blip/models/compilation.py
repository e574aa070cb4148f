"""torch.compile for a training step: the whole loss with its backward pass, or the blocks of the ViT."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from lora_blip.kernels import paths
from lora_blip.kernels.linear import kernel_in_graphs
from lora_blip.lora.sites import is_compiled

Loss = Callable[..., Tensor]


def compile_blocks(model: Any, first: int = 0, **options: Any) -> None:
    """Compile the blocks of the ViT from `first` on. Hooks that are added later are ignored. options: of `torch.compile`."""
    _prepare()
    for block in model.vision_model.encoder.layers[first:]:
        block.compile(**options)


def compile_loss(model: Any, loss: Loss, **options: Any) -> Loss:
    """Return a compiled function that computes the loss of a model. Hooks that are added later are ignored.

    One graph for the whole loss has less overhead than a graph for each layer. Sizes that change from batch to batch must be
    marked by `mark_sizes`.
    """
    _prepare()
    # This marks the model for `is_compiled`. A call of the model itself stays uncompiled. PyTorch drops it in copies.
    model._compiled_call_impl = model._call_impl
    return torch.compile(loss, **options)


def _prepare() -> None:
    """Read the table of paths, and test the kernel of oneDNN. torch.compile cannot trace this code; both results are kept."""
    paths.row()
    kernel_in_graphs()


def uses_compiled_loss(model: Any) -> bool:
    """Return True after `compile_loss`, until somebody sets `_compiled_call_impl` of the model to None."""
    return model._compiled_call_impl is not None


def mark_sizes(values: Any, images: bool = False) -> None:
    """Let the sizes of tensors change without a new compilation. values: a tensor, or a dataclass with tensors.

    images: only the first size changes. A size of 1 still has its own graph, because PyTorch fixes it.
    """
    if isinstance(values, Tensor):
        for dimension in range(1 if images else values.ndim):
            if values.shape[dimension] > 1:
                torch._dynamo.maybe_mark_dynamic(values, dimension)
    elif is_dataclass(values):
        for value in vars(values).values():
            mark_sizes(value)


def uncompiled(model: Any) -> AbstractContextManager[Any]:
    """Run a compiled model uncompiled inside the block, for other shapes, added hooks or merged weights."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
