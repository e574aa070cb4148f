"""Choose which adapters act: only one, one for each row of a batch, or none.

`use_adapters` and `disable_adapters` apply to the current thread or asyncio task only. `checkpoint_context` makes the same
adapters active while a layer is computed again in the backward pass.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from lora_blip.errors import LoRAError
from lora_blip.lora.attached import (
    Loaded,
    check_names,
    check_unheld,
    every_adapter,
    has_adapters,
    has_merged,
    model_of,
    refuse_baked,
    share_routing,
)
from lora_blip.lora.call_batch import call_batch, watch
from lora_blip.lora.layer import AdapterStack
from lora_blip.lora.routing_state import CURRENT, ActiveAdapters, enter, leave, recomputing


@contextmanager
def use_adapters(model: nn.Module | Loaded, names: str | Sequence[str | None] | None, beams: int = 1) -> Iterator[None]:
    """Use one adapter alone inside the block, or one for each row of a batch.

    names: the name of an adapter, or a list with one entry for each row, such as `["caption", "vqa", None]`. In a list, None is
    the base without an adapter. If `names` itself is None, the block changes nothing.
    beams: how often a beam search repeats each row.

    No weight is copied. Each row of a mixed batch has the same result as in a separate batch. If blocks are nested, the
    innermost one applies, but an adapter stays disabled inside a block of `disable_adapters`. A block applies to the thread or
    asyncio task that enters it, and to tasks that are started inside. So several threads or tasks can share a model. Do not
    `yield` from a generator inside the block: the block would apply to the caller too, as with torch.no_grad.

    Raise LoRAError for an unknown name, an empty list or merged adapters. The forward raises LoRAError if the batch has another
    number of rows. Two mistakes are not detected: with `beams` > 1, a batch of len(names) · beams different texts, which is
    treated as a beam search; and a model whose first dimension is time, in which adapters may act on wrong rows. In BLIP and
    BLIP-2, the first dimension is always the rows.

    In peft: `set_adapter`, which applies to all threads; for rows, the argument `adapter_names` of the forward.

    >>> adapter = lora_blip.load_adapter(backbone, "latest", name="cubes")
    >>> with lora_blip.use_adapters(backbone, ["cubes", None]):
    ...     states = backbone.model.vision_model(torch.zeros(2, 3, 96, 96)).last_hidden_state
    """
    model = model_of(model, names, 'lora_blip.use_adapters(backbone, "default")')
    if names is None:
        yield
        return
    if not isinstance(names, Iterable):
        fix = 'give a name, such as "default", or a list with one name for each row'
        raise LoRAError(f"the names of adapters are of type {type(names).__name__}; {fix}")
    each = [names] if isinstance(names, str) else list(names)
    check_names(model, [name for name in each if name is not None])
    if not each:
        raise LoRAError("the list of adapters is empty; name one for every row, such as ['default', None] (None is the base)")
    if type(beams) is not int or beams < 1:
        raise LoRAError(f"beams = {beams!r}: expected a whole number of at least 1, such as beams=3")

    def active(outer: ActiveAdapters) -> ActiveAdapters:
        off = ActiveAdapters(outer.off, outer.all_off)
        if isinstance(names, str):
            return replace(off, alone=names)
        device = next((lora.A.device for _, lora in every_adapter(model)), None)
        rows = {name: [row for row, chosen in enumerate(each) if chosen == name] for name in each if name is not None}
        numbers = {name: torch.tensor(each_row, device=device) for name, each_row in rows.items()}
        return replace(off, rows=numbers, count=len(each), beams=beams)

    if not isinstance(names, str):
        watch(model, skip=has_adapters)
    with _block(model, "chosen", active):
        yield


@contextmanager
def disable_adapters(model: nn.Module | Loaded, *names: str) -> Iterator[None]:
    """Disable the named adapters inside the block, in this thread or task.

    If no name is given, disable all, and those that are loaded during the block too. The adapter of a `Captioner` still acts
    in the captioner's own calls. Raise LoRAError for an unknown name, for the name of such an adapter, and if adapters are
    merged. In peft: `disable_adapter`.

    >>> with lora_blip.disable_adapters(backbone):
    ...     states = backbone.model.vision_model(torch.zeros(1, 3, 96, 96)).last_hidden_state
    """
    model = model_of(model, next(iter(names), None), 'lora_blip.disable_adapters(backbone, "default")')
    check_names(model, names)
    check_unheld(model, *names)
    refuse_baked(model)

    def active(outer: ActiveAdapters) -> ActiveAdapters:
        return replace(outer, off=outer.off | set(names)) if names else ActiveAdapters(outer.off, all_off=True)

    with _block(model, "disabled", active):
        yield


@contextmanager
def _block(model: nn.Module, verb: str, active: Callable[[ActiveAdapters], ActiveAdapters]) -> Iterator[None]:
    """Enter a block. `active(outer)` returns its adapters. `outer` has those of the block around it."""
    routing = share_routing(model)
    with routing.lock:  # no merge can start between the check and the entry
        if has_merged(model):
            raise LoRAError(f"adapters are merged into the weights, so none can be {verb}; call restore(model) first")
        block = enter(routing, active(routing.active), model=weakref.ref(model))
    try:
        yield
    finally:
        leave(block)


def check_block(model: nn.Module) -> None:
    """Raise LoRAError if the current block names an adapter that is no longer on the model.

    A task or thread that was started in a block keeps the block after its end, when `eject` may remove the adapter.
    """
    block = CURRENT.get()
    while block is not None:
        if block.model is not None and block.model() is model and not block.ended:
            check_names(model, filter(None, (block.active.alone, *block.active.rows)))
        block = block.outer


def adapters_of_rows(model: nn.Module) -> list[str | None]:
    """Return the names that a block of `use_adapters` gives to the rows of a batch, or [] if it does not choose by row."""
    if CURRENT.get() is None:
        return []  # without a walk over the modules
    active = share_routing(model).active
    names: list[str | None] = [None] * active.count
    for name, rows in active.rows.items():
        for row in rows.tolist():
            names[row] = name
    return names


def checkpoint_context(model: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return two contexts for activation checkpointing: for the forward, and for the recomputation with the same adapters.

    Use it as `torch.utils.checkpoint(…, context_fn=partial(checkpoint_context, model))`. The backward pass may run after the
    block of `use_adapters` has ended, inside another block, or in another thread.
    """
    routings = {stack.routing: None for stack in model.modules() if isinstance(stack, AdapterStack)}
    blocks = [(routing, routing.block) for routing in routings]
    again = [(r, r.active, b.batch if b and b.recomputes else call_batch()) for r, b in blocks]
    return nullcontext(), recomputing(again)
