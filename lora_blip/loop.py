"""The training loop, by hand: `train` reads top to bottom."""

import math
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from lora_blip import curves, lora, preflight, targets
from lora_blip.config import ConfigError, TrainConfig, refuse_unwritable
from lora_blip.data import annotations
from lora_blip.data.annotations import Example
from lora_blip.data.batches import Pictures, Stack, close, first_stack, loader
from lora_blip.models import Backbone, autocasting, open_backbone
from lora_blip.run import Run, Update, summary_writer
from lora_blip.tasks import TASKS, natural_task
from lora_blip.tasks.task import Batch, Generation, Task

TINY = 20_000_000  # parameters
Autocast = Callable[[], AbstractContextManager[Any]]


class TrainingError(RuntimeError):
    """Training cannot go on; what was learned until then has been saved."""


def train(config: TrainConfig) -> Path:
    """Train an adapter as `config` says; returns the path of its file.

    Raises ConfigError, ModelError, DataError or PreflightError before the first step, each with the
    remedy, and TrainingError when the numbers stop being finite. Ctrl-C, and any error later on, saves
    what there is.
    """
    seed_everything(config.seed)
    refuse_unwritable(config.output_dir)
    refuse_impossible(config)
    backbone, precision = open_backbone(config.model, config.device, config.precision, config.base_dtype, config.checkpointing)
    device = backbone.device
    task = task_for(config, backbone)
    config = replace(config, lr=config.lr or default_rate(backbone.model), task=task.name, prompt=task.prompt)
    config = replace(config, best_by=task.score_names[0] if config.best_by == "auto" else config.best_by)
    training, validation = read_examples(config, task)

    sites = targets.find(backbone.model, config.targets, config.r, config.alpha)
    parameters = [half for x in lora.inject(backbone.model, sites, config.dropout).values() for half in (x.A, x.B)]
    print(f"\n{targets.table(backbone.model)}\n")

    autocast = autocasting(device, precision)
    batches = loader_of(training, task, config, shuffle=True)
    held_out = loader_of(validation, task, config, shuffle=False) if validation else None
    first = task.batch(first_stack(batches))
    backbone.model.train()
    print(preflight.check(task, first, autocast), "\n", sep="")

    decayed = {"params": parameters, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW([decayed, {"params": task.parameters(), "weight_decay": 0.0}], lr=config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    total = total_steps(config, len(batches))
    warmup = min(config.warmup_steps, total // 5)
    every = config.validate_every or max(10, total // 10)
    before = validate(task, held_out, autocast, config.best_by) if held_out else {}  # a score that cannot be had stops here
    run = Run(config, task, total)
    print(f"{run.folder}: {total} steps of {precision}, {len(training)} lines to train on, {len(validation)} held out")
    step = validated = skipped_in_a_row = 0
    try:
        if held_out:
            run.log_validation(0, 0, before)
        for epoch in range(config.epochs):
            batches.batch_sampler.epoch = epoch  # type: ignore[union-attr]
            for stacks in groups(batches, config.accumulation):  # the tail of an epoch is a step too
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, warmup, config.lr)
                micro_batches = [task.batch(stack) for stack in stacks]
                update = apply_update(task, micro_batches, optimizer, scaler, config.max_grad_norm, autocast)
                if update.skipped:
                    skipped_in_a_row += 1
                    run.log_skip(step, epoch, update, explain(update, task, micro_batches, autocast))
                    if skipped_in_a_row >= config.max_skipped:
                        raise TrainingError(
                            f"{skipped_in_a_row} steps in a row were not finite; lower lr, or use bf16 or fp32. {run.last_note}"
                        )
                    continue  # the scheduler does not move either: `step` counts the updates that were made
                step, skipped_in_a_row = step + 1, 0
                run.log_step(step, epoch, update, optimizer.param_groups[0]["lr"], sum(len(b.examples) for b in micro_batches))
                if held_out and (step == total or step % every == 0):
                    run.log_validation(step, epoch, validate(task, held_out, autocast, config.best_by))
                    validated = step
                    if step < total and 0 < config.patience <= run.best.stale:
                        total = step
                        print(f"stopped early: no better {config.best_by} since step {run.best.step}")
                if step == total:
                    break
            if step == total:
                break
        if held_out and validated < step:  # skipped steps left the run short of its total
            run.log_validation(step, epoch, validate(task, held_out, autocast, config.best_by))
        path = run.save(step, finished=True, merge_drift=merge_drift(task, first))
    except BaseException as stop:  # Ctrl-C, or whatever else: what was learned is kept
        with uninterrupted():
            if step:
                print(f"\nstopped after {step} of {total} steps; saved {run.save(step, finished=False)}")
        if isinstance(stop, KeyboardInterrupt):
            raise SystemExit(130) from None
        raise
    finally:
        run.close()
        for loaded in filter(None, (batches, held_out)):
            close(loaded)
    print(f"saved {path}", *filter(None, [run.best_line()]), sep="\n")
    print(curves.draw(run.folder) or "pip install 'lora_blip[plots]' draws the loss curve")
    return path


# ---------------------------------------------------------------- arithmetic


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Rate of the update after `step` others: linear up to `peak` in `warmup` updates, then half a cosine to 0.

    Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def total_steps(config: TrainConfig, micro_batches: int) -> int:
    steps = config.epochs * -(-micro_batches // config.accumulation)
    return min(steps, config.max_steps) if config.max_steps else steps


def apply_update(
    task: Task,
    micro_batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    autocast: Autocast,
) -> Update:
    """One optimizer step over some micro-batches: exactly what one batch of all their rows would do.

    Each label token (of retrieval: each row) weighs the same, whichever micro-batch it stands in.
    """
    count = sum(batch.count for batch in micro_batches) or 1.0  # 0: nothing here to learn from
    loss = torch.zeros((), device=micro_batches[0].pixel_values.device)
    for batch in micro_batches:
        with autocast():
            share = task.loss(batch) / count
        scaler.scale(share).backward()
        loss += share.detach()
    scaler.unscale_(optimizer)  # clip true gradients, not scaled ones
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf))
    finite = math.isfinite(norm) and math.isfinite(float(loss))
    scale = scaler.get_scale()
    if finite or scaler.is_enabled():  # the scaler itself skips, and then lowers its scale
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Update(float(loss), norm, not finite or scaler.get_scale() < scale, scale)


@torch.no_grad()
def validate(task: Task, batches: DataLoader[Stack], autocast: Autocast, wanted: str = "") -> dict[str, float]:
    """Loss per label token over the held-out lines, and the task's scores over what it predicts of them."""
    model, total, count = task.backbone.model, 0.0, 0.0
    said: dict[Any, Any] = {}
    model.eval()
    for stack in batches:
        batch = task.batch(stack)
        with autocast():
            total += float(task.loss(batch))
            new = {task.subject(e): row for row, e in enumerate(batch.examples) if task.subject(e) not in said}
            if new:
                rows = list(new.values())
                said |= zip(new, task.predict(batch.pixel_values[rows], [batch.examples[row] for row in rows]), strict=True)
        count += batch.count
    model.train()
    examples = batches.dataset.examples  # type: ignore[attr-defined]
    return {"loss": total / (count or 1.0), **task.scores(said, examples, "" if wanted == "loss" else wanted)}


@torch.no_grad()
def merge_drift(task: Task, batch: Batch) -> dict[str, float]:
    """How far merged logits are from hooked ones on one batch, in the base's dtype: largest, and largest logit."""
    model = task.backbone.model.eval()
    with torch.autocast(task.backbone.device.type, model.dtype, enabled=model.dtype != torch.float32):
        hooked = task.logits(batch).float()
        lora.merge(model)
        merged = task.logits(batch).float()
    lora.restore(model)
    return {"largest_difference": float((merged - hooked).abs().max()), "largest_logit": float(hooked.abs().max())}


def explain(update: Update, task: Task, batches: list[Batch], autocast: Autocast) -> str:
    """Why a step was skipped: the first module that was not finite, or gradients alone that overflowed."""
    if math.isfinite(update.loss):
        return f"a gradient overflowed at loss scale {update.scale:g}"
    for batch in batches:
        with autocast():
            note = preflight.first_nonfinite(task.backbone.model, partial(task.logits, batch))
        if note.startswith("the first output"):
            break
    return note


# ---------------------------------------------------------------- set-up


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside the block Ctrl-C is not heard: an impatient second one must not lose what the first one saves."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def refuse_impossible(config: TrainConfig) -> None:
    """ConfigError for settings that contradict each other, or that need what is not installed."""
    if config.tensorboard:
        summary_writer()
    blind = {"best_by": config.best_by not in ("auto", ""), "patience": config.patience > 0}
    for name in (name for name, wanted in blind.items() if wanted and not config.val_fraction):
        raise ConfigError(
            f"{name} = {getattr(config, name)!r} needs images to validate on, and val_fraction is 0: set VAL_FRACTION"
        )


def task_for(config: TrainConfig, backbone: Backbone) -> Task:
    """The task that is to be learned; ConfigError if its score to pick the best by is none that it has."""
    name = natural_task(backbone.architecture) if config.task == "auto" else config.task
    task = TASKS[name](backbone, config.prompt, Generation(config.max_new_tokens, config.num_beams))
    task.require_score(config.best_by)
    return task


def default_rate(model: Any) -> float:
    """Peak learning rates that suit LoRA on the Salesforce checkpoints, and on bases a hundred times smaller."""
    size = sum(p.numel() for p in model.parameters())
    return 1e-4 if size > TINY else 1.5e-3 if model.config.model_type == "blip-2" else 3e-3


def read_examples(config: TrainConfig, task: Task) -> tuple[list[Example], list[Example]]:
    """Checked lines, split by image into training and validation, the latter in an order drawn from the seed."""
    examples, problems = annotations.read(config.annotations, config.image_root, config.on_bad_data, task.check)
    if problems:
        print(f"left out {len(problems)} line(s):\n{annotations.listing(problems)}")
    task.know(examples)
    training, validation = annotations.split_by_image(examples, config.val_fraction, config.seed)
    random.Random(config.seed).shuffle(validation)  # an image's lines side by side would be no negatives of each other
    return training, validation


def loader_of(examples: list[Example], task: Task, config: TrainConfig, shuffle: bool) -> DataLoader[Stack]:
    augmented = shuffle and config.augment
    pictures = Pictures(examples, task.backbone.image_processor, augmented, config.seed)
    cuda = task.backbone.device.type == "cuda"
    return loader(pictures, config.batch_size, shuffle, config.seed, config.num_workers, pin=cuda)


def groups(batches: Iterable[Stack], size: int) -> Iterator[list[Stack]]:
    """Micro-batches in lists of `size`; the last list may be shorter, and is never dropped."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
