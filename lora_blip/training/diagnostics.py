"""Explain errors of a training: memory, lost processes, numbers that are not finite."""

import math
from functools import partial

import torch

from lora_blip.config import TrainConfig
from lora_blip.errors import TrainingError
from lora_blip.models.compilation import uncompiled
from lora_blip.runtime.distributed import ALONE, Ranks, is_lost
from lora_blip.tasks.base import DeviceBatch, Task
from lora_blip.training import checkpoint, preflight
from lora_blip.training.learner import Autocast, Update
from lora_blip.training.run_folder import Run


def describe_error(error: RuntimeError, config: TrainConfig, task: Task, run: Run | None = None) -> RuntimeError:
    """Return the error, or a TrainingError with a remedy if the device has no memory left or another process was lost."""
    said = str(error)
    if run and run.learner.ranks.count > 1 and is_lost(error):
        return TrainingError(
            f"another process was lost; with torchrun --max-restarts, all processes resume from the last checkpoint in "
            f"{run.folder}"
        )
    if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in said:
        return error
    side = task.backbone.image_size
    saved = checkpoint.newest(run.folder)[0] if run else None
    step = saved.state["progress"]["step"] if saved else 0
    go_on = f"\nSaved after step {step}; to resume: --resume {saved.run} --allow-changed" if saved else ""
    return TrainingError(
        f"{task.backbone.device} ran out of memory at batch_size = {config.batch_size} and images of {side}×{side}. "
        "Lower batch_size and raise accumulation by as much, for the same updates; or set checkpointing = True; "
        f"or base_dtype = 'bf16'; or a smaller image_size.{go_on}"
    )


def describe_skip(update: Update, task: Task, batches: list[DeviceBatch], autocast: Autocast, ranks: Ranks = ALONE) -> str:
    """Return why a step was skipped: the first module whose output was not finite, or an overflow of a gradient."""
    if math.isfinite(update.loss):
        return f"a gradient overflowed at loss scale {update.scale:g}"
    notes = []
    for batch in batches:
        with uncompiled(task.backbone.model), autocast():
            notes.append(preflight.first_nonfinite(task.backbone.model, partial(task.logits, batch)))
    every: list[str] = [note for some in ranks.all_gather(notes) for note in some]
    return next((note for note in every if note.startswith("the first output")), every[-1])
