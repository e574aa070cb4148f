"""The loss scale of fp16 is that of torch.amp.GradScaler, but a step reads the device once."""

import math

import pytest
import torch
from torch import nn

from lora_blip.training.loss_scale import LossScaler

STEPS = [True, True, True, False, True, True, True, True, False, False, True, True, True]  # whether the gradients are finite


def test_the_scale_and_the_updates_are_those_of_the_scaler_of_torch() -> None:
    """After steps with and without an overflow: the same scale, parameters and state."""
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
    scaler, oracle = LossScaler(True, 2.0**16, growth_interval=3), torch.amp.GradScaler("cpu", 2.0**16, growth_interval=3)
    optimizers = [torch.optim.AdamW([parameter], lr=0.1) for parameter in (ours, theirs)]
    for number, is_finite in enumerate(STEPS):
        factor = math.inf if not is_finite else 1.0 + number
        for parameter, scale in ((ours, scaler.scaled), (theirs, oracle.scale)):
            scale((factor * parameter.square()).sum()).backward()
        scaler.unscale([ours])
        if math.isfinite(ours.grad.norm().item()):  # type: ignore[union-attr]
            optimizers[0].step()
        scaler.update(is_finite)
        oracle.unscale_(optimizers[1])
        oracle.step(optimizers[1])
        oracle.update()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert scaler.scale == oracle.get_scale() and torch.equal(ours, theirs), number
        assert scaler.state_dict() == oracle.state_dict()


def test_the_scale_stays_finite() -> None:
    """It does not grow above the largest number of float32, as in torch."""
    scaler = LossScaler(True, 2.0**127, growth_interval=1)
    scaler.update(is_finite=True)
    assert scaler.scale == 2.0**127


def test_without_fp16_nothing_is_scaled() -> None:
    scaler, parameter = LossScaler(enabled=False), nn.Parameter(torch.ones(2))
    loss = parameter.sum()
    assert scaler.scaled(loss) is loss and scaler.state_dict() == {}
    loss.backward()
    scaler.unscale([parameter])
    scaler.update(is_finite=False)
    assert torch.equal(parameter.grad, torch.ones(2)) and scaler.scale == 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": math.nan}, {"backoff_factor": -1}, {"scale": "x"}])
def test_an_invalid_state_changes_nothing(wrong: dict[str, object]) -> None:
    """The state comes from a checkpoint, which may be damaged."""
    scaler = LossScaler(True, 8.0)
    with pytest.raises(ValueError, match=r"finite and positive|could not convert"):
        scaler.load_state_dict(LossScaler().state_dict() | wrong)
    assert scaler.scale == 8.0
