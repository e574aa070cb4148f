"""Detect outputs that contain NaN or infinity, and find the module and the weight that cause them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.lora.sites import is_linear


def is_invalid(output: Tensor) -> Tensor:
    """Return True, as a tensor, for NaN or +infinity in (rows, width), or in the last token of (rows, tokens, width).

    A logit of -infinity is valid: it excludes a token.
    """
    last = output[:, -1] if output.ndim == 3 else output
    return ~(last < torch.inf).all()


class OutputCheck:
    """Records whether an output of some modules is NaN or +infinity. `failed` waits for the device, so read it once."""

    def __init__(self) -> None:
        self.invalid: list[Tensor] = []

    def record(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Check an output. This is a forward hook."""
        self.invalid.append(is_invalid(output))

    @property
    def failed(self) -> bool:
        return bool(self.invalid) and bool(torch.stack(self.invalid).any())


@contextmanager
def checking_outputs(modules: Iterable[nn.Module]) -> Iterator[OutputCheck]:
    """Check all outputs of some modules inside the block."""
    check = OutputCheck()
    handles = [module.register_forward_hook(check.record) for module in modules]
    try:
        yield check
    finally:
        for handle in handles:
            handle.remove()


def nonfinite_weight(model: nn.Module) -> str:
    """Return the name of the first weight of a model that contains NaN or infinity, or ""."""
    named = ((name, each) for name, each in model.named_parameters() if each.is_floating_point())
    return next((name for name, each in named if not each.isfinite().all()), "")


def cause_of(model: nn.Module, forward: Callable[[], object]) -> str:
    """Return a text that names the weight or the module that makes the outputs of `forward` NaN or infinite."""
    if weight := nonfinite_weight(model):
        return f"the weight {weight!r} contains NaN or infinity; copy or download the base and the adapter again"
    return f"{first_nonfinite(model, forward) or 'the logits overflow'}; check the base, the adapter and its scale"


def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward`, and return a text that names the first module whose output is not finite, in the order of execution.

    Return "" if all outputs are finite.
    """
    texts: list[str] = []

    def hook_of(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor)]
            if not texts and any(not torch.isfinite(t).all() for t in tensors if t.is_floating_point()):
                kind = f"{type(module).__name__}, {tensors[0].dtype}"
                texts.append(f"the first output that is not finite is that of {path!r} ({kind})")

        return hook

    leaves = [(path, m) for path, m in model.named_modules() if not list(m.children()) or is_linear(m)]
    handles = [module.register_forward_hook(hook_of(path)) for path, module in leaves if ".lora" not in path]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return texts[0] if texts else ""
