"""Switch to the plain computation inside a block, in the current thread."""

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
    """Make every fast module run transformers' own method inside the block, in this thread. on=False: make it fast again."""
    token = PLAIN.set(on)
    try:
        yield
    finally:
        PLAIN.reset(token)


def is_plain() -> bool:
    """Return True inside `plain`. Code that torch.compile has compiled stays fast."""
    return not torch.compiler.is_compiling() and PLAIN.get()


def wants_attentions(kwargs: Mapping[str, Any]) -> bool:
    """Return True if the caller of the model needs attention probabilities, by argument or by its configuration."""
    if kwargs.get("output_attentions"):
        return True
    collected = {} if torch.compiler.is_compiling() else _active_collector.get() or {}
    return any(key in collected for key in ATTENTIONS)
