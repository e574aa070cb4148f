"""Which adapters are active in the current thread or task, and on which rows of a batch. `routing` changes this state.

The current block of `use_adapters` or `disable_adapters` is in a ContextVar, so each thread and each asyncio task has its own.
The `AdapterRouting` of a model also contains the set of all its blocks, because `merge` must detect those of other threads.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, TypeVar

import torch
from torch import Tensor, nn

from lora_blip.errors import LoRAError
from lora_blip.lora.call_batch import CallBatch, call_batch
from lora_blip.lora.sites import name_of
from lora_blip.lora.variants import update_of
from lora_blip.runtime.counts import counted

Result = TypeVar("Result")


class Everywhere(Enum):
    """`Everywhere.ALL` means every row. It is an enum member, which torch.compile treats as a constant."""

    ALL = "all"


ALL: Any = Everywhere.ALL


@dataclass(frozen=True)
class ActiveAdapters:
    """Which adapters act: all that are not in `off`. If `all_off`, none acts, except those of captioners.

    If `alone` is not empty, only the adapter of that name acts. If `count` > 0, each adapter acts only on its `rows`.
    """

    off: frozenset[str] = frozenset()
    all_off: bool = False
    alone: str = ""
    rows: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0  # rows of the batch; 0: the adapters act on every row
    beams: int = 1  # how often a beam search repeats every row

    def selects(self, name: str) -> bool:
        """Return True if the block names this adapter."""
        return name == self.alone or name in self.rows


ALL_ACTIVE = ActiveAdapters()


class AdapterRouting:
    """The routing that all linears of a model share. `active` returns the adapters of the current thread or task."""

    def __init__(self, fast: bool = True, dormant: frozenset[str] = frozenset(), has_dora: bool = False) -> None:
        self.blocks: set[Block] = set()  # the active ones of all threads and tasks
        self.dormant = dormant  # adapters that act only in a block of `use_adapters` that names them
        self.has_dora = has_dora  # True once an adapter was a DoRA
        self.entered = bool(dormant)  # True once a block was entered, too
        self.used = self.entered or has_dora  # `lora_hook` reads it; an attribute is faster than a property
        self.recorded = False  # True once a block was entered with gradients on
        self.fast = fast  # True if `fused` may be used
        self.lock = threading.RLock()  # held while a block is entered or a weight is written

    def __reduce__(self) -> tuple[type, tuple[bool, frozenset[str], bool]]:
        return AdapterRouting, (self.fast, self.dormant, self.has_dora)  # a copy of a model is in no block

    def sleep(self, name: str) -> None:
        """Let an adapter act only in blocks of `use_adapters` that name it."""
        self.dormant |= {name}
        self.entered = self.used = True

    @property
    def block(self) -> Optional["Block"]:
        """Return the innermost block of this model in the current context."""
        block = CURRENT.get() if self.entered else None  # torch.compile cannot trace a ContextVar
        while block is not None and (block.routing is not self or block.ended):
            block = block.outer
        return block

    @property
    def active(self) -> ActiveAdapters:
        """Return the active adapters of the current thread or task."""
        block = self.block
        return ALL_ACTIVE if block is None else block.active

    @property
    def all_act_on_all_rows(self) -> bool:
        """Return True if every adapter acts on every row."""
        block = self.block
        self._check(block)
        return not self.dormant and (block is None or block.active is ALL_ACTIVE)

    def add_updates(self, linear: Any, x: Tensor, output: Tensor) -> Tensor:
        """Return y + Σ (alpha / r) · B A x, in which each adapter adds its update to the rows on which it acts.

        x: the input of a linear (rows, …). output: its output y. This is the loop of `lora_hook`, with rows, and with the
        update of DoRA, which needs y. Each update is that of the adapter alone, so the order of the adapters changes only the
        rounding.
        """
        stack, y, block = linear.lora, output, self.block
        self._check(block)
        if stack.merged and block is not None and block.active is not ALL_ACTIVE:
            raise LoRAError(
                "adapters were merged after they had been chosen or disabled here; call lora_blip.restore(model) first"
            )
        for key, adapter in list(stack.items()):  # a copy, because another thread may put an adapter on this linear
            rows = None if key in stack.merged else self.rows(name_of(key), x)
            if rows is ALL:
                output = output + update_of(adapter, linear, x, y).to(output.dtype)
            elif rows is not None:
                output = output.index_add(0, rows, update_of(adapter, linear, x[rows], y[rows]).to(output.dtype))
        return output

    def rows(self, name: str, x: Tensor) -> Any:
        """Return the rows of x (rows, …) on which an adapter acts: ALL, a tensor of row numbers, or None for no row."""
        block = self.block
        self._check(block)
        active = ALL_ACTIVE if block is None else block.active
        if name in active.off or active.alone not in ("", name) or (active.all_off and name not in self.dormant):
            return None
        if block is None or not active.count:
            return None if name in self.dormant and name != active.alone else ALL
        return row_numbers(active.rows.get(name), active, x, block.batch if block.recomputes else call_batch())

    def _check(self, block: Optional["Block"]) -> None:
        """Raise LoRAError if a layer is computed again in the backward pass, and its active adapters are unknown."""
        if self.recorded and not (block is not None and block.recomputes) and torch._C._current_graph_task_id() >= 0:
            raise LoRAError(
                "a layer is computed again in the backward pass, but its active adapters are unknown; "
                "checkpoint it with context_fn=partial(lora_blip.lora.routing.checkpoint_context, model), as "
                "load_backbone(checkpointing=True) does"
            )


@dataclass(eq=False)
class Block:
    """A block of `use_adapters` or `disable_adapters`, or one of `checkpoint_context` that repeats an earlier block."""

    routing: AdapterRouting
    active: ActiveAdapters
    outer: Optional["Block"]  # the enclosing block, perhaps of another model
    recomputes: bool = False  # True while a layer is computed again, see `checkpoint_context`
    batch: CallBatch | None = None  # the batch of the call that is recomputed
    model: weakref.ref[nn.Module] | None = None  # the model that `use_adapters` was called with
    ended: bool = False  # True if the block ended while it was not the current one; CURRENT may still hold it


CURRENT: ContextVar[Block | None] = ContextVar("lora_blip_block", default=None)


def row_numbers(rows: Tensor | None, active: ActiveAdapters, x: Tensor, batch: CallBatch | None = None) -> Tensor | None:
    """Return the numbers of an adapter's rows in the first dimension of x (rows, …), or None if it has none.

    batch: the batch of the model's call. A beam search repeats each row `beams` times, and the copies are adjacent. It does not
    repeat images. A layer may flatten (rows, tokens, width) into x (rows · tokens, width): then x has more rows than `batch`.
    Raise LoRAError if the number of rows is not that of the chosen adapters.
    """
    if x.ndim < 2:
        raise LoRAError(
            "adapters were chosen for each row of a batch, but the input is a vector without a batch dimension; give x[None]"
        )
    size, beams = x.shape[0], 1 if batch is not None and batch.images else active.beams
    sizes = (active.count, active.count * beams)
    flattened = batch is not None and batch.size > 0 and x.ndim == 2 and size % batch.size == 0
    known = batch is None or batch.size in sizes
    if not known or not (size in sizes or flattened):
        count = size if batch is None or known else batch.size
        raise LoRAError(
            f"a batch has {counted(count, 'row')}, but adapters were chosen for {active.count}; {_fix(count, active)}"
        )
    if rows is None:
        return None
    repeats = size // active.count
    return (rows.to(x.device)[:, None] * repeats + torch.arange(repeats, device=x.device)).flatten()


def _fix(count: int, active: ActiveAdapters) -> str:
    """Return how to choose adapters for a batch with `count` rows."""
    beams, rest = divmod(max(count, active.count), max(1, min(count, active.count)))
    fix = f". For a beam search with num_beams={beams}: use_adapters(model, names, beams={beams}), with one name per image"
    return "name one for every row" + ("" if rest or active.beams > 1 else fix)


def outside_blocks(act: Callable[[], Result]) -> Result:
    """Return `act()`. If a block of `use_adapters` around this call chooses adapters by row, `act` is outside of all blocks."""
    block = CURRENT.get()
    while block is not None and not block.active.count:
        block = block.outer
    if block is None:
        return act()

    def run() -> Result:
        CURRENT.set(None)
        return act()

    return copy_context().run(run)


def enter(
    routing: AdapterRouting, active: ActiveAdapters, recomputes: bool = False, batch: CallBatch | None = None,
    model: weakref.ref[nn.Module] | None = None,
) -> Block:  # fmt: skip
    """Start a block in this thread or task."""
    block = Block(routing, active, CURRENT.get(), recomputes, batch, model)
    with routing.lock:
        routing.blocks.add(block)
    routing.entered = routing.used = True
    routing.recorded = routing.recorded or (torch.is_grad_enabled() and not recomputes)
    CURRENT.set(block)
    return block


def leave(block: Block) -> None:
    """End a block. Blocks may end in any order and in any thread."""
    with block.routing.lock:
        block.routing.blocks.discard(block)
    if CURRENT.get() is block:
        CURRENT.set(block.outer)
    else:
        block.ended = True


@contextmanager
def recomputing(blocks: list[tuple[AdapterRouting, ActiveAdapters, CallBatch | None]]) -> Iterator[None]:
    """Enter the blocks again that were active in the first forward of a layer. This may be in another thread."""
    entered = [enter(routing, active, recomputes=True, batch=batch) for routing, active, batch in blocks]
    try:
        yield
    finally:
        for block in reversed(entered):
            leave(block)
