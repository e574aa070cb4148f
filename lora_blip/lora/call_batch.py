"""The batch size of the model's call, for adapters that are chosen row by row.

A linear does not know the batch size: OPT flattens (rows, tokens, width) into (rows · tokens, width) before its MLP. So hooks
on the outer modules of a model note the batch size of the outermost call in progress, in the current thread or task.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEPTH = 3  # such as `language_model.model.decoder`: the modules that users call, without their layers
CALL: ContextVar[tuple[Any, "CallBatch"] | None] = ContextVar("lora_blip_call", default=None)


class CallBatch(NamedTuple):
    """The batch of a call: how many rows, and whether they are images, which no search repeats."""

    size: int
    images: bool = False


def call_batch() -> CallBatch | None:
    """Return the batch of the call in progress, or None if it is unknown."""
    call = CALL.get()
    return None if call is None else call[1]


def watch(model: nn.Module, skip: Callable[[nn.Module], bool]) -> None:
    """Note the batch size of calls from now on. `skip` excludes modules, such as linears with adapters."""
    CALL.set(None)  # of a call that was interrupted
    for module in _outer(model, DEPTH, skip):
        if note_batch not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(note_batch, with_kwargs=True)
            module.register_forward_hook(forget_batch, always_call=True)


def _outer(model: nn.Module, depth: int, skip: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    if model._modules and not skip(model):
        yield model
        for child in model.children() if depth else ():
            yield from _outer(child, depth - 1, skip)


def note_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The forward pre-hook. torch.compile skips it: the batch size is then unknown."""
    if not torch.compiler.is_compiling() and CALL.get() is None:
        batch = batch_of((args, kwargs))
        if batch is not None:
            CALL.set((module, batch))


def forget_batch(module: nn.Module, _args: object, _output: object) -> None:
    """The forward hook, which an error in the forward calls too."""
    if not torch.compiler.is_compiling():
        call = CALL.get()
        if call is not None and call[0] is module:
            CALL.set(None)


def batch_of(values: Any) -> CallBatch | None:
    """Return the batch by the first matrix or larger tensor among the arguments of a call, or None if there is none."""
    first = next((tensor for tensor in tensors_in(values) if tensor.ndim > 1), None)
    return None if first is None else CallBatch(first.shape[0], _is_images(first))


def _is_images(tensor: Tensor) -> bool:
    """Return True for (rows, 3, height, width): attention masks and caches have four dimensions too."""
    return tensor.ndim == 4 and tensor.shape[1] == 3 and tensor.is_floating_point()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
