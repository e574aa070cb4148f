"""Check the values of the settings of training, inference and evaluation. `settings.check` has checked their types."""

from typing import Any

from lora_blip.errors import ConfigError
from lora_blip.runtime.settings import require, require_name
from lora_blip.runtime.user_paths import BASE_OF

TASK_NAMES = ("caption", "vqa", "retrieval")
VARIANTS = ("lora", "rslora", "dora")  # of LoRA; see `lora.variants`
MOST_SCALE = 100  # of an adapter; a larger one is a mistake
ABOVE_ZERO = (  # settings of training that must be above zero
    "r", "alpha", "lr_ratio", "epochs", "batch_size", "accumulation", "log_every", "max_skipped", "num_beams",
    "keep_checkpoints",
)  # fmt: skip
AT_LEAST_ZERO = (
    "lr", "checkpoint_seconds", "max_steps", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "validate_every",
    "patience", "max_new_tokens", "min_improvement", "views", "cache_gb", "image_size",
)  # fmt: skip


def check_training(config: Any) -> None:
    """Raise ConfigError if a setting of training has a value that is not allowed."""
    require(0 <= config.val_fraction < 1, "val_fraction", config.val_fraction, "a share from 0 to below 1")
    require(0 <= config.dropout < 1, "dropout", config.dropout, "a share from 0 to below 1")
    require(config.task in ("auto", *TASK_NAMES), "task", config.task, f"one of auto, {', '.join(TASK_NAMES)}")
    if config.variant.lower() in ("lora+", "loraplus"):
        raise ConfigError(f"variant = {config.variant!r}: LoRA+ is the setting LR_RATIO; set LR_RATIO = 16 (--lr-ratio 16)")
    require_name(config.variant, "variant", VARIANTS)
    for name in ABOVE_ZERO:
        require(getattr(config, name) > 0, name, getattr(config, name), "above 0")
    for name in AT_LEAST_ZERO:
        require(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    require(config.num_workers >= -1, "num_workers", config.num_workers, "at least -1")


def check_scale(scale: float, adapter: str = "latest") -> float:
    """Return the scale of an adapter as a float.

    Raise ConfigError if it is not a number from -MOST_SCALE to MOST_SCALE, or if it is not 1 and the setting `adapter` names
    none.
    """
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    require(is_number and abs(scale) <= MOST_SCALE, "scale", scale, f"a number from -{MOST_SCALE} to {MOST_SCALE}")
    if adapter in ("", "none") and scale != 1:
        raise ConfigError(f"scale = {scale:g}, but there is no adapter to scale; leave scale out, or give an adapter: latest")
    return float(scale)


def check_prediction(config: Any) -> None:
    """Raise ConfigError if a setting of inference or evaluation has a value that is not allowed, or if no base is named."""
    require(config.batch_size > 0, "batch_size", config.batch_size, "above 0")
    require(config.task in ("auto", *TASK_NAMES), "task", config.task, f"one of auto, {', '.join(TASK_NAMES)}")
    check_scale(config.scale, config.adapter)
    for name in ("max_new_tokens", "num_beams", "image_size", "seed"):
        require(getattr(config, name) >= 0, name, getattr(config, name), "at least 0")
    if config.adapter in ("", "none") and not config.model:
        asks, ranks = getattr(config, "question", ""), getattr(config, "texts", "")
        task = config.task if config.task != "auto" else "vqa" if asks else "retrieval" if ranks else "caption"
        raise ConfigError(
            f"model is empty, and no adapter names a base; set MODEL (--model {BASE_OF[task]}) or ADAPTER (--adapter latest)"
        )
