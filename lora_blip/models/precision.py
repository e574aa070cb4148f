"""The device and the precision to compute in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PretrainedConfig

from lora_blip.errors import ConfigError, ModelError
from lora_blip.models.library import first_line

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(device: str) -> torch.device:
    """ "auto" is cuda, then mps, then cpu. Raises ModelError when the device named is not there."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device {device!r} cannot be used here ({first_line(error)}); try 'auto' or 'cpu'") from None
    return chosen


def pick_precision(precision: str, device: torch.device) -> str:
    """ "auto" is bf16 on a CUDA device that has it, fp16 on an older one, fp32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32"


def emulated(precision: str, device: torch.device) -> bool:
    """Whether a CPU has no instructions for this precision, so that it computes right but many times slower than fp32."""
    if device.type != "cpu" or precision == "fp32":
        return False
    support = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported, "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported}
    return not support[precision]()


def pick_base_dtype(wanted: str, config: PretrainedConfig, precision: str) -> str:
    """Frozen weights in 16 bits halve BLIP-2's memory; BLIP is small, and stays exact in fp32."""
    if wanted == "auto":
        return precision if config.model_type == "blip-2" else "fp32"
    if {wanted, precision} == {"fp16", "bf16"}:
        raise ConfigError(f"base_dtype = {wanted!r} with precision {precision!r}: set both to the same 16 bits, or one to fp32")
    return wanted


def autocasting(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """The context to compute in, made anew at each call."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, DTYPES[precision])


def refuse_t5_fp16(config: PretrainedConfig, name: str, precision: str) -> None:
    """Flan-T5 overflows fp16 to NaN, in the weights as under AMP."""
    if precision == "fp16" and getattr(config, "text_config", None) is not None and config.text_config.model_type == "t5":
        raise ModelError(f"{name!r} has a T5 language model, which gives NaN in fp16; set the precision to bf16 or fp32")
