"""Decide whether a fast module runs the method of transformers that it replaces.

The module runs that method inside a block of `plain`, and for a call with arguments that the module does not support.
"""

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
    """Return True inside a block of `plain`; False in compiled code, which stays fast."""
    return not torch.compiler.is_compiling() and PLAIN.get()


def needs_library(kwargs: Mapping[str, Any], *known: str) -> bool:
    """Return True if a fast attention must run the library's own method for a call with these arguments.

    That is the case inside `plain`, and for an argument that is not None and not one of `known`. It is also the case if the
    caller of the model needs attention probabilities, by argument or by its configuration.
    """
    if is_plain() or any(value is not None and name not in known for name, value in kwargs.items()):
        return True
    collected = {} if torch.compiler.is_compiling() else _active_collector.get() or {}
    return bool(kwargs.get("output_attentions")) or any(key in collected for key in ATTENTIONS)
