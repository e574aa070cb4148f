"""Load a base whose frozen linears have weights of 8 or 4 bits, by bitsandbytes.

bitsandbytes, not torchao: QLoRA's nf4 is only a prototype in torchao 0.18, and quantized checkpoints of BLIP-2 on the hub are
those of bitsandbytes.
"""

import logging
from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from lora_blip.errors import ConfigError, ModelError
from lora_blip.kernels.linear import PLAIN_TENSORS
from lora_blip.lora import fingerprint
from lora_blip.lora.sites import is_linear, quantization_of
from lora_blip.models.precision import DTYPES
from lora_blip.models.weight_reader import WeightReader
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable, quoted

QUANTIZED = ("int8", "nf4")  # what BASE_DTYPE can choose; a checkpoint may also be stored in fp4
INSTALL = 'pip install "lora_blip[quantized]"'
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def split_dtype(dtype: str | torch.dtype) -> tuple[str, str]:
    """Return the dtype of the weights that are not quantized, and "int8", "nf4" or "auto" for `choose`.

    dtype: a name, or a dtype of torch. Raise ConfigError for another one.
    """
    if dtype in QUANTIZED:
        return "fp32", str(dtype)
    for name, each in DTYPES.items():
        if dtype in (name, each):
            return name, "auto"
    names = '"fp32", "fp16", "bf16", "int8" or "nf4"'
    raise ConfigError(f'dtype = {dtype!r}: expected {names}, as in lora_blip.load_backbone(name, dtype="bf16")')


def stored_quantization(config: Any) -> str:
    """Return "int8", "nf4" or "fp4" if the weights in a checkpoint's files are quantized, else "".

    `quantization_config.check` has checked the entry in its config.json.
    """
    own: dict[str, Any] | None = getattr(config, "quantization_config", None)
    if not own:
        return ""
    return "int8" if own.get("load_in_8bit") or own.get("_load_in_8bit") else str(own.get("bnb_4bit_quant_type") or "fp4")


def choose(config: Any, name: str, base_dtype: str, trained: str = "") -> str:
    """Return how the base is quantized when it is loaded, "" if it is not.

    base_dtype: the setting. trained: the dtype in the header of the adapter, which "auto" follows. Raise ConfigError if the
    setting contradicts the files of the checkpoint, and ModelError if bitsandbytes is missing.
    """
    stored = stored_quantization(config)
    if stored and base_dtype not in ("auto", stored):
        raise ConfigError(
            f'base_dtype = {base_dtype!r}, but the weights in {name!r} are stored in {stored}; set BASE_DTYPE = "auto" '
            "(--base-dtype auto), or give the checkpoint that is not quantized"
        )
    wanted = base_dtype if base_dtype in QUANTIZED else trained if base_dtype == "auto" and trained in QUANTIZED else ""
    chosen = stored or wanted
    if chosen and (missing := [each for each in ("bitsandbytes", "accelerate") if find_spec(each) is None]):
        by_adapter = not stored and base_dtype == "auto"
        reason = "as in the training of the adapter" if by_adapter else f"in {chosen}"
        other = '; or load it in full precision: BASE_DTYPE = "fp32" (--base-dtype fp32)' if not stored else ""
        raise ModelError(f"{name!r} is loaded {reason}, which needs {' and '.join(missing)}: {INSTALL}{other}")
    return chosen


def arguments(kind: str, stored: bool, skeleton: Any, rest: torch.dtype, device: Any) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantize each linear when it is read.

    kind: a result of `choose`. stored: True if the files contain quantized weights. skeleton: the model on the meta device.
    rest: the dtype of the other weights.
    """
    import_quietly()
    named: dict[str, Any] = {"device_map": {"": device}}
    if stored:
        return named
    width: dict[str, Any] = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    return named | {
        "quantization_config": BitsAndBytesConfig(
            **width, bnb_4bit_compute_dtype=rest, llm_int8_skip_modules=kept_linears(skeleton)
        )
    }


def import_quietly() -> None:
    """Import bitsandbytes without its message about a package of faster kernels, which this package does not use."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        logger.setLevel(level)


def kept_linears(model: Any) -> list[str]:
    """Return the paths of linears that are not quantized: heads, and direct children of the model.

    A head may share its weight with the embeddings. The direct children compute similarities and ITM in float32. transformers
    also keeps the Q-Former and the second linear of each MLP of a T5, which overflow in fp16.
    """
    head = model.get_output_embeddings()
    shared = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    linears = {path: module for path, module in model.named_modules() if is_linear(module)}
    return [path for path, module in linears.items() if module is head or path in shared or "." not in path]


def finish(model: Any, name: str, weights: str, stored: bool) -> None:
    """Prepare a quantized model that was just loaded: check its weights, give its linears our forward, record fingerprints.

    Print which linears are quantized. weights: the folder of the checkpoint's safetensors.
    """
    from lora_blip.kernels import quantized as kernels  # late: it imports bitsandbytes

    linears = quantized_linears(model)
    reader = None if stored else WeightReader(weights, name)
    for path, linear in linears.items():
        check_state(path, linear, name)
        linear.__class__ = kernels.KINDS.get(type(linear), type(linear))
        if reader and (values := reader.sample(path, fingerprint.positions(linear.in_features * linear.out_features))):
            setattr(linear, fingerprint.RECORDED, values)
    if not stored:
        release_file(model)
    print(printable(f"{name!r}: {summary(model, linears)}"), flush=True)


