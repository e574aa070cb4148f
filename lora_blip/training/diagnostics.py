"""Turn errors of a training run into messages with a fix: too little memory, a lost process, values that are not finite."""

import math
from functools import partial

import torch

from lora_blip.config import TrainConfig
from lora_blip.data.loader import DeviceBatch
from lora_blip.errors import TrainingError
from lora_blip.models.compilation import uncompiled
from lora_blip.models.finite import first_nonfinite
from lora_blip.runtime.distributed import ALONE, Ranks
from lora_blip.runtime.limits import CPU_ALLOCATOR, is_lost_peer, is_out_of_memory
from lora_blip.runtime.system_errors import quoted_for_shell
from lora_blip.tasks.base import Task
from lora_blip.training import checkpoint
from lora_blip.training.learner import Autocast, Update
from lora_blip.training.preflight import ONLY_GRADIENTS
from lora_blip.training.run_folder import Run


def describe_error(error: RuntimeError, config: TrainConfig, task: Task, run: Run | None = None) -> RuntimeError:
    """Return a TrainingError with a fix if the device ran out of memory or a process was lost. Otherwise return `error`."""
    if run and run.learner.ranks.count > 1 and is_lost_peer(error):
        return TrainingError(
            "another process was lost. Start all processes again with the same settings: they resume from the last checkpoint "
            f"in {run.folder}. With torchrun --max-restarts 3, this happens automatically"
        )
    if not isinstance(error, torch.OutOfMemoryError) and not is_out_of_memory(error):
        return error
    side, device = task.backbone.image_size, "cpu" if CPU_ALLOCATOR in str(error) else task.backbone.device
    saved = checkpoint.newest(run.folder)[0] if run else None
    resume = ""
    if saved:
        step = saved.state["progress"]["step"]
        folder = quoted_for_shell(str(saved.run))
        resume = f"\nThe run is saved after step {step}; resume it with: --resume {folder} --allow-changed"
    half, double = config.batch_size // 2, 2 * config.accumulation
    same = "" if config.dropout or task.name == "retrieval" else ", which gives the same updates"
    smaller = f"--batch-size {half} --accumulation {double}{same}; or " if half else ""
    return TrainingError(
        f"{device} ran out of memory at batch_size = {config.batch_size} and images of {side}×{side}. "
        f"Try {smaller}--checkpointing, --base-dtype bf16 or a smaller --image-size.{resume}"
    )


def describe_skip(update: Update, task: Task, batches: list[DeviceBatch], autocast: Autocast, ranks: Ranks = ALONE) -> str:
    """Return the reason for a skipped step: the first module whose output was not finite, or the overflow of a gradient."""
    if math.isfinite(update.loss):
        return "a gradient overflowed" + (f" at loss scale {update.scale:g}" if update.scale != 1 else "")
    reasons = []
    for batch in batches:
        with uncompiled(task.backbone.model), autocast():
            reasons.append(first_nonfinite(task.backbone.model, partial(task.logits, batch)) or ONLY_GRADIENTS)
    all_reasons: list[str] = [reason for part in ranks.all_gather(reasons) for reason in part]
    return next((reason for reason in all_reasons if reason.startswith("the first output")), all_reasons[-1])
