"""The training loop, on one page: `train`, and the two parts of a step, `accumulate_gradients` and `update_parameters`.

session.py prepares the run, and validates and saves between steps. learner.py contains the state that a step changes.
"""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lora_blip.config import TrainConfig
from lora_blip.data.loader import DeviceBatch, Slot
from lora_blip.runtime.settings import require_settings
from lora_blip.runtime.terminal import encodable_output
from lora_blip.training.learner import Learner, Update
from lora_blip.training.session import open_session


@encodable_output()
def train(config: TrainConfig) -> Path:
    """Train an adapter with the settings of `config` and return the path of its file.

    Raise ConfigError, ModelError, DataError, PreflightError or CheckpointError before the first step. In training, raise
    TrainingError if too many steps in a row are not finite, or if the device runs out of memory. Raise DataError if an image
    cannot be read, and CheckpointError if the disk is full. Each message contains a fix.

    After an error, Ctrl-C or a scheduler's signal, the progress is saved. Start again with the same settings to resume.
    In peft: no equivalent; `Trainer` of transformers trains the models of peft.

    >>> path = lora_blip.train(lora_blip.TrainConfig(max_steps=1, val_fraction=0, batch_size=4))
    >>> path.name
    'adapter.safetensors'
    """
    require_settings(config, TrainConfig, "train")
    with open_session(config) as session:  # data, backbone, adapters, optimizer, run folder
        learner, progress = session.learner, session.learner.progress
        session.validate_if_due(session.initial_scores)
        session.checkpoint_if_due()
        for slots, batches in session.remaining_steps():  # a slot is the position of a micro-batch in the epoch
            learner.begin_step(batches, slots)  # count the label tokens of the whole step
            for batch, slot in zip(batches, slots, strict=True):
                is_last = slot is slots[-1]
                accumulate_gradients(learner, batch, slot, is_last)
                if not is_last:
                    session.checkpoint_if_due()
            with learner.transaction():  # no checkpoint is written in the middle of an update
                # session.config.lr is the setting LR, or the default of this base if LR is 0
                rate = learning_rate(progress.step, progress.total, session.warmup, session.config.lr)
                update = update_parameters(learner, rate)
                session.log(update, rate, batches)
            session.stop_after_skipped_steps()
            session.checkpoint_if_due()
            session.validate_if_due()
        session.stop_after_skipped_steps()
        session.validate_if_due(at_the_end=True)
        return session.save_adapter()


def accumulate_gradients(learner: Learner, batch: DeviceBatch, slot: Slot, is_last: bool) -> None:
    """Run a micro-batch forward and backward, and add its gradients to those of the step."""
    with learner.forward_context(slot, is_last):  # seeded dropout, autocast
        loss = learner.objective(batch) / learner.label_count  # mean over the whole step
    if slot.is_filler:  # a repeated micro-batch: all processes must compute equally many micro-batches
        loss = loss * 0.0
    learner.loss += loss.detach()  # logged in metrics.jsonl
    learner.scaler.scaled(loss).backward()  # type: ignore[no-untyped-call]  # fp16: times the loss scale, so that small gradients do not become zero
    learner.progress.slot += 1


def update_parameters(learner: Learner, rate: float) -> Update:
    """Clip the gradients and update the adapters. Skip the update if the loss or a gradient is not finite."""
    optimizer, scaler = learner.optimizer, learner.scaler
    scaler.unscale(learner.parameters.values())  # clip true gradients, not scaled ones
    grad_norm = clip_grad_norm_(learner.parameters.values(), learner.max_grad_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)  # LoRA+
    norm, local_loss = read_values([grad_norm, learner.loss])
    (loss,) = learner.ranks.sum(local_loss)  # over all processes
    is_finite = math.isfinite(norm) and math.isfinite(loss)
    update = Update(loss, norm, skipped=not is_finite, scale=scaler.scale)
    if is_finite:
        optimizer.step()
    scaler.update(is_finite)  # fp16: a lower scale after an overflow, a higher one after many steps without
    optimizer.zero_grad(set_to_none=True)
    learner.progress.count_step(update.skipped)
    return update


def read_values(values: list[Tensor]) -> list[float]:
    """Return the values of tensors on the device. This is the only time that a step waits for a GPU."""
    return torch.stack(values).tolist()


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    It rises linearly to `peak` during `warmup` updates, then falls to 0 along half a cosine.

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
