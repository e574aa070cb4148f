"""LoRA fine-tuning for BLIP and BLIP-2 by forward hooks. To understand LoRA, start with `lora_blip/lora/layer.py`.

The names below are imported when they are first used, so `import lora_blip` is quick. The examples in their docstrings start
after `backbone = lora_blip.load_backbone("assets/tiny-blip")`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_blip.version import __version__

if TYPE_CHECKING:
    from lora_blip.config import EvaluateConfig, InferConfig, TrainConfig
    from lora_blip.errors import LoraBlipError
    from lora_blip.evaluation.comparison import evaluate
    from lora_blip.inference.captioner import Captioner
    from lora_blip.inference.pipeline import infer
    from lora_blip.inference.prediction import Prediction
    from lora_blip.lora.adapter_file import load as load_adapter
    from lora_blip.lora.adapter_file import save as save_adapter
    from lora_blip.lora.injection import eject, inject
    from lora_blip.lora.layer import LoRA
    from lora_blip.lora.merging import bake, merge, restore
    from lora_blip.lora.routing import disable_adapters, use_adapters
    from lora_blip.lora.targets import find as find_targets
    from lora_blip.models.loading import load_backbone
    from lora_blip.training.loop import train

__all__ = [
    "Captioner", "EvaluateConfig", "InferConfig", "LoRA", "LoraBlipError", "Prediction", "TrainConfig", "__version__", "bake",
    "disable_adapters", "eject", "evaluate", "find_targets", "infer", "inject", "load_adapter", "load_backbone", "merge",
    "restore", "save_adapter", "train", "use_adapters",
]  # fmt: skip

EXPORTS = {  # public name → "module", or "module:name" if the module uses another name
    "Captioner": "inference.captioner", "Prediction": "inference.prediction",
    "load_backbone": "models.loading", "find_targets": "lora.targets:find", "LoRA": "lora.layer",
    "inject": "lora.injection", "eject": "lora.injection",
    "merge": "lora.merging", "restore": "lora.merging", "bake": "lora.merging",
    "use_adapters": "lora.routing", "disable_adapters": "lora.routing",
    "load_adapter": "lora.adapter_file:load", "save_adapter": "lora.adapter_file:save",
    "train": "training.loop", "infer": "inference.pipeline", "evaluate": "evaluation.comparison",
    "TrainConfig": "config", "InferConfig": "config", "EvaluateConfig": "config", "LoraBlipError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module 'lora_blip' has no attribute {name!r}")
    module, _, name_in_module = EXPORTS[name].partition(":")
    value = globals()[name] = getattr(import_module(f"lora_blip.{module}"), name_in_module or name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
