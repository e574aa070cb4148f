"""Define `Session`, a training run from start to end. `train` calls its methods before, between and after the steps."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lora_blip.config import TrainConfig
from lora_blip.data.loader import DeviceBatch, HostBatch, Slot
from lora_blip.errors import CheckpointError, TrainingError
from lora_blip.lora.sites import quantization
from lora_blip.reports import plots
from lora_blip.runtime import distributed, signals
from lora_blip.runtime.counts import counted
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.limits import is_lost_peer
from lora_blip.runtime.progress import phase
from lora_blip.runtime.signals import StopRequest
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import Task
from lora_blip.tasks.frozen_prefix import Prefix
from lora_blip.tasks.text_length import fit_generation
from lora_blip.training import resume, summary
from lora_blip.training.best import scores_differ
from lora_blip.training.diagnostics import describe_error, describe_skip
from lora_blip.training.learner import Autocast, Learner, Update
from lora_blip.training.run_folder import Run
from lora_blip.training.schedule import remaining_steps, steps_of_epoch, total_steps
from lora_blip.training.setup import PreparedRun, prepare_run
from lora_blip.training.validation import merge_drift, validate, validating_ranks

NO_PLOT = 'no loss curve, because matplotlib is not installed: pip install "lora_blip[plots]"'


@contextmanager
def open_session(config: TrainConfig) -> Iterator["Session"]:
    """Prepare a run and yield its session. After the block, print the result and remove the checkpoints.

    Raise LoraBlipError before the first step if settings or data are invalid. If the block ends with an error or a signal,
    save the progress.
    """
    with distributed.joined() as ranks, ExitStack() as closing:
        try:
            session = start_session(ranks, config, closing)
            with session.saved_on_errors():
                yield session
            session.finish()
        except RuntimeError as error:
            if ranks.count == 1 or isinstance(error, TrainingError) or not is_lost_peer(error):
                raise
            raise TrainingError("another process ended before the first step; see its own error message") from None


def start_session(ranks: Ranks, config: TrainConfig, closing: ExitStack) -> "Session":
    """Prepare a new or a resumed run and return its session. `closing` closes its files and loaders."""
    prepared = prepare_run(ranks, config, closing)
    config, task, autocast = prepared.config, prepared.task, prepared.autocast
    learner = Learner(
        task, config.lr, config.weight_decay, config.max_grad_norm, prepared.precision, autocast, config.seed, ranks,
        lr_ratio=config.lr_ratio,
    )  # fmt: skip
    learner.progress.total = total_steps(config, len(prepared.batches), ranks.count)
    saved, identity, notes = load_checkpoint(prepared, learner, closing)
    config = replace(config, max_new_tokens=identity["max_new_tokens"])
    total = learner.progress.total
    stop_request = closing.enter_context(signals.catch_signals())
    scores: dict[str, float] = {}
    if prepared.held_out and learner.progress.validated < 0:
        # validate before the folder is created: if a score fails, no folder remains
        before_batch = partial(stop_if_requested, ranks, stop_request)
        scores = validate(
            task, prepared.held_out, autocast, config.best_by, validating_ranks(config, ranks), before_batch, prepared.prefix
        )
    run = Run(config, learner, identity, closing, saved)
    training, validation = len(prepared.training), len(prepared.validation)
    print(*map(printable, notes), run.summary_line(training, validation, prepared.precision), sep="\n")
    return Session(
        config, task, learner, run, autocast, prepared.batches, prepared.held_out, prepared.first, prepared.prefix,
        stop_request, prepared.scored, warmup=min(config.warmup_steps, total // 5),
        validate_every=config.validate_every or max(10, total // 10), initial_scores=scores,
    )  # fmt: skip


def load_checkpoint(prepared: PreparedRun, learner: Learner, closing: ExitStack) -> tuple[Any, dict[str, Any], list[str]]:
    """Load the checkpoint that RESUME selects. Return it (or None), the identity of the run, and notes to print."""
    config, task, ranks, identity = prepared.config, prepared.task, learner.ranks, prepared.identity
    saved, notes = ranks.broadcast(ranks.on_main(lambda: resume.acquire(config, identity, closing)))
    if saved:
        identity = resume.with_automatic_length(config, saved.state["identity"], identity)
        limit = identity["max_new_tokens"]
        if limit != task.generation.max_new_tokens and task.writes_text:
            notes.append(f"MAX_NEW_TOKENS remains {limit}, its value at the start of this run")
            examples = [*prepared.training, *prepared.validation]
            fit_generation(task, examples, limit, fix='RESUME = "off" starts a new run with room for all')
        resume.resume_from(learner, saved, identity, config, steps_of_epoch(config, len(prepared.batches), ranks.count))
        if scores_differ(saved.state["identity"], identity):
            notes.append("earlier validation scores cannot be compared with those of this start, so they do not count")
    return saved, identity, notes


@dataclass
class Session:
    """A new or resumed run that has started."""

    config: TrainConfig  # "auto" and 0 are replaced by the values that the run uses
    task: Task
    learner: Learner
    run: Run
    autocast: Autocast
    batches: DataLoader[HostBatch]
    held_out: DataLoader[HostBatch] | None
    first: DeviceBatch  # the first micro-batch of the run
    prefix: Prefix | None  # computes the cached states of images; None if no states are cached
    stop_request: StopRequest
    scored: str  # the split of the annotations that `evaluate` scores, or ""
    warmup: int  # number of updates with linear warm-up
    validate_every: int  # number of updates between two validations
    initial_scores: dict[str, float]  # scores of the validation before the first step; {} if there was none

    # ---------------------------------------------------------------- a step

    def remaining_steps(self) -> Iterator[tuple[list[Slot], list[DeviceBatch]]]:
        """Yield the slots and the micro-batches of each remaining step."""
        epochs, accumulation, learner = self.config.epochs, self.config.accumulation, self.learner
        for slots, host_batches in remaining_steps(self.batches, epochs, accumulation, learner.progress, learner.ranks):
            yield slots, [self.task.batch(host_batch, self.prefix) for host_batch in host_batches]

    def log(self, update: Update, rate: float, batches: list[DeviceBatch]) -> None:
        """Log the metrics of an update, or the reason why it was skipped."""
        learner, progress = self.learner, self.learner.progress
        if update.skipped:
            reason = describe_skip(update, self.task, batches, self.autocast, learner.ranks)
            self.run.log_skip(progress.step, progress.epoch, update, reason)
        else:
            self.run.log_step(progress.step, progress.epoch, update, rate, learner.images)

    def stop_after_skipped_steps(self) -> None:
        """Raise TrainingError if too many steps in a row were skipped because a loss or gradient was not finite."""
        skipped = self.learner.progress.skipped
        if self.learner.progress.fails(self.config.max_skipped, self.config.epochs):
            wider = {"fp16": ["bf16", "fp32"], "bf16": ["fp32"]}.get(self.config.precision, [])
            fixes = ["lower LR", *(f'set PRECISION = "{name}" (--precision {name})' for name in wider)]
            fixes += ["set COMPILE = False (--no-compile)"] * self.config.compile
            raise TrainingError(
                f"{counted(skipped, 'step')} in a row: skipped because a loss or gradient was not finite. "
                + f"The last reason: {self.run.last_skip}. " * bool(self.run.last_skip)  # unknown after a resume
                + f"To fix it, start a new run (RESUME = 'off', --resume off), and in it "
                f"{', or '.join(fixes)}"
            )

    # ---------------------------------------------------------------- between two steps

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint if `checkpoint_seconds` have passed. After a signal, write one and raise signals.Stopped."""
        due, *requests = self.learner.ranks.sum(self.run.checkpoint_is_due, *stop_requests(self.stop_request))
        if not (due or any(requests)):
            return
        self.stop_request.saving = any(requests)
        self.run.checkpoint()
        if any(requests):
            self.run.save_unfinished()
            raise signals.Stopped(signals.INTERRUPTED if requests[0] else signals.SAVED)

    def validate_if_due(self, scores: dict[str, float] | None = None, at_the_end: bool = False) -> None:
        """Validate every `validate_every` steps and at the end, each step only once. End the run if `patience` is exhausted.

        scores: the scores of this step, if they are already computed.
        """
        learner, progress, config, run = self.learner, self.learner.progress, self.config, self.run
        due = bool(scores) or at_the_end or progress.step == progress.total or progress.step % self.validate_every == 0
        if self.held_out is None or progress.validated == progress.step or not due:
            return
        ranks = validating_ranks(config, learner.ranks)
        scores = scores or validate(
            self.task, self.held_out, self.autocast, config.best_by, ranks, self.checkpoint_if_due, self.prefix
        )
        with learner.transaction():
            run.log_validation(progress.step, progress.epoch, scores)
            progress.validated = progress.step
            if progress.step < progress.total and 0 < config.patience <= run.best.stale:
                progress.total = progress.step
                fix = "PATIENCE = 0 trains to the end"
                print(f"stopped early: {config.best_by} has not improved since step {run.best.improved}; {fix}")

    # ---------------------------------------------------------------- the end

    def save_adapter(self) -> Path:
        """Save the adapter with its merge drift, wait for all processes, and return the path of the file."""
        mergeable = not self.config.shard and not quantization(self.task.backbone.model)
        measures_drift = self.learner.ranks.main and mergeable
        with phase("merging the adapter, to measure how much its logits change"):
            drift = attempt("merge drift", lambda: merge_drift(self.task, self.first, self.autocast)) if measures_drift else {}
        path = self.run.save(self.learner.progress.step, finished=True, merge_drift=drift or {})
        self.learner.ranks.wait()  # the checkpoints are removed after this
        return path

    @contextmanager
    def saved_on_errors(self) -> Iterator[None]:
        """After an error or a second Ctrl-C in the block, save the progress. Describe an error with a fix, if one is known."""
        try:
            yield
        except signals.Stopped:
            raise
        except BaseException as error:
            self.stop_request.saving = True
            if not isinstance(error, CheckpointError):  # after a CheckpointError, the disk is full
                self.rescue()
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(signals.INTERRUPTED) from None
            if isinstance(error, RuntimeError):
                raise describe_error(error, self.config, self.task, self.run) from None
            raise
        finally:
            self.run.close()

    def rescue(self) -> None:
        """Save the progress after an error. If that fails, print the reason; the earlier checkpoints remain."""
        try:
            if not self.learner.inconsistent:
                self.learner.rewind()
                self.run.checkpoint()
            self.run.save_unfinished()
        except (OSError, CheckpointError, RuntimeError) as error:
            with suppress(OSError):  # the terminal may be closed
                print(printable(f"the progress since the last checkpoint could not be saved: {error}"))

    def finish(self) -> None:
        """Print the adapter, its score and the next command, draw the loss curve, and remove the checkpoints."""
        run = self.run
        start = "initial adapter" if self.config.init_adapter else "base"
        held_out: Any = self.held_out.dataset.examples if self.held_out else ()  # type: ignore[attr-defined]
        images = len({example.file for example in held_out})
        print(
            f"saved {printable(run.adapter_path)}",
            *filter(None, [summary.score_line(run.folder, run.best, "" if run.rescored else start, images)]),
            sep="\n",
        )
        if skipped := self.learner.progress.skipped:
            print(
                f"warning: {counted(skipped, 'step', 'were')} skipped at the end, because a loss or gradient was not finite; "
                "if the results of the adapter are wrong, lower LR"
            )
        if self.learner.ranks.main and (plot := attempt("loss curve", lambda: plots.draw(run.folder) or NO_PLOT)):
            print(printable(plot if plot == NO_PLOT else f"loss curve: {plot}"))
        dataset: Any = self.batches.dataset
        command = summary.next_command(self.task.name, run.folder, dataset.examples)
        print(f"next{' (for other images, change --images)' * ('--images' in command)}: {command}")
        sources = self.config.annotations, self.config.val_annotations
        reading = summary.reading_flags(self.config)
        print(summary.evaluate_line(self.task.name, run.folder, *sources, dataset.examples, reading, self.scored))
        run.delete_checkpoints()  # last: a run that is killed before this line can be resumed


def stop_if_requested(ranks: Ranks, stop_request: StopRequest) -> None:
    """Raise signals.Stopped if any process has received a signal. Nothing is saved, because the run has no folder yet."""
    requests = ranks.sum(*stop_requests(stop_request))
    if any(requests):
        raise signals.Stopped(signals.INTERRUPTED if requests[0] else signals.SAVED)


def stop_requests(stop_request: StopRequest) -> tuple[bool, bool]:
    """Return whether this process has received Ctrl-C, and whether it has received a signal of a scheduler."""
    return stop_request.signal == signal.SIGINT, stop_request.signal not in (0, signal.SIGINT)
