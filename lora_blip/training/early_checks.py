"""Check the paths and the settings of a training before torch is imported, which takes seconds."""

import os
from pathlib import Path
from shutil import which

from lora_blip.config import TrainConfig
from lora_blip.errors import ConfigError
from lora_blip.models.local_base import locate_base
from lora_blip.runtime.files import refuse_unwritable
from lora_blip.runtime.runs import locate_initial, run_to_resume
from lora_blip.runtime.user_paths import require_annotations, require_folder

QUANTIZED = ("int8", "nf4", "fp4")
COMPILERS = ("c++", "g++", "clang++", "cl")


def check_paths(config: TrainConfig) -> None:
    """Raise the error that the training would raise if a path cannot be used or settings contradict each other."""
    from lora_blip.data.column_check import check_columns  # late: it imports PIL, which --help does not need

    refuse_contradictions(config)
    refuse_unwritable(config.output_dir)
    require_annotations(config.annotations)
    if config.val_annotations:
        require_annotations(config.val_annotations, "val_annotations")
    require_folder("image_root", config.image_root)
    check_columns(config, "annotations", "val_annotations")
    locate_base(config.model)
    if config.resume not in ("auto", "off"):
        run_to_resume(Path(config.resume))
    if config.init_adapter:
        locate_initial(config.init_adapter, config.output_dir)


def refuse_contradictions(config: TrainConfig) -> None:
    """Raise ConfigError if settings contradict each other, or if torch.compile has no compiler."""
    if config.compile and not ("CXX" in os.environ or any(map(which, COMPILERS))):
        raise ConfigError("compile = True needs a C++ compiler, but none is installed: apt install g++, or set COMPILE = False")
    if config.compile and config.checkpointing:  # torch.compile cannot trace `routing.checkpoint_context`
        raise ConfigError(
            "compile = True cannot be used with checkpointing = True: set COMPILE = False, or CHECKPOINTING = False"
        )
    refuse_quantized(config, config.base_dtype)
    needs_validation = {"best_by": config.best_by not in ("auto", ""), "patience": config.patience > 0}
    if not (config.val_fraction or config.val_annotations):
        for name in (name for name, is_set in needs_validation.items() if is_set):
            raise ConfigError(
                f"{name} = {getattr(config, name)!r} needs validation data, but val_fraction is 0: set VAL_FRACTION = 0.1 or "
                'VAL_ANNOTATIONS = "val.jsonl"'
            )


def refuse_quantized(config: TrainConfig, dtype: str) -> None:
    """Raise ConfigError if a setting cannot be used with a base of 8 or 4 bits. dtype: that of the frozen weights."""
    if dtype not in QUANTIZED:
        return
    unusable = {
        "compile": (config.compile, "False"), "shard": (config.shard, "False"),
        "variant": (config.variant == "dora", '"lora"'),
    }  # fmt: skip
    for name in (name for name, (is_set, _) in unusable.items() if is_set):
        raise ConfigError(
            f"{name} = {getattr(config, name)!r} cannot be used with a base in {dtype}; "
            f'set {name.upper()} = {unusable[name][1]}, or BASE_DTYPE = "bf16"'
        )