def release_file(model: nn.Module) -> None:
    """Copy the weights that are not quantized. On a CPU they are views of the file, which would stay in memory as a whole."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in PLAIN_TENSORS:
            tensor.data = tensor.data.clone()


def summary(model: nn.Module, linears: dict[str, Any]) -> str:
    """Return the number of quantized linears, and the number of others in each part of the model."""
    kinds = ", ".join(dict.fromkeys(quantization_of(linear) for linear in linears.values()))
    others = {path: module for path, module in model.named_modules() if is_linear(module) and path not in linears}
    parts = Counter(path.partition(".")[0] for path in others)
    text = f"{counted(len(linears), 'linear', 'are')} in {kinds}"
    if not others:
        return text
    dtype: Any = next(iter(others.values())).weight.dtype
    listed = ", ".join(f"{count} in {part}" for part, count in parts.items())
    return f"{text}; {counted(len(others), 'linear', 'stay')} in {str(dtype).removeprefix('torch.')}: {listed}"


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """Return {path: linear} of the linears that bitsandbytes has quantized."""
    return {path: module for path, module in model.named_modules() if quantization_of(module)}


def check_state(path: str, linear: Any, name: str) -> None:
    """Raise ModelError if the stored parts of a quantized weight do not fit each other.

    The kernels of bitsandbytes do not check sizes, so they would read memory behind a tensor that is too short.
    """
    problem = _int8_problem(linear) if quantization_of(linear) == "int8" else _4bit_problem(linear)
    if problem:
        raise ModelError(f"{name!r}: the quantized weight of {quoted(path)} has {problem}; download the checkpoint again")


def _int8_problem(linear: Any) -> str:
    weight, scale = linear.weight, linear.weight.SCB
    if weight.dtype != torch.int8 or tuple(weight.shape) != (linear.out_features, linear.in_features):
        return f"the shape {tuple(weight.shape)} in {weight.dtype}"
    fits = scale is not None and scale.dtype == torch.float32 and tuple(scale.shape) == (linear.out_features,)
    return "" if fits else "no scale for each row"


def _4bit_problem(linear: Any) -> str:
    weight, state = linear.weight, linear.weight.quant_state
    count = linear.out_features * linear.in_features
    if state is None:
        return "no scales"
    if tuple(state.shape) != (linear.out_features, linear.in_features) or state.quant_type not in ("nf4", "fp4"):
        return f"the shape {quoted(tuple(state.shape))}"
    if weight.dtype != torch.uint8 or weight.numel() != -(-count // 2) or state.dtype not in FLOATS:
        return f"{counted(weight.numel(), 'byte')}"
    if type(state.blocksize) is not int or state.blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        return f"the block size {quoted(state.blocksize)}"
    absmax, blocks = state.absmax, -(-count // state.blocksize)
    if state.nested:
        inner = state.state2
        whole = inner.absmax.numel() == -(-blocks // inner.blocksize) and inner.code.numel() == 256
        if not whole or absmax.dtype != torch.uint8 or state.offset.numel() != 1:
            return "no scales of its scales"
    elif absmax.dtype not in FLOATS:
        return f"scales in {absmax.dtype}"
    return "" if absmax.numel() == blocks and state.code.numel() == 16 else "another number of scales"


def _unpacks(conversion: Any) -> bool:
    """Return True for a conversion of transformers that reads a quantized weight."""
    return any(type(operation).__name__.startswith("Bnb") for operation in getattr(conversion, "operations", ()))


# ---------------------------------------------------------------- sizes


def scale_bytes(model: nn.Module) -> int:
    """Return the bytes of the scales of all quantized weights, which are no parameters."""
    return sum(scales.nbytes for linear in quantized_linears(model).values() for scales in scales_of(linear))


def scales_of(linear: Any) -> list[Tensor]:
    """Return the tensors that a quantized weight has besides its codes."""
    if quantization_of(linear) == "int8":
        return [linear.state.SCB if linear.weight.SCB is None else linear.weight.SCB]
    states = [linear.weight.quant_state, *filter(None, [linear.weight.quant_state.state2])]
    return [tensor for state in states for tensor in (state.absmax, state.code)]


# ---------------------------------------------------------------- back to float32


@torch.no_grad()
def dequantize(model: Any) -> None:
    """Replace all quantized weights by their dequantized values, in float32. Adapters and hooks stay.

    The model is then an ordinary one: adapters can be merged into it, and `save_pretrained` writes no quantization.
    """
    linears = quantized_linears(model)
    if not linears:
        return
    from lora_blip.kernels.quantized import dequantized

    plain = vars(nn.Linear(1, 1)).keys()
    for linear in linears.values():
        weight = dequantized(linear)
        for attribute in vars(linear).keys() - plain:
            delattr(linear, attribute)
        linear._load_state_dict_pre_hooks.clear()  # that of bitsandbytes
        linear.__class__ = nn.Linear
        linear.weight = nn.Parameter(weight, requires_grad=False)
    model.hf_quantizer.remove_quantization_config(model)
    # otherwise save_pretrained packs the weights again
    conversions = [each for each in getattr(model, "_weight_conversions", None) or [] if not _unpacks(each)]
    vars(model).pop("_weight_conversions", None)
    if conversions:
        model._weight_conversions = conversions
    for part in model.modules():
        vars(getattr(part, "config", part)).pop("_is_quantized", None)
