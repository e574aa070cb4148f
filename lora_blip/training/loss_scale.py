"""The loss scale of fp16: a number on the host, so that a step reads the device only once.

An fp16 gradient of at most 2⁻²⁵ ≈ 3e-8 becomes zero. So the loss is multiplied by S before the backward pass, and the gradients
by 1 / S after it. If a gradient overflows, the step is skipped and S is halved. After `growth_interval` steps without an
overflow, S is doubled (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2).

`torch.amp.GradScaler` computes the same. It keeps S on the device, and reads it and a flag there in each step.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LossScaler:
    """The loss scale S, and the number of steps since it last changed. Without `enabled`, S is always 1."""

    def __init__(self, enabled: bool = True, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.enabled, self.scale, self.growth_interval = enabled, scale if enabled else 1.0, growth_interval
        self.growth_factor, self.backoff_factor = 2.0, 0.5
        self.steps = 0  # without an overflow, since S last changed

    def scaled(self, loss: Tensor) -> Tensor:
        """Return S · loss."""
        return loss * self.scale if self.enabled else loss

    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Multiply the gradients by 1 / S, in place."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.enabled and gradients:
            torch._foreach_mul_(gradients, 1.0 / self.scale)

    def update(self, is_finite: bool) -> None:
        """Change S after a step. is_finite: whether the loss and all gradients of the step are finite."""
        if not self.enabled:
            return
        self.steps = self.steps + 1 if is_finite else 0
        if not is_finite:
            self.scale *= self.backoff_factor
        elif self.steps == self.growth_interval:
            grown = torch.tensor(self.scale * self.growth_factor, dtype=torch.float32).item()
            self.scale, self.steps = grown if math.isfinite(grown) else self.scale, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state under the names of `torch.amp.GradScaler`, or {} if the scaler is not enabled."""
        if not self.enabled:
            return {}
        return {
            "scale": self.scale, "growth_factor": self.growth_factor, "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval, "_growth_tracker": self.steps,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a result of `state_dict`, or of that of `torch.amp.GradScaler`. Raise ValueError if a value is invalid."""
        scale, growth, backoff = (float(state[key]) for key in ("scale", "growth_factor", "backoff_factor"))
        if not all(math.isfinite(value) and value > 0 for value in (scale, growth, backoff)):
            raise ValueError("the loss scale and its factors must be finite and positive")
        interval, steps = int(state["growth_interval"]), int(state["_growth_tracker"])
        self.scale, self.growth_factor, self.backoff_factor = scale, growth, backoff
        self.growth_interval, self.steps = interval, steps
