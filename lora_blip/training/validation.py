"""Validate a model on the held-out lines, and measure how much merging changes its logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm  # comes with transformers

from lora_blip.config import TrainConfig
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.lora import merging
from lora_blip.lora.mergeable import OtherUpdateError
from lora_blip.models.compilation import uncompiled
from lora_blip.runtime.distributed import ALONE, Ranks
from lora_blip.runtime.progress import track
from lora_blip.tasks.base import Task
from lora_blip.tasks.frozen_prefix import Prefix
from lora_blip.tasks.text_length import TextCount
from lora_blip.training.learner import Autocast


def validating_ranks(config: TrainConfig, ranks: Ranks) -> Ranks:
    """Return the processes that share the batches of a validation.

    With sharded weights, all processes must run the same forwards, so each of them validates all batches.
    """
    return ALONE if config.shard else ranks


@torch.no_grad()
def validate(
    task: Task,
    batches: DataLoader[HostBatch],
    autocast: Autocast,
    best_by: str = "",
    ranks: Ranks = ALONE,
    before_batch: Callable[[], None] = lambda: None,
    prefix: Prefix | None = None,
) -> dict[str, float]:
    """Return the loss per label token of the held-out lines, and the scores of the task's predictions for them.

    Each process computes a share of the batches, and all return the same scores. Print a warning if predictions were cut at
    MAX_NEW_TOKENS.

    best_by: the name of a score that must be computed.
    before_batch: called before each batch.
    prefix: computes the cached states of images; None if there are none.
    """
    model, total, count = task.backbone.model, 0.0, 0.0
    predictions: dict[Any, Any] = {}  # subject → prediction
    model.eval()
    sampler: Any = batches.batch_sampler
    sampler.selected = range(ranks.rank, len(batches), ranks.count)
    host_batches = iter(batches)
    rounds = -(-len(batches) // ranks.count)
    for _ in track(range(rounds), "validation", rounds, "batch", delay=2):
        before_batch()
        host_batch = next(host_batches, None)
        if host_batch is None:  # other processes have one more batch, and call `before_batch` for it
            continue
        batch = task.batch(host_batch, prefix)
        with uncompiled(model), autocast():
            features = batch.encode_images(task.encoder)
            total += float(task.loss(batch, features))
            new_rows = {task.subject(e): row for row, e in enumerate(batch.examples) if task.subject(e) not in predictions}
            if new_rows:
                rows = list(new_rows.values())
                examples = [batch.examples[row] for row in rows]
                texts = task.predict_from_features(batch.per_example(features)[rows], examples)
                predictions |= zip(new_rows, texts, strict=True)
        count += batch.count
    model.train()
    total, count = ranks.sum(total, count)
    predictions = {key: value for part in reversed(ranks.all_gather(predictions)) for key, value in part.items()}
    examples = batches.dataset.examples  # type: ignore[attr-defined]
    scores = task.scores(predictions, examples, "" if best_by == "loss" else best_by) if ranks.main else {}
    for line in TextCount().add(predictions.values()).warnings(task, "validation texts", examples) if ranks.main else ():
        tqdm.write(f"warning: {line}")
    return {"loss": total / (count or 1.0), **ranks.broadcast(scores)}


@torch.no_grad()
def merge_drift(task: Task, batch: DeviceBatch, autocast: Autocast) -> dict[str, float]:
    """Compare the logits of a batch with merged weights and with hooks, in the precision of training.

    Return the largest absolute difference and the largest absolute logit. Print why, and return {}, if a merge is not possible
    after an edit of `layer.py`.
    """
    model = task.backbone.model.eval()
    with uncompiled(model), autocast():
        hooked = task.logits(batch).float()
        try:
            merging.merge(model)
        except OtherUpdateError as error:
            tqdm.write(f"warning: {error.difference}, so predictions do not merge this adapter")
            return {}
        try:
            merged = task.logits(batch).float()
        finally:  # also restore after an error, such as out of memory
            merging.restore(model)
    return {"largest_difference": float((merged - hooked).abs().max()), "largest_logit": float(hooked.abs().max())}
