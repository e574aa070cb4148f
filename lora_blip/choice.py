"""Which adapter acts on which row of a batch: what `lora.chosen` and `lora.disabled` decide, and the hook asks.

A block of `chosen` or `disabled` is stored in a ContextVar, so each thread and each asyncio task has its own. The
`Choice` of a model also keeps the set of all its blocks: `merge` must know about those of other threads and tasks.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

import torch
from torch import Tensor

from lora_blip.call_batch import CallBatch, call_batch
from lora_blip.errors import LoRAError


class Everywhere(Enum):
    """`Everywhere.ALL`, for every row: a constant that torch.compile knows again."""

    ALL = "all"


ALL: Any = Everywhere.ALL


@dataclass(frozen=True)
class Acting:
    """Who acts: none of `off`; of the others `alone`, if one is named, or each on its `rows` of a batch of `count`."""

    off: frozenset[str] = frozenset()
    alone: str = ""
    rows: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    beams: int = 1  # a beam search repeats every row so many times

    def names(self, name: str) -> bool:
        """Return True if the block selects this adapter by its name."""
        return name == self.alone or name in self.rows


ALL_ACT = Acting()


class Choice:
    """One object that all adapters of a model share; `acting` is what the current thread or task has chosen."""

    def __init__(self, fast: bool = True) -> None:
        self.blocks: set[Block] = set()  # the active ones of all threads and tasks
        self.used = False  # True once a block was entered
        self.made = False  # whether gradients were ever taken under one
        self.fast = fast  # whether `fused` may stand in for `add_update`
        self.lock = threading.RLock()  # held while a block is entered or a weight is written

    def __reduce__(self) -> tuple[type, tuple[bool]]:
        return Choice, (self.fast,)  # a copy of a model starts outside of every block

    @property
    def block(self) -> Optional["Block"]:
        """The innermost block of this model in the current context."""
        block = CURRENT.get() if self.used else None
        while block is not None and (block.choice is not self or block.left):
            block = block.outer
        return block

    @property
    def acting(self) -> Acting:
        block = self.block
        return ALL_ACT if block is None else block.acting

    @property
    def everyone(self) -> bool:
        """Whether every adapter acts on every row."""
        block = self.block
        self._check(block)
        return block is None or block.acting is ALL_ACT

    def rows(self, name: str, x: Tensor) -> Any:
        """Where the rows of an adapter stand in x (rows, …): ALL, a tensor of places, or None for nowhere."""
        block = self.block
        self._check(block)
        if block is None:
            return ALL
        acting = block.acting
        if name in acting.off or acting.alone not in ("", name):
            return None
        if not acting.count:
            return ALL
        return places(acting.rows.get(name), acting, x, block.batch if block.again else call_batch())

    def _check(self, block: Optional["Block"]) -> None:
        """LoRAError where nobody knows any more who acted."""
        if self.made and not (block is not None and block.again) and torch._C._current_graph_task_id() >= 0:
            raise LoRAError(
                "a layer is computed again in the backward pass, and which adapters acted in it is not known any more; "
                "checkpoint it with context_fn=partial(lora.as_chosen, model), as load_backbone(checkpointing=True) does"
            )


@dataclass(eq=False)
class Block:
    """A `with` block of `chosen` or `disabled`, or of `as_chosen`, which repeats an earlier one."""

    choice: Choice
    acting: Acting
    outer: Optional["Block"]  # the block of any model around it
    again: bool = False  # True in a recomputation, see `as_chosen`
    batch: CallBatch | None = None  # of the call that is recomputed
    left: bool = False  # True if the block ended while another block or another context was current


CURRENT: ContextVar[Block | None] = ContextVar("lora_blip_block", default=None)


def places(rows: Tensor | None, acting: Acting, x: Tensor, batch: CallBatch | None = None) -> Tensor | None:
    """Return where an adapter's rows are in the first dimension of x (rows, …), or None for nowhere.

    A beam search repeats every row side by side, and no image. A matrix (rows · tokens, width) holds the tokens of a row
    side by side if `batch`, that of the model's call, says so. Raise LoRAError if the batch is of another size.
    """
    if x.ndim < 2:
        raise LoRAError("a vector without a batch dimension meets adapters that were chosen row by row; give x[None]")
    size, beams = x.shape[0], 1 if batch is not None and batch.images else acting.beams
    sizes = (acting.count, acting.count * beams)
    flattened = batch is not None and batch.size > 0 and x.ndim == 2 and size % batch.size == 0
    known = batch is None or batch.size in sizes
    if not known or not (size in sizes or flattened):
        found = size if batch is None or known else batch.size
        raise LoRAError(f"a batch of {found} rows meets adapters that were chosen for {acting.count}; name one for every row")
    if rows is None:
        return None
    repeats = size // acting.count
    return (rows.to(x.device)[:, None] * repeats + torch.arange(repeats, device=x.device)).flatten()


def enter(choice: Choice, acting: Acting, again: bool = False, batch: CallBatch | None = None) -> Block:
    """Make a block the current one of this thread or task."""
    block = Block(choice, acting, CURRENT.get(), again, batch)
    with choice.lock:
        choice.blocks.add(block)
    choice.used = True
    choice.made = choice.made or (torch.is_grad_enabled() and not again)
    CURRENT.set(block)
    return block


def leave(block: Block) -> None:
    """End a block; blocks may end in any order and in any thread."""
    with block.choice.lock:
        block.choice.blocks.discard(block)
    if CURRENT.get() is block:
        CURRENT.set(block.outer)
    else:
        block.left = True


@contextmanager
def in_force(blocks: list[tuple[Choice, Acting, CallBatch | None]]) -> Iterator[None]:
    """Repeat blocks that were current when a layer was first computed, also in another thread."""
    entered = [enter(choice, acting, again=True, batch=batch) for choice, acting, batch in blocks]
    try:
        yield
    finally:
        for block in reversed(entered):
            leave(block)
