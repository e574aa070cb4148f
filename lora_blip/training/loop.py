"""The training loop, by hand: `train` reads top to bottom."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lora_blip.config import TrainConfig, refuse_unwritable
from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch, Slot, close, first_batch, slots_of_steps
from lora_blip.data.split_leaks import Thumbnails
from lora_blip.errors import CheckpointError, TrainingError
from lora_blip.lora import attached, injection, targets
from lora_blip.models import sharding, weights
from lora_blip.models.compilation import compile_blocks
from lora_blip.models.loading import open_backbone
from lora_blip.models.precision import autocasting
from lora_blip.reports import plots
from lora_blip.runtime import distributed, signals
from lora_blip.runtime.agreement import require_same
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.seeding import seed_everything
from lora_blip.runtime.signals import StopRequest
from lora_blip.runtime.untrusted import printable, printable_lines
from lora_blip.tasks import verification
from lora_blip.tasks.base import DeviceBatch, Task
from lora_blip.tasks.frozen_prefix import first_adapted_block
from lora_blip.tasks.text_length import fit_generation
from lora_blip.training import caching, preflight, resume
from lora_blip.training.diagnostics import explain, explained
from lora_blip.training.learner import Autocast, Learner, Progress
from lora_blip.training.run_folder import Run
from lora_blip.training.setup import default_rate, loader_of, read_examples, refuse_impossible, task_for, warn_of_leaks
from lora_blip.training.validation import merge_drift, sharers, validate

NO_PLOT = "pip install 'lora_blip[plots]' draws the loss curve"


def train(config: TrainConfig) -> Path:
    """Train an adapter as `config` says; returns the path of its file.

    Raises ConfigError, ModelError, DataError, PreflightError or CheckpointError before the first step, each with the
    remedy, and TrainingError when the numbers stop being finite or the device's memory does not suffice. Ctrl-C, a
    scheduler's signal, and any error later on, save what there is, to go on from.
    """
    with distributed.joined() as ranks, ExitStack() as closing:
        try:
            return train_among(ranks, config, closing)
        except RuntimeError as error:
            if ranks.count == 1 or isinstance(error, TrainingError) or not distributed.is_lost(error):
                raise
            raise TrainingError("another process was lost before the first step; its own message says why") from None


def train_among(ranks: Ranks, config: TrainConfig, closing: ExitStack) -> Path:
    """The run, as one of torchrun's processes or alone; what is to be closed at its end goes into `closing`."""
    config, task, precision, training, validation, identity = ranks.together(lambda: set_up(ranks, config))
    require_same(ranks, identity)
    backbone = task.backbone
    print(f"\n{targets.table(backbone.model)}\n")
    caches = ranks.together(lambda: caching.caches_for(config, task, precision, identity))
    print(printable_lines(caching.told(config, task)), end="")
    identity["learned from"] = caching.learns_from_kept(config, task)
    attached.fast(backbone.model, config.fast)
    if config.base_dtype == "auto":
        weights.cast_once(backbone, precision)
    if config.shard:
        sharding.shard(backbone, ranks.count)

    autocast = autocasting(backbone.device, precision)
    batches = loader_of(training, task, config, shuffle=True, caches=caches)
    held_out = loader_of(validation, task, config, shuffle=False, caches=caches) if validation else None
    for loaded in filter(None, (batches, held_out)):
        closing.callback(close, loaded)
    first = ranks.together(lambda: task.batch(first_batch(batches)))
    backbone.model.train()
    alone = distributed.ALONE if config.shard else ranks  # the forwards of spread weights are collectives
    print(alone.together(lambda: proofs(config, task, first, autocast)), "\n", sep="")
    if config.compile:
        frozen, blocks = first_adapted_block(backbone.model)[0], len(backbone.model.vision_model.encoder.layers)
        compile_blocks(backbone.model, frozen)
        print(f"torch.compile for {blocks - frozen} of the ViT's {blocks} blocks, at the first step\n")
    changing = ("compile", "base_dtype", "checkpointing", "shard")
    verification.before_training(
        task, first, precision, autocast, {name: getattr(config, name) for name in changing}, ranks, held_out is not None
    )

    learner = Learner(task, config.lr, config.weight_decay, config.max_grad_norm, precision, autocast, config.seed, ranks)
    learner.progress.total = total_steps(config, len(batches), ranks.count)
    saved, notes = ranks.broadcast(ranks.on_main(lambda: resume.hold(config, identity, closing)))
    if saved:
        identity = resume.as_begun(config, saved.about["identity"], identity)
        if identity["max_new_tokens"] != task.generation.max_new_tokens and task.writes_text:
            notes.append(f"MAX_NEW_TOKENS = {identity['max_new_tokens']}, as the run began")
            fit_generation(
                task, [*training, *validation], identity["max_new_tokens"], fix='RESUME = "off" begins with room for all'
            )
        resume.take_up(learner, saved, identity)
    config = replace(config, max_new_tokens=identity["max_new_tokens"])
    progress = learner.progress
    warmup, every = min(config.warmup_steps, progress.total // 5), config.validate_every or max(10, progress.total // 10)
    stop_request = closing.enter_context(signals.catch_signals())
    before: dict[str, float] = {}
    if held_out and progress.validated < 0:  # a score that cannot be had stops here, before anything is written
        with_whom, leave = sharers(config, ranks), partial(leave_if_told, ranks, stop_request)
        before = validate(task, held_out, autocast, config.best_by, with_whom, leave)
    run = Run(config, learner, identity, closing, saved)
    print(*map(printable, notes), run.line(len(training), len(validation), precision), sep="\n")
    pause = partial(between, run, stop_request)
    look = partial(validate_when_due, run, held_out, every, autocast, pause)
    try:
        look(before)
        pause()
        for slots, host_batches in steps_left(batches, config.epochs, config.accumulation, progress, ranks):
            micro_batches = [task.batch(host_batch) for host_batch in host_batches]
            learner.begin(micro_batches, slots)
            for batch, slot in zip(micro_batches, slots, strict=True):
                learner.accumulate(batch, slot, last=slot is slots[-1])
                if slot is not slots[-1]:
                    pause()
            with learner.whole():
                rate = learning_rate(progress.step, progress.total, warmup, config.lr)
                update = learner.update(rate)
                if update.skipped:
                    run.log_skip(progress.step, progress.epoch, update, explain(update, task, micro_batches, autocast, ranks))
                else:
                    run.log_step(progress.step, progress.epoch, update, rate, learner.images)
            if progress.skipped >= config.max_skipped:
                raise TrainingError(
                    f"{progress.skipped} steps in a row were not finite; lower lr, or use bf16 or fp32. {run.last_note}"
                )
            pause()
            look()
        look(at_the_end=True)
        measured = ranks.main and not config.shard
        drift = attempt("merge drift", lambda: merge_drift(task, first, autocast)) if measured else {}
        path = run.save(progress.step, finished=True, merge_drift=drift or {})
        ranks.wait()  # a rank that is lost before this has the run go on from its last checkpoint
    except signals.Stopped:
        raise
    except BaseException as error:  # an error, or a second Ctrl-C: what was learned is kept
        stop_request.saving = True
        if not isinstance(error, CheckpointError):  # there is no room for anything
            rescue(run)
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(signals.INTERRUPTED) from None
        if isinstance(error, RuntimeError):
            raise explained(error, config, task, run) from None
        raise
    finally:
        run.close()
    print(f"saved {printable(path)}", *filter(None, [run.best_line()]), sep="\n")
    if ranks.main and (plot := attempt("loss curve", lambda: plots.draw(run.folder) or NO_PLOT)):
        print(printable(plot))
    run.done()  # last of all: whoever is killed before this is gone on with
    return path


def set_up(ranks: Ranks, config: TrainConfig) -> tuple[TrainConfig, Task, str, list[Example], list[Example], dict[str, Any]]:
    """Return the settings with their automatic values, the task, the precision, the data, and the run's identity.

    The adapters are on the backbone. No collective is called: an error on one rank reaches the others afterwards.
    """
    seed_everything(config.seed)
    refuse_unwritable(config.output_dir)
    refuse_impossible(config, ranks)
    device = ranks.device(config.device)
    backbone, precision = open_backbone(
        config.model, device, config.precision, config.base_dtype, config.checkpointing, config.fast, config.image_size
    )
    task = task_for(config, backbone)
    config = replace(config, lr=config.lr or default_rate(backbone.model), task=task.name, prompt=task.prompt)
    config = replace(config, best_by=task.score_names[0] if config.best_by == "auto" else config.best_by)
    thumbnails = Thumbnails() if ranks.main and (config.val_fraction or config.val_annotations) else None
    training, validation = read_examples(config, task, thumbnails)
    if thumbnails:
        attempt(
            "search for validation images in the training data",
            partial(warn_of_leaks, config, training, validation, thumbnails),
        )
    fitted = replace(config, max_new_tokens=fit_generation(task, [*training, *validation], config.max_new_tokens))
    injection.inject(backbone.model, targets.find(backbone.model, config.targets, config.r, config.alpha), config.dropout)
    identity = resume.identity(fitted, precision, backbone, training, validation, ranks.count)
    return config, task, precision, training, validation, identity


def proofs(config: TrainConfig, task: Task, first: DeviceBatch, autocast: Autocast) -> str:
    """Return what the checks before the first step found. Raise PreflightError, or an error that says what to change."""
    try:
        return preflight.check(task, first, autocast)
    except RuntimeError as error:
        raise explained(error, config, task) from None


# ---------------------------------------------------------------- between the steps


def steps_left(
    batches: DataLoader[HostBatch], epochs: int, accumulation: int, progress: Progress, ranks: Ranks
) -> Iterator[tuple[list[Slot], list[HostBatch]]]:
    """Step after step, what is still to be done of it: its slots for this rank, with their micro-batches."""
    sampler: Any = batches.batch_sampler
    while progress.epoch < epochs and progress.step < progress.total:
        steps = slots_of_steps(len(batches), accumulation, ranks.rank, ranks.count)[progress.group :]
        if steps:
            steps[0] = steps[0][progress.slot :]
        sampler.epoch, sampler.selected = progress.epoch, [slot.number for slots in steps for slot in slots]
        host_batches = iter(batches)
        for slots in steps:
            if progress.step < progress.total:
                yield slots, list(islice(host_batches, len(slots)))
        progress.epoch, progress.group = progress.epoch + 1, 0


def between(run: Run, stop_request: StopRequest) -> None:
    """Between two micro-batches: make a checkpoint if it is time, or if the run was told to stop, which it then does."""
    due, *told = run.learner.ranks.sum(run.due, *signs(stop_request))
    if not (due or any(told)):
        return
    stop_request.saving = any(told)
    run.checkpoint()
    if any(told):
        run.save_unfinished()
        raise signals.Stopped(signals.INTERRUPTED if told[0] else signals.SAVED)


def leave_if_told(ranks: Ranks, stop_request: StopRequest) -> None:
    """Before there is a run: nothing is to be saved."""
    told = ranks.sum(*signs(stop_request))
    if any(told):
        raise signals.Stopped(signals.INTERRUPTED if told[0] else signals.SAVED)


def signs(stop_request: StopRequest) -> tuple[bool, bool]:
    """Whether the user, and whether a scheduler, told this rank to stop."""
    return stop_request.signal == signal.SIGINT, stop_request.signal not in (0, signal.SIGINT)


def validate_when_due(
    run: Run,
    held_out: DataLoader[HostBatch] | None,
    every: int,
    autocast: Autocast,
    pause: Callable[[], None],
    scores: dict[str, float] | None = None,
    at_the_end: bool = False,
) -> None:
    """Validate (unless `scores` are known already) where it is time to and has not been done; decide whether to go on."""
    learner, progress, config = run.learner, run.learner.progress, run.config
    due = at_the_end or progress.step == progress.total or progress.step % every == 0
    if held_out is None or progress.validated == progress.step or not due:
        return
    scores = scores or validate(learner.task, held_out, autocast, config.best_by, sharers(config, learner.ranks), pause)
    with learner.whole():
        run.log_validation(progress.step, progress.epoch, scores)
        progress.validated = progress.step
        if progress.step < progress.total and 0 < config.patience <= run.best.stale:
            progress.total = progress.step
            print(f"stopped early: no better {config.best_by} since step {run.best.improved}")


def rescue(run: Run) -> None:
    """After an error, keep what was learned, unless that fails too: the checkpoints before it are there in any case."""
    try:
        if not run.learner.torn:
            run.learner.rewind()
            run.checkpoint()
        run.save_unfinished()
    except (OSError, CheckpointError, RuntimeError) as error:
        with suppress(OSError):
            print(printable(f"what was learned since the last checkpoint could not be saved: {error}"))


# ---------------------------------------------------------------- arithmetic


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Rate of the update after `step` others: linear up to `peak` in `warmup` updates, then half a cosine to 0.

    Loshchilov & Hutter 2017 (arXiv:1608.03983), eq. 5, without restarts.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def total_steps(config: TrainConfig, micro_batches: int, ranks: int = 1) -> int:
    steps = config.epochs * -(-micro_batches // (config.accumulation * ranks))
    return min(steps, config.max_steps) if config.max_steps else steps
