"""Check that updates can be written into the weights. All linears are checked before a weight is changed."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_hooks_with_kwargs

from lora_blip.errors import LoRAError
from lora_blip.kernels.linear import PLAIN_FORWARDS, PLAIN_TENSORS
from lora_blip.lora.attached import OURS
from lora_blip.lora.formula import adds_delta
from lora_blip.lora.sites import is_quantized, modules_of, name_of, refuse_meta


class OtherUpdateError(LoRAError):
    """A user has edited `forward` of a class, or the hook, and not `delta_weight`, or the other way round.

    difference: the text about it, without the effect and the fix.
    """

    def __init__(self, difference: str) -> None:
        super().__init__(f"{difference}, so a merge would change the results; change both, or use the adapter unmerged")
        self.difference = difference


def check_mergeable(model: nn.Module, keys: Mapping[str, Collection[str]]) -> None:
    """Raise LoRAError, with the module, if an update cannot be written into a weight. keys: {path: keys in its stack}."""
    modules = modules_of(model)
    memory = _memory(modules)
    for path in keys:
        linear: Any = modules[path]
        _check_weight(path, linear)
        if other := _overlapping(f"{path}.weight", linear.weight, memory):
            raise LoRAError(
                f"{path!r} shares the memory of its weight with {other!r}: a merge would change both. "
                "Use the adapter unmerged, or give it its own weight: linear.weight = nn.Parameter(linear.weight.clone())"
            )
    for path, own in keys.items():
        _check_update(path, modules[path], own)


def _check_update(path: str, linear: Any, keys: Collection[str]) -> None:
    """Raise OtherUpdateError if the hook of an adapter adds something other than ΔW x."""
    for key in keys:
        if not adds_delta(linear, key):
            raise OtherUpdateError(
                f"`forward` and `delta_weight` of {type(linear.lora[key]).__name__} differ: the hook of adapter "
                f"{name_of(key)!r} on {path!r} adds something other than ΔW x"
            )


def check_stored(path: str, linear: Any, effect: str = "the original weight cannot be put back; first") -> None:
    """Raise LoRAError if a weight is not a parameter or a buffer, but computed in each forward."""
    weight = linear.weight
    if weight is not linear._parameters.get("weight") and weight is not linear._buffers.get("weight"):
        raise LoRAError(
            f"{path!r} computes its weight in each forward (parametrize, weight_norm, prune), so {effect} make it a parameter "
            "again: torch.nn.utils.parametrize.remove_parametrizations(linear, 'weight'), remove_weight_norm(linear) or "
            "prune.remove(linear, 'weight')"
        )


def _check_weight(path: str, linear: Any) -> None:
    refuse_meta(path, linear)
    if is_quantized(linear):
        kinds = dict.fromkeys((type(linear).__name__, type(getattr(linear, "weight", None)).__name__))
        raise LoRAError(
            f"{path!r} is quantized ({', '.join(kinds)}): merging would round the update away; "
            "use the adapter unmerged, load the base in fp16, bf16 or fp32, or write a dequantized and merged folder: "
            "lora-blip export RUN --output-dir FOLDER"
        )
    check_stored(path, linear, "an update would be lost; use the adapter unmerged, or first")
    weight = linear.weight
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        raise LoRAError(f"{path!r} was created in torch.inference_mode and cannot be changed; load the base outside of it")
    if _overlaps_itself(weight):
        raise LoRAError(
            f"{path!r} has an expanded weight, whose rows share memory; give it its own weight: "
            "linear.weight = nn.Parameter(linear.weight.clone())"
        )
    _check_forward(path, linear)
    _check_hooks(path, linear)


@torch.no_grad()
def _check_forward(path: str, linear: Any) -> None:
    """Raise LoRAError if a linear does not compute W x + b, for example if it scales the output or rounds W.

    The hook adds ΔW x to the output of the linear. In such a linear, the weight W + ΔW would give another result. nn.Linear's
    own `forward` needs no check. Another `forward` is compared with W x + b on two inputs.
    """
    if type(linear).forward in PLAIN_FORWARDS and "forward" not in vars(linear):
        return
    weight = linear.weight
    x = _probe(linear)
    bound = 1e-4 if weight.dtype.itemsize > 2 else 5e-2
    try:
        with torch.autocast(weight.device.type, enabled=False):
            actual, plain = linear.forward(x), F.linear(x, weight, linear.bias)
        equal = torch.allclose(actual, plain, rtol=bound, atol=bound * largest_of(plain), equal_nan=True)
    except Exception as error:
        raise LoRAError(f"{path!r} ({type(linear).__name__}) cannot be checked before a merge: {error}") from error
    if not equal:
        raise LoRAError(
            f"{path!r} ({type(linear).__name__}) computes something other than W x + b, so a merge would give another "
            "result; use the adapter unmerged, or leave this module out of the targets"
        )


@torch.no_grad()
def _check_hooks(path: str, linear: Any) -> None:
    """Raise LoRAError if another hook changes the output before ours. After a merge, it would change the update too."""
    hooks = list(linear._forward_hooks.items())
    first = next((place for place, (_, hook) in enumerate(hooks) if hook in OURS), 0)  # the first hook of this package
    earlier = [*_global_forward_hooks.items(), *hooks[:first]]
    if not earlier:
        return
    x = _probe(linear)
    output = F.linear(x, linear.weight, linear.bias)
    plain = output.clone()
    for number, hook in earlier:
        keywords = number in linear._forward_hooks_with_kwargs or number in _global_forward_hooks_with_kwargs
        result = hook(linear, (x,), {}, output) if keywords else hook(linear, (x,), output)
        output = output if result is None else result
    if not torch.equal(output, plain):
        raise LoRAError(
            f"{path!r} has a forward hook that changes its output before the adapter's update is added, so a merge would give "
            "another result; remove the hook, or use the adapter unmerged"
        )


def _probe(linear: Any) -> Tensor:
    """Return two inputs, shape (2, in_features)."""
    x = torch.linspace(-1, 1, 2 * linear.in_features, device=linear.weight.device)
    return x.view(2, -1).to(linear.weight.dtype)


def largest_of(values: Tensor) -> float:
    """Return the largest absolute value; NaN if there is one. `aminmax` needs no other tensor of this size, as `abs` does."""
    smallest, largest = torch.aminmax(values.detach()) if values.numel() else (0.0, 0.0)  # both are NaN if a value is
    return max(abs(float(smallest)), abs(float(largest)))


# ---------------------------------------------------------------- memory that two tensors share

Span = tuple[int, int, str]  # address of the first byte, address after the last byte, name of the tensor


def _memory(modules: Mapping[str, nn.Module]) -> dict[int, list[Span]]:
    """Return {address of a storage: spans of its tensors} of all parameters and buffers."""
    spans: dict[int, list[Span]] = {}
    for path, module in modules.items():
        for name, tensor in _tensors(module):
            if type(tensor) in PLAIN_TENSORS and tensor.layout == torch.strided and tensor.data_ptr():
                spans.setdefault(tensor.untyped_storage().data_ptr(), []).append(_span(f"{path}.{name}", tensor))
    return spans


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _span(name: str, tensor: Tensor) -> Span:
    first = tensor.data_ptr()
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return first, first + (last + 1) * tensor.element_size(), name


def _overlaps_itself(weight: Tensor) -> bool:
    """Return True if two elements may have the same address, as in an expanded tensor."""
    end = 0
    for step, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size > 1 and step <= end:
            return True
        end += (size - 1) * step
    return False


def _overlapping(name: str, weight: Tensor, memory: dict[int, list[Span]]) -> str:
    """Return the name of another tensor that shares memory with a weight, or ""."""
    first, end, _ = _span(name, weight)
    spans = memory.get(weight.untyped_storage().data_ptr(), [])
    return next((other for start, stop, other in spans if other != name and start < end and first < stop), "")
