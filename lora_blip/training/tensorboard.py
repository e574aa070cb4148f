"""Import TensorBoard, an optional dependency (extra: tensorboard)."""

from typing import Any

from lora_blip.errors import ConfigError


def summary_writer() -> Any:
    """Return the class SummaryWriter of TensorBoard. Raise ConfigError if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            'tensorboard = True, and TensorBoard is not installed: pip install "lora_blip[tensorboard]", or '
            "set TENSORBOARD = False"
        ) from None
    except Exception as error:  # an incompatible package
        raise ConfigError(f"tensorboard = True, and TensorBoard cannot be imported: {error}; set TENSORBOARD = False") from None
    return SummaryWriter
