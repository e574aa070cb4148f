"""The batch size of the current call of a model. Adapters that are chosen for each row need it.

A linear cannot read the batch size from its input: OPT flattens (rows, tokens, width) into (rows · tokens, width) before its
MLP. So hooks on the outer modules of a model store the batch size of the outermost call, for each thread and asyncio task.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DEPTH = 3  # users call modules down to this depth, such as `language_model.model.decoder`; layers are deeper
CALL: ContextVar[tuple[Any, "CallBatch"] | None] = ContextVar("lora_blip_call", default=None)


class CallBatch(NamedTuple):
    """The batch of a call: the number of rows, and whether they are images. A beam search repeats texts, but not images."""

    size: int
    images: bool = False


def call_batch() -> CallBatch | None:
    """Return the batch of the current call, or None if it is unknown."""
    call = CALL.get()
    return None if call is None else call[1]


def watch(model: nn.Module, skip: Callable[[nn.Module], bool]) -> None:
    """Add hooks that store the batch size of each call. `skip` excludes modules, such as linears with adapters."""
    CALL.set(None)  # an interrupted call may have left its batch
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
    """Store the batch of the outermost call (a forward pre-hook). In compiled code, the batch size stays unknown."""
    if not torch.compiler.is_compiling() and CALL.get() is None:
        batch = batch_of((args, kwargs))
        if batch is not None:
            CALL.set((module, batch))


def forget_batch(module: nn.Module, _args: object, _output: object) -> None:
    """Forget the batch at the end of the outermost call (a forward hook, which also runs after an error)."""
    if not torch.compiler.is_compiling():
        call = CALL.get()
        if call is not None and call[0] is module:
            CALL.set(None)


def batch_of(values: Any) -> CallBatch | None:
    """Return the batch of a call: that of its first argument with at least two dimensions, or None if there is none."""
    first = next((tensor for tensor in tensors_in(values) if tensor.ndim > 1), None)
    return None if first is None else CallBatch(first.shape[0], _is_images(first))


def _is_images(tensor: Tensor) -> bool:
    """Return True for (rows, 3, height, width). Attention masks and caches also have four dimensions."""
    return tensor.ndim == 4 and tensor.shape[1] == 3 and tensor.is_floating_point()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)
