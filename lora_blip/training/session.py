"""A training run from its start to its end: what `train` needs for a step, and what happens between two steps."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from lora_blip.config import TrainConfig
from lora_blip.data.loader import HostBatch, Slot
from lora_blip.errors import CheckpointError, TrainingError
from lora_blip.reports import plots
from lora_blip.runtime import distributed, signals
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.signals import StopRequest
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks.base import DeviceBatch, Task
from lora_blip.tasks.text_length import fit_generation
from lora_blip.training import resume
from lora_blip.training.diagnostics import describe_error, describe_skip
from lora_blip.training.learner import Autocast, Learner, Update
from lora_blip.training.run_folder import Run
from lora_blip.training.schedule import remaining_steps, total_steps
from lora_blip.training.setup import PreparedRun, prepare
from lora_blip.training.validation import merge_drift, sharers, validate

NO_PLOT = 'no loss curve, because matplotlib is not installed: pip install "lora_blip[plots]"'


@contextmanager
def open_session(config: TrainConfig) -> Iterator["Session"]:
    """Prepare a run and yield its session. At the end, report it; after an error or a signal, save what was learned.

    Every refusal comes before the first step.
    """
    with distributed.joined() as ranks, ExitStack() as closing:
        try:
            session = start(ranks, config, closing)
            with session.saved_after_errors():
                yield session
            session.finish()
        except RuntimeError as error:
            if ranks.count == 1 or isinstance(error, TrainingError) or not distributed.is_lost(error):
                raise
            raise TrainingError("another process was lost before the first step; its own message says why") from None


def start(ranks: Ranks, config: TrainConfig, closing: ExitStack) -> "Session":
    """Return the session of a new or a resumed run. Everything that must be closed at its end is added to `closing`."""
    prepared = prepare(ranks, config, closing)
    config, task, autocast = prepared.config, prepared.task, prepared.autocast
    learner = Learner(
        task, config.lr, config.weight_decay, config.max_grad_norm, prepared.precision, autocast, config.seed, ranks
    )
    learner.progress.total = total_steps(config, len(prepared.batches), ranks.count)
    saved, identity, notes = resumed(prepared, learner, closing)
    config = replace(config, max_new_tokens=identity["max_new_tokens"])
    total = learner.progress.total
    stop_request = closing.enter_context(signals.catch_signals())
    scores: dict[str, float] = {}
    if prepared.held_out and learner.progress.validated < 0:  # a score that cannot be computed fails before anything is written
        pause = partial(stop_if_requested, ranks, stop_request)
        scores = validate(task, prepared.held_out, autocast, config.best_by, sharers(config, ranks), pause)
    run = Run(config, learner, identity, closing, saved)
    training, validation = len(prepared.training), len(prepared.validation)
    print(*map(printable, notes), run.line(training, validation, prepared.precision), sep="\n")
    return Session(
        config, task, learner, run, autocast, prepared.batches, prepared.held_out, prepared.first, stop_request,
        warmup=min(config.warmup_steps, total // 5), validate_every=config.validate_every or max(10, total // 10),
        initial_scores=scores,
    )  # fmt: skip


def resumed(prepared: PreparedRun, learner: Learner, closing: ExitStack) -> tuple[Any, dict[str, Any], list[str]]:
    """Load the checkpoint that RESUME selects into the learner, if there is one.

    Return the checkpoint or None, the identity of the run, and notes for the user.
    """
    config, task, ranks, identity = prepared.config, prepared.task, learner.ranks, prepared.identity
    saved, notes = ranks.broadcast(ranks.on_main(lambda: resume.acquire(config, identity, closing)))
    if saved:
        identity = resume.as_begun(config, saved.about["identity"], identity)
        limit = identity["max_new_tokens"]
        if limit != task.generation.max_new_tokens and task.writes_text:
            notes.append(f"MAX_NEW_TOKENS stays {limit}, the value at the start of this run")
            examples = [*prepared.training, *prepared.validation]
            fit_generation(task, examples, limit, fix='RESUME = "off" begins with room for all')
        resume.resume_from(learner, saved, identity)
    return saved, identity, notes


@dataclass
class Session:
    """A run that has started."""

    config: TrainConfig  # with its automatic values
    task: Task
    learner: Learner
    run: Run
    autocast: Autocast
    batches: DataLoader[HostBatch]
    held_out: DataLoader[HostBatch] | None
    first: DeviceBatch  # the first micro-batch of the run
    stop_request: StopRequest
    warmup: int  # updates
    validate_every: int  # updates
    initial_scores: dict[str, float]  # of the validation before the first step; empty if there was none

    # ---------------------------------------------------------------- a step

    def remaining_steps(self) -> Iterator[tuple[list[Slot], list[DeviceBatch]]]:
        """Yield the slots of each remaining step, with their micro-batches."""
        epochs, accumulation, learner = self.config.epochs, self.config.accumulation, self.learner
        for slots, host_batches in remaining_steps(self.batches, epochs, accumulation, learner.progress, learner.ranks):
            yield slots, [self.task.batch(host_batch) for host_batch in host_batches]

    def log(self, update: Update, rate: float, batches: list[DeviceBatch]) -> None:
        """Write the line of an update, or the reason why it was skipped."""
        learner, progress = self.learner, self.learner.progress
        if update.skipped:
            reason = describe_skip(update, self.task, batches, self.autocast, learner.ranks)
            self.run.log_skip(progress.step, progress.epoch, update, reason)
        else:
            self.run.log_step(progress.step, progress.epoch, update, rate, learner.images)

    def check_skipped(self) -> None:
        """Raise TrainingError if `max_skipped` steps in a row were not finite."""
        skipped = self.learner.progress.skipped
        if skipped >= self.config.max_skipped:
            raise TrainingError(
                f"{skipped} steps in a row were not finite; lower lr, or use bf16 or fp32. {self.run.last_note}"
            )

    # ---------------------------------------------------------------- between two steps

    def checkpoint_if_due(self) -> None:
        """Write a checkpoint if it is time, or if a signal asks the run to stop. In that case raise signals.Stopped."""
        due, *requests = self.learner.ranks.sum(self.run.due, *stop_requests(self.stop_request))
        if not (due or any(requests)):
            return
        self.stop_request.saving = any(requests)
        self.run.checkpoint()
        if any(requests):
            self.run.save_unfinished()
            raise signals.Stopped(signals.INTERRUPTED if requests[0] else signals.SAVED)

    def validate_if_due(self, scores: dict[str, float] | None = None, at_the_end: bool = False) -> None:
        """Validate if it is time and this step is not validated yet. Without improvement for `patience` times, end the run.

        `scores`: the result of this validation, if it is known already.
        """
        learner, progress, config, run = self.learner, self.learner.progress, self.config, self.run
        due = at_the_end or progress.step == progress.total or progress.step % self.validate_every == 0
        if self.held_out is None or progress.validated == progress.step or not due:
            return
        scores = scores or validate(
            self.task, self.held_out, self.autocast, config.best_by, sharers(config, learner.ranks), self.checkpoint_if_due
        )
        with learner.transaction():
            run.log_validation(progress.step, progress.epoch, scores)
            progress.validated = progress.step
            if progress.step < progress.total and 0 < config.patience <= run.best.stale:
                progress.total = progress.step
                print(f"stopped early: no better {config.best_by} since step {run.best.improved}")

    # ---------------------------------------------------------------- the end

    def save_adapter(self) -> Path:
        """Write the adapter with its merge drift, and return its path when all processes have come here."""
        measured = self.learner.ranks.main and not self.config.shard
        drift = attempt("merge drift", lambda: merge_drift(self.task, self.first, self.autocast)) if measured else {}
        path = self.run.save(self.learner.progress.step, finished=True, merge_drift=drift or {})
        self.learner.ranks.wait()  # if a process is lost before this, the run resumes from its last checkpoint
        return path

    @contextmanager
    def saved_after_errors(self) -> Iterator[None]:
        """After an error or a second Ctrl-C in the block, save what was learned. Replace the error by one with a remedy."""
        try:
            yield
        except signals.Stopped:
            raise
        except BaseException as error:
            self.stop_request.saving = True
            if not isinstance(error, CheckpointError):  # the disk is full
                self.rescue()
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(signals.INTERRUPTED) from None
            if isinstance(error, RuntimeError):
                raise describe_error(error, self.config, self.task, self.run) from None
            raise
        finally:
            self.run.close()

    def rescue(self) -> None:
        """Save what was learned before an error. If that fails too, the earlier checkpoints remain."""
        try:
            if not self.learner.inconsistent:
                self.learner.rewind()
                self.run.checkpoint()
            self.run.save_unfinished()
        except (OSError, CheckpointError, RuntimeError) as error:
            with suppress(OSError):
                print(printable(f"what was learned since the last checkpoint could not be saved: {error}"))

    def finish(self) -> None:
        """Print where the adapter is, draw the loss curve, and remove the checkpoints."""
        run = self.run
        print(f"saved {printable(run.adapter_path)}", *filter(None, [run.best_line()]), sep="\n")
        if self.learner.ranks.main and (plot := attempt("loss curve", lambda: plots.draw(run.folder) or NO_PLOT)):
            print(printable(plot))
        run.done()  # last: a run that is killed before this can be resumed


def stop_if_requested(ranks: Ranks, stop_request: StopRequest) -> None:
    """Raise signals.Stopped if a signal asks any process to stop. Called before there is a run, so nothing is saved."""
    requests = ranks.sum(*stop_requests(stop_request))
    if any(requests):
        raise signals.Stopped(signals.INTERRUPTED if requests[0] else signals.SAVED)


def stop_requests(stop_request: StopRequest) -> tuple[bool, bool]:
    """Return whether the user, and whether a scheduler, asks this process to stop."""
    return stop_request.signal == signal.SIGINT, stop_request.signal not in (0, signal.SIGINT)
