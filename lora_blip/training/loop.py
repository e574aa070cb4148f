"""The training loop. `train` is the algorithm; `session` prepares it, and `learner` computes one step."""

import math
from pathlib import Path

from lora_blip.config import TrainConfig
from lora_blip.training.session import open_session


def train(config: TrainConfig) -> Path:
    """Train an adapter as `config` says and return the path of its file.

    Raise ConfigError, ModelError, DataError, PreflightError or CheckpointError before the first step, each with a remedy.
    Raise TrainingError if steps are no longer finite or the device runs out of memory. After Ctrl-C, a scheduler's signal or
    an error, everything that was learned is saved, and the same settings resume the run.
    """
    with open_session(config) as session:  # data, model, adapters, optimizer and folder
        learner, progress = session.learner, session.learner.progress
        session.validate_if_due(session.initial_scores)
        session.checkpoint_if_due()
        for slots, batches in session.remaining_steps():  # a resumed run continues at its first unfinished micro-batch
            learner.begin(batches, slots)  # count the label tokens of the step, over all processes
            for batch, slot in zip(batches, slots, strict=True):
                learner.backward(
                    learner.scaled_loss(batch, slot, last=slot is slots[-1])
                )  # scaled: k micro-batches are one batch
                if slot is not slots[-1]:
                    session.checkpoint_if_due()
            with learner.transaction():  # no checkpoint is written in the middle of an update
                grad_norm = learner.unscale_and_clip()  # divide by the loss scale, then clip
                rate = learning_rate(progress.step, progress.total, session.warmup, session.config.lr)
                update = learner.step(grad_norm, rate)  # skipped if the loss or a gradient is not finite
                session.log(update, rate, batches)
            session.check_skipped()
            session.checkpoint_if_due()
            session.validate_if_due()
        session.validate_if_due(at_the_end=True)
        return session.save_adapter()


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    It rises linearly to `peak` during `warmup` updates, then falls to 0 along half a cosine.

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
