"""The hook that `inject` registers: like `layer.lora_hook`, but each adapter can act on some rows of the batch only."""

from typing import Any

from torch import Tensor

from lora_blip.errors import LoRAError
from lora_blip.lora.call_batch import input_of
from lora_blip.lora.fused import updated
from lora_blip.lora.layer import AdapterStack, lora_hook, name_of
from lora_blip.lora.routing_state import ALL


def dispatching_hook(linear: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return y + Σ (alpha / r) · B A x, where each adapter adds its update to the rows on which it acts."""
    stack: AdapterStack = linear.lora
    if stack.pending.x is not None:  # `fused_pre_hook` stored the input, so `fused` adds the same update
        return updated(linear, output)
    if stack.routing.everyone:
        return lora_hook(linear, args, kwargs, output)
    if stack.merged:
        raise LoRAError("adapters were merged after they had been chosen or disabled here; call lora_blip.restore(model) first")
    x = input_of(args, kwargs)
    for key, adapter in stack.items():
        rows = stack.routing.rows(name_of(key), x)
        if rows is ALL:
            output = output + adapter(x).to(output.dtype)
        elif rows is not None:
            output = output.index_add(0, rows, adapter(x[rows]).to(output.dtype))
    return output
