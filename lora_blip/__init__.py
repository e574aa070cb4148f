"""LoRA fine-tuning for BLIP and BLIP-2 by forward hooks. To understand LoRA, start with `lora_blip/lora/layer.py`.

The names below are imported when they are first used, so `import lora_blip` is quick. The examples in their docstrings start
after `backbone = lora_blip.load_backbone("assets/tiny-blip")`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_blip.version import __version__

if TYPE_CHECKING:
    from lora_blip.config import EvaluateConfig, InferConfig, TrainConfig
    from lora_blip.errors import *  # noqa: F403  # `__getattr__` finds each error
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


OF_PEFT = {  # name in peft → the call here
    "get_peft_model": "inject(backbone, targets)", "LoraConfig": "inject(backbone, targets, r=8, alpha=32)",
    "PeftModel": "load_adapter(backbone, path)", "PeftConfig": "load_adapter(backbone, path)",
    "add_adapter": "inject(backbone, targets, name=…)", "set_adapter": "use_adapters(backbone, name)",
    "disable_adapter": "disable_adapters(backbone)", "merge_adapter": "merge(backbone)", "unmerge": "restore(backbone)",
    "unmerge_adapter": "restore(backbone)", "merge_and_unload": "bake(backbone)", "unload": "eject(backbone)",
    "delete_adapter": "eject(backbone, name)", "save_pretrained": "save_adapter(path, backbone)",
    "from_pretrained": "Captioner.from_adapter(path)", "LoraModel": "inject(backbone, targets)",
}  # fmt: skip


if not TYPE_CHECKING:  # a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name.endswith("Error") and name not in EXPORTS and hasattr(errors := import_module("lora_blip.errors"), name):
            return getattr(errors, name)
        if name not in EXPORTS:
            hint = f"; the equivalent here is lora_blip.{OF_PEFT[name]}" if name in OF_PEFT else ""
            raise AttributeError(f"module 'lora_blip' has no attribute {name!r}{hint}", name=name, obj=sys.modules[__name__])
        module, _, name_in_module = EXPORTS[name].partition(":")
        value = globals()[name] = getattr(import_module(f"lora_blip.{module}"), name_in_module or name)
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
