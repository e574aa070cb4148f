"""The device and the precision of the computation."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig

from lora_blip.errors import ConfigError, ModelError
from lora_blip.models.library import first_line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(device: str) -> torch.device:
    """Return the device. "auto": the first that exists of cuda, mps, cpu. Raise ModelError if the device cannot be used."""
    device = str(device)  # a caller may give a torch.device
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"device {device!r} cannot be used here ({_reason(device, error)}); "
            'set DEVICE = "auto" (--device auto, or device="auto")'
        ) from None
    return chosen


def _reason(device: str, error: Exception) -> str:
    """Return why a device cannot be used. For an unknown name and for mps, torch lists more than twenty types."""
    kind = device.partition(":")[0]
    if kind == "mps" and not torch.backends.mps.is_available():
        return "PyTorch finds no Apple GPU"
    known = kind in ("cpu", "cuda", "mps")
    return first_line(error) if known or "device type" not in str(error) else "expected cpu, cuda, cuda:1, mps or auto"


def pick_precision(precision: str, device: torch.device) -> str:
    """Return the precision: for "auto" bf16 on a CUDA device that supports it, fp16 on an older one, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def emulated(precision: str, device: torch.device) -> bool:
    """Return True if a CPU has no instructions for this precision, which is then many times slower than fp32."""
    if device.type != "cpu" or precision == "fp32":
        return False
    support = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return not support[precision]()


def pick_base_dtype(base_dtype: str, config: PretrainedConfig, precision: str) -> str:
    """Return the dtype of the frozen weights.

    "auto": for BLIP-2 the dtype of `precision`, because 16 bits halve its memory; for BLIP, which is small, fp32. Raise
    ConfigError for fp16 together with bf16.
    """
    if base_dtype == "auto":
        return precision if config.model_type == "blip-2" else "fp32"
    if {base_dtype, precision} == {"fp16", "bf16"}:
        raise ConfigError(f"base_dtype = {base_dtype!r} with precision {precision!r}: set both to the same, or one to fp32")
    return base_dtype


def dtype_of(model: Any) -> str:
    """Return the precision with the dtype of the ViT's weights. An fp16 BLIP-2 keeps its Q-Former and queries in float32."""
    own = next(model.vision_model.parameters()).dtype
    return next((name for name, dtype in DTYPES.items() if dtype == own), "fp32")


def autocasting(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that creates the context of a forward pass: autocast, or a context without effect in fp32."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, DTYPES[precision])


def refuse_t5_fp16(config: PretrainedConfig, name: str, precision: str, fix: str = "set the precision to bf16 or fp32") -> None:
    """Raise ModelError for Flan-T5 in fp16: it overflows to NaN, with fp16 weights and under autocast."""
    if precision == "fp16" and getattr(config, "text_config", None) is not None and config.text_config.model_type == "t5":
        raise ModelError(f"{name!r} has a T5 language model, which gives NaN in fp16; {fix}")
