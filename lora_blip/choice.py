"""Which adapter acts on which row of a batch: what `lora.chosen` and `lora.disabled` decide, and the hook asks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Everywhere(Enum):
    """`Everywhere.ALL`, for every row: a constant that torch.compile knows again."""

    ALL = "all"


ALL: Any = Everywhere.ALL


class LoRAError(ValueError):
    """A request that would leave the model other than was meant; nothing has been changed."""


@dataclass(frozen=True)
class Acting:
    """Who acts: none of `off`; of the others `alone`, if one is named, or each on its `rows` of a batch of `count`."""

    off: frozenset[str] = frozenset()
    alone: str = ""
    rows: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    beams: int = 1  # a beam search repeats every row so many times


ALL_ACT = Acting()


class InForce(threading.local):
    """What one thread has chosen: others may use the model at the same time."""

    def __init__(self) -> None:
        self.acting = ALL_ACT
        self.again = False  # whether it is in force once more, see `as_chosen`


class Choice:
    """One object that all adapters of a model share: to switch is to assign `now.acting`."""

    def __init__(self) -> None:
        self.now = InForce()
        self.made = False  # whether gradients were ever taken under one
        self.fast = True  # whether `fused` may stand in for `add_update`

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Choice, ()  # a copy of a model starts with no choice made

    @property
    def everyone(self) -> bool:
        """Whether every adapter acts on every row."""
        self._check()
        return self.now.acting is ALL_ACT

    def rows(self, name: str, x: Tensor) -> Any:
        """Where the rows of an adapter stand in x (rows, …): ALL, a tensor of places, or None for nowhere."""
        acting = self.now.acting
        self._check()
        if name in acting.off or acting.alone not in ("", name):
            return None
        return places(acting.rows.get(name), acting, x) if acting.count else ALL

    def _check(self) -> None:
        """LoRAError where nobody knows any more who acted."""
        if self.made and not self.now.again and torch._C._current_graph_task_id() >= 0:
            raise LoRAError(
                "a layer is computed again in the backward pass, and which adapters acted in it is not known any more; "
                "checkpoint it with context_fn=partial(lora.as_chosen, model), as load_backbone(checkpointing=True) does"
            )


def places(rows: Tensor | None, acting: Acting, x: Tensor) -> Tensor | None:
    """A beam search repeats every row of a batch so many times, side by side, and OPT flattens its tokens into rows."""
    repeats, rest = divmod(x.shape[0], acting.count)
    if rest or (repeats not in (1, acting.beams) and x.ndim > 2) or not repeats:
        raise LoRAError(
            f"a batch of {x.shape[0]} rows meets adapters that were chosen for {acting.count}; name one for every row"
        )
    if rows is None:
        return None
    return (rows.to(x.device)[:, None] * repeats + torch.arange(repeats, device=x.device)).flatten()


@contextmanager
def in_force(choice: Choice, acting: Acting, again: bool = False) -> Iterator[None]:
    now = choice.now
    before = now.acting, now.again
    now.acting, now.again = acting, again
    choice.made = choice.made or (torch.is_grad_enabled() and not again)
    try:
        yield
    finally:
        now.acting, now.again = before
