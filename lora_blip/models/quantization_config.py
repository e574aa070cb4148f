"""Check the entry `quantization_config` in the config.json of a checkpoint. The file may be untrusted."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lora_blip.errors import ModelError
from lora_blip.runtime.untrusted import quoted

KEY = "quantization_config"
BITS_AND_BYTES = "bitsandbytes"
FIX = (
    'give the checkpoint that is not quantized, and set BASE_DTYPE = "nf4" or "int8" (--base-dtype nf4) to quantize it when it '
    "is loaded"
)
PATH = re.compile(r"[\w.]{1,200}")  # of a module; transformers reads it as a regular expression
FLOATS = ("float32", "bfloat16", "float16")
MOST_PATHS = 10_000


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_paths(value: Any) -> bool:
    """Return True for None, or for a list of module paths without other regular expressions."""
    return value is None or (
        isinstance(value, list)
        and len(value) <= MOST_PATHS
        and all(isinstance(each, str) and PATH.fullmatch(each) for each in value)
    )


ENTRIES: dict[str, Callable[[Any], bool]] = {  # entry of bitsandbytes → check of its value
    "quant_method": lambda value: value == BITS_AND_BYTES,
    "load_in_8bit": is_flag, "_load_in_8bit": is_flag, "load_in_4bit": is_flag, "_load_in_4bit": is_flag,
    "llm_int8_threshold": lambda value: type(value) in (int, float) and 0 <= value <= 1e6,
    "llm_int8_skip_modules": is_paths,
    "llm_int8_enable_fp32_cpu_offload": lambda value: value is False,
    "llm_int8_has_fp16_weight": lambda value: value is False,
    "bnb_4bit_compute_dtype": lambda value: value in FLOATS,
    "bnb_4bit_quant_type": lambda value: value in ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": is_flag,
    "bnb_4bit_quant_storage": lambda value: value == "uint8",
}  # fmt: skip


def check(config: Mapping[str, Any], source: str) -> None:
    """Raise ModelError if a config.json names a quantization that is not loaded. Do nothing if it names none."""
    entry = config.get(KEY)
    if entry in (None, {}):
        return
    where = f"config.json of {source!r}: {KEY}"
    if not isinstance(entry, dict):
        raise ModelError(f"{where} is {quoted(entry)}, expected an object; {FIX}")
    method = entry.get("quant_method", BITS_AND_BYTES if any("load_in_" in key for key in entry) else None)
    if method != BITS_AND_BYTES:
        raise ModelError(
            f"{where}: the weights are quantized by {quoted(method)}, and lora_blip loads those of bitsandbytes only; {FIX}"
        )
    for key, value in entry.items():
        if key not in ENTRIES or not ENTRIES[key](value):
            raise ModelError(f"{where}: {quoted(key)} is {quoted(value)}, which lora_blip does not load; {FIX}")
    widths = [bool(entry.get(f"load_in_{bits}bit") or entry.get(f"_load_in_{bits}bit")) for bits in (8, 4)]
    if sum(widths) != 1:
        raise ModelError(f"{where} says neither 8 nor 4 bits, or both; {FIX}")


def is_stored(config: Mapping[str, Any]) -> bool:
    """Return True if a config.json says that the weights in the files are quantized."""
    return bool(config.get(KEY))


def unpacked(shapes: Mapping[str, tuple[int, ...]], model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's weights, in which a weight of 4 bits has the shape of the model's weight.

    It is stored as a column of bytes, two values in each. If the number of bytes does not fit, the stored shape stays.
    model: {name: tensor} of the model that is not quantized.
    """
    result = dict(shapes)
    for name, tensor in model.items():
        if f"{name}.absmax" in shapes and shapes.get(name) == (-(-tensor.numel() // 2), 1):
            result[name] = tuple(tensor.shape)
    return result


def value_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of weights in a checkpoint's files. A byte of a weight of 4 bits has two."""
    return sum(math.prod(shape) * (2 if f"{name}.absmax" in shapes else 1) for name, shape in shapes.items())
