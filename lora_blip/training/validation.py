"""How good a model is on the lines that were held out, and how far merging moves its logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm  # comes with transformers

from lora_blip.config import TrainConfig
from lora_blip.data.loader import HostBatch
from lora_blip.lora import merging
from lora_blip.models.compilation import uncompiled
from lora_blip.runtime.distributed import ALONE, Ranks
from lora_blip.tasks.base import DeviceBatch, Task
from lora_blip.tasks.text_length import CutCount
from lora_blip.training.learner import Autocast


def sharers(config: TrainConfig, ranks: Ranks) -> Ranks:
    """Who shares a validation: all ranks; with spread weights, which want the same forwards of all, each makes it whole."""
    return ALONE if config.shard else ranks


@torch.no_grad()
def validate(
    task: Task,
    batches: DataLoader[HostBatch],
    autocast: Autocast,
    wanted: str = "",
    ranks: Ranks = ALONE,
    pause: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Loss per label token over the held-out lines, and the task's scores over what it predicts of them.

    Each rank looks at its share of the batches; all get the same figures. `pause` is called before each batch. The number
    of texts that were cut is printed.
    """
    model, total, count = task.backbone.model, 0.0, 0.0
    said: dict[Any, Any] = {}
    model.eval()
    sampler: Any = batches.batch_sampler
    sampler.selected = range(ranks.rank, len(batches), ranks.count)
    host_batches = iter(batches)
    for _ in range(-(-len(batches) // ranks.count)):
        pause()
        host_batch = next(host_batches, None)
        if host_batch is None:  # the other ranks have one more
            continue
        batch = task.batch(host_batch)
        with uncompiled(model), autocast():
            seen = task.encode_batch(batch)
            total += float(task.loss(batch, seen))
            new = {task.subject(e): row for row, e in enumerate(batch.examples) if task.subject(e) not in said}
            if new:
                rows = list(new.values())
                examples = [batch.examples[row] for row in rows]
                said |= zip(new, task.predict_from_features(batch.per_example(seen)[rows], examples), strict=True)
        count += batch.count
    model.train()
    total, count = ranks.sum(total, count)
    everything = {key: value for some in reversed(ranks.all_gather(said)) for key, value in some.items()}
    every = batches.dataset.examples  # type: ignore[attr-defined]
    scores = task.scores(everything, every, "" if wanted == "loss" else wanted) if ranks.main else {}
    if ranks.main and (line := CutCount().add(everything.values()).report(task, "validation texts", every)):
        tqdm.write(f"warning: {line}")
    return {"loss": total / (count or 1.0), **ranks.broadcast(scores)}


@torch.no_grad()
def merge_drift(task: Task, batch: DeviceBatch, autocast: Autocast) -> dict[str, float]:
    """How far merged logits are from hooked ones on one batch, as it was trained: largest, and largest logit."""
    model = task.backbone.model.eval()
    with uncompiled(model), autocast():
        hooked = task.logits(batch).float()
        merging.merge(model)
        try:
            merged = task.logits(batch).float()
        finally:  # out of memory: the adapter stays on its hooks
            merging.restore(model)
    return {"largest_difference": float((merged - hooked).abs().max()), "largest_logit": float(hooked.abs().max())}
