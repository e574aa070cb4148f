"""The switch to the plain computation for one call, in one thread."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers.utils.output_capturing import _active_collector  # transformers 5.20 to 5.24

PLAIN: ContextVar[bool] = ContextVar("plain", default=False)
ATTENTIONS = ("attentions", "cross_attentions")


@contextmanager
def plain(on: bool = True) -> Iterator[None]:
    """Inside the block, in this thread, every fast module runs the library's own method (again fast if not `on`)."""
    token = PLAIN.set(on)
    try:
        yield
    finally:
        PLAIN.reset(token)


def is_plain() -> bool:
    """Return True inside `plain`. What torch.compile has compiled stays fast."""
    return not torch.compiler.is_compiling() and PLAIN.get()


def wants_attentions(named: Mapping[str, Any]) -> bool:
    """Return True if the caller of the model wants attention probabilities: by argument or by its configuration."""
    if named.get("output_attentions"):
        return True
    collected = {} if torch.compiler.is_compiling() else _active_collector.get() or {}
    return any(key in collected for key in ATTENTIONS)
