"""LoRA fine-tuning for BLIP and BLIP-2 by forward hooks. To understand LoRA, start with `lora_blip/lora/layer.py`.

The names below are imported when they are first used, so `import lora_blip` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_blip.version import __version__ as __version__

if TYPE_CHECKING:
    from lora_blip.config import EvaluateConfig as EvaluateConfig
    from lora_blip.config import InferConfig as InferConfig
    from lora_blip.config import TrainConfig as TrainConfig
    from lora_blip.errors import LoraBlipError as LoraBlipError
    from lora_blip.evaluation.comparison import evaluate as evaluate
    from lora_blip.inference.pipeline import infer as infer
    from lora_blip.lora.adapter_file import load as load_adapter  # noqa: F401
    from lora_blip.lora.adapter_file import save as save_adapter  # noqa: F401
    from lora_blip.lora.injection import eject as eject
    from lora_blip.lora.injection import inject as inject
    from lora_blip.lora.layer import LoRA as LoRA
    from lora_blip.lora.merging import bake as bake
    from lora_blip.lora.merging import merge as merge
    from lora_blip.lora.merging import restore as restore
    from lora_blip.lora.routing import disable_adapters as disable_adapters
    from lora_blip.lora.routing import use_adapters as use_adapters
    from lora_blip.lora.targets import find as find_targets  # noqa: F401
    from lora_blip.models.loading import load_backbone as load_backbone
    from lora_blip.training.loop import train as train

PLACES = {  # name → its module, with its name there if that is another one
    "load_backbone": "models.loading", "find_targets": "lora.targets:find", "LoRA": "lora.layer",
    "inject": "lora.injection", "eject": "lora.injection",
    "merge": "lora.merging", "restore": "lora.merging", "bake": "lora.merging",
    "use_adapters": "lora.routing", "disable_adapters": "lora.routing",
    "load_adapter": "lora.adapter_file:load", "save_adapter": "lora.adapter_file:save",
    "train": "training.loop", "infer": "inference.pipeline", "evaluate": "evaluation.comparison",
    "TrainConfig": "config", "InferConfig": "config", "EvaluateConfig": "config", "LoraBlipError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'lora_blip' has no attribute {name!r}")
    module, _, own = PLACES[name].partition(":")
    value = globals()[name] = getattr(import_module(f"lora_blip.{module}"), own or name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *PLACES])
