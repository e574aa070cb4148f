"""Calls of transformers' modules by argument name."""

from typing import Any

from lora_blip.errors import ModelError
from lora_blip.kernels.signatures import arguments_of, version_of

UNCHECKED = {"use_cache"}  # changes no number, and a model may pass it on to its language model


def call(module: Any, **named: Any) -> Any:
    """Return module(**named). Raise ModelError if the module's `forward` has no argument of one of these names.

    transformers' `**kwargs` would accept a name that it has changed, and ignore the value.
    """
    kind = type(module)
    if missing := named.keys() - arguments_of(kind.forward) - UNCHECKED:
        raise ModelError(
            f"{kind.__name__} of {version_of(kind)} has no argument {min(missing)!r}; install a version that lora_blip is "
            "tested with: pip install 'transformers>=5.20,<5.25'"
        )
    return module(**named)
