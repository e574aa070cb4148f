"""Test what the loop does between two steps, with fake objects: remaining data, checkpoints, signals, validation and rescue."""

import math
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from lora_blip.config import TrainConfig
from lora_blip.errors import CheckpointError
from lora_blip.runtime import signals
from lora_blip.runtime.distributed import ALONE
from lora_blip.training import loop, resume, session
from lora_blip.training.learner import Progress
from lora_blip.training.schedule import remaining_steps, total_steps
from lora_blip.training.session import Session
from tests.support import tiny
from tests.support.runs import settings

# ---------------------------------------------------------------- the data that is left


class Loader:
    """Yield seven micro-batches per epoch, named by epoch and number, in the order of the sampler."""

    def __init__(self) -> None:
        self.batch_sampler = SimpleNamespace(epoch=-1, selected=[])
        self.read = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Any:
        for number in list(self.batch_sampler.selected):
            self.read += 1
            yield f"{self.batch_sampler.epoch}.{number}"


def walk(progress: Progress, epochs: int = 2, accumulation: int = 3, ranks: Any = ALONE) -> list[list[str]]:
    """Return the micro-batches of each step. Count every step as an update."""
    steps = []
    for slots, stacks in remaining_steps(Loader(), epochs, accumulation, progress, ranks):
        assert [f"{progress.epoch}.{slot.number}" for slot in slots] == stacks
        steps.append(stacks)
        progress.step, progress.group, progress.slot = progress.step + 1, progress.group + 1, 0
    return steps


WHOLE = [["0.0", "0.1", "0.2"], ["0.3", "0.4", "0.5"], ["0.6"], ["1.0", "1.1", "1.2"], ["1.3", "1.4", "1.5"], ["1.6"]]


def test_every_micro_batch_of_every_epoch_comes_once():
    progress = Progress(total=6)
    assert walk(progress) == WHOLE and (progress.epoch, progress.group, progress.step) == (2, 0, 6)
    assert walk(Progress(total=6), accumulation=1, epochs=0) == []


@pytest.mark.parametrize("done", range(6))
@pytest.mark.parametrize("slot", [0, 1, 2])
def test_a_resumed_run_reads_exactly_the_remaining_data(done, slot):
    """A run can continue from any step, and from any micro-batch of a step."""
    slot = min(slot, len(WHOLE[done]) - 1)
    progress = Progress(epoch=done // 3, group=done % 3, slot=slot, step=done, total=6)
    assert walk(progress) == [WHOLE[done][slot:], *WHOLE[done + 1 :]]


def test_a_run_ends_at_its_total_in_the_middle_of_an_epoch():
    for total in (0, 1, 4):
        assert walk(Progress(total=total)) == WHOLE[:total]


def test_after_a_skipped_step_the_next_data_are_used():
    """`group` also counts skipped steps: their data are not read again."""
    progress = Progress(group=1, step=0, total=6)
    assert walk(progress, epochs=1) == WHOLE[1:3]


def test_ranks_share_a_step():
    two = [walk(Progress(total=9), epochs=1, accumulation=2, ranks=SimpleNamespace(rank=rank, count=2)) for rank in (0, 1)]
    assert [len(step) for step in two[0]] == [len(step) for step in two[1]]
    assert {name for steps in two for step in steps for name in step} == {f"0.{number}" for number in range(7)}


# ---------------------------------------------------------------- signals and checkpoints


def session_of(
    due: bool = False, number: int = 0, inconsistent: bool = False, fails: Exception | None = None
) -> SimpleNamespace:
    """Return a session that records the calls to its run."""
    happened: list[str] = []

    def checkpoint() -> None:
        if fails:
            raise fails
        happened.append("checkpoint")

    learner = SimpleNamespace(ranks=ALONE, inconsistent=inconsistent, rewind=lambda: happened.append("rewind"))
    run = SimpleNamespace(checkpoint_is_due=due, checkpoint=checkpoint, save_unfinished=lambda: happened.append("adapter"))
    return SimpleNamespace(
        run=run, learner=learner, happened=happened, stop_request=SimpleNamespace(signal=number, saving=False)
    )


def test_nothing_is_saved_between_two_micro_batches_unless_it_is_due():
    idle = session_of()
    Session.checkpoint_if_due(idle)
    assert idle.happened == [] and not idle.stop_request.saving
    due = session_of(due=True)
    Session.checkpoint_if_due(due)
    assert due.happened == ["checkpoint"] and not due.stop_request.saving  # a second Ctrl-C still stops at once


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, signals.INTERRUPTED), (signal.SIGTERM, signals.SAVED), (signal.SIGUSR1, signals.SAVED)]
)
@pytest.mark.parametrize("due", [True, False])
def test_a_run_that_receives_a_signal_saves_and_stops(number, code, due):
    running = session_of(due, number)
    with pytest.raises(signals.Stopped) as stopped_with:
        Session.checkpoint_if_due(running)
    assert stopped_with.value.code == code and running.happened == ["checkpoint", "adapter"] and running.stop_request.saving


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, signals.INTERRUPTED), (signal.SIGTERM, signals.SAVED)])
def test_a_signal_before_the_run_is_created_saves_nothing(number, code):
    session.stop_if_requested(ALONE, SimpleNamespace(signal=0))
    with pytest.raises(signals.Stopped) as stopped_with:
        session.stop_if_requested(ALONE, SimpleNamespace(signal=number))
    assert stopped_with.value.code == code


def test_an_error_saves_the_progress():
    running = session_of()
    Session.rescue(running)
    assert running.happened == ["rewind", "checkpoint", "adapter"]
    running = session_of(inconsistent=True)  # no checkpoint contains a part of an update
    Session.rescue(running)
    assert running.happened == ["adapter"]


@pytest.mark.parametrize("error", [OSError("disk"), CheckpointError("room"), RuntimeError("device")])
def test_a_rescue_that_fails_is_reported_and_the_first_error_stays(error, capsys, monkeypatch):
    Session.rescue(session_of(fails=error))
    assert f"could not be saved: {error}" in capsys.readouterr().out

    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", broken)
    Session.rescue(session_of(fails=error))  # the reader of stdout has closed the pipe
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError):
        Session.rescue(session_of(fails=ZeroDivisionError()))


# ---------------------------------------------------------------- validation


def validated(progress: Progress, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], SimpleNamespace]:
    """Call `validate_if_due`, and return its validations and its printed lines."""
    happened: list[str] = []
    held_out = options.pop("held_out", "held out")
    config = TrainConfig(patience=options.pop("patience", 0), best_by="loss")

    def validate(*arguments: Any) -> dict[str, float]:
        happened.append("validate")
        assert arguments[:4] == ("task", held_out, "autocast", "loss") and arguments[5] is running.checkpoint_if_due
        return {"loss": 7.0}

    monkeypatch.setattr(session, "validate", validate)
    monkeypatch.setattr(session, "validating_ranks", lambda *_: "ranks")
    entered = []

    class Transaction:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    def log(step: int, epoch: int, scores: dict[str, float]) -> None:
        happened.append(f"{step} {epoch} {scores['loss']}")
        assert entered == ["in"]

    learner = SimpleNamespace(progress=progress, task="task", ranks=ALONE, transaction=Transaction)
    best = SimpleNamespace(stale=options.pop("stale", 0), improved=3)
    running: Any = SimpleNamespace(
        learner=learner, config=config, task="task", held_out=held_out, autocast="autocast",
        validate_every=options.pop("every", 10), checkpoint_if_due=lambda: None,
        run=SimpleNamespace(log_validation=log, best=best), prefix=None,
    )  # fmt: skip
    Session.validate_if_due(running, **options)
    return happened, running


def test_a_validation_is_due_every_so_many_steps_at_the_total_and_at_the_end(monkeypatch):
    for step, every, due in ((0, 10, True), (10, 10, True), (9, 10, False), (11, 10, False), (37, 10, True), (6, 3, True)):
        progress = Progress(step=step, epoch=2, total=37)
        happened, _ = validated(progress, monkeypatch, every=every)
        assert happened == (["validate", f"{step} 2 7.0"] if due else []) and progress.validated == (step if due else -1)
    assert validated(Progress(step=9, total=37), monkeypatch, at_the_end=True)[0] == ["validate", "9 0 7.0"]


def test_a_step_is_validated_once_and_only_with_validation_data(monkeypatch):
    assert validated(Progress(step=10, validated=10, total=37), monkeypatch, at_the_end=True)[0] == []
    assert validated(Progress(step=10, total=10), monkeypatch, held_out=None, at_the_end=True)[0] == []
    known = validated(Progress(step=10, total=37), monkeypatch, scores={"loss": 3.0})[0]
    assert known == ["10 0 3.0"]  # scores that are known are not computed again
    assert validated(Progress(step=10, total=37), monkeypatch, scores={})[0] == ["validate", "10 0 7.0"]


def test_patience_ends_a_run_before_its_total(monkeypatch, capsys):
    for patience, stale, total in ((2, 1, 37), (2, 2, 10), (2, 3, 10), (0, 9, 37)):
        progress = Progress(step=10, total=37)
        validated(progress, monkeypatch, patience=patience, stale=stale)
        assert progress.total == total
        output = capsys.readouterr().out
        assert output == (
            "stopped early: loss has not improved since step 3; PATIENCE = 0 trains to the end\n" if total == 10 else ""
        )
    progress = Progress(step=37, total=37)
    validated(progress, monkeypatch, patience=1, stale=1)
    assert progress.total == 37 and capsys.readouterr().out == ""  # the run has reached its end without patience


# ---------------------------------------------------------------- arithmetic


def test_the_number_of_steps_counts_tails_ranks_and_the_limit():
    for epochs, accumulation, most, batches, ranks, steps in (
        (2, 3, 0, 7, 1, 6), (2, 3, 0, 6, 1, 4), (1, 1, 0, 5, 1, 5), (3, 2, 0, 7, 2, 6), (2, 3, 4, 7, 1, 4), (2, 3, 9, 7, 1, 6)
    ):  # fmt: skip
        config = TrainConfig(epochs=epochs, accumulation=accumulation, max_steps=most)
        assert total_steps(config, batches, ranks) == steps
    assert total_steps(TrainConfig(epochs=2, accumulation=1), 3) == 6


def test_the_learning_rate_at_the_start_the_peak_and_the_end():
    """The first rate is peak / warmup, the rate after the warm-up is the peak, and the rate after the last step is 0."""
    rates = [loop.learning_rate(step, 10, 4, 8.0) for step in range(13)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0] and rates[7] == pytest.approx(4.0)
    assert rates[9] == pytest.approx(4 * (1 + math.cos(math.pi * 5 / 6))) and rates[10:] == pytest.approx([0.0] * 3)
    assert loop.learning_rate(4, 4, 4, 8.0) == 8.0 and loop.learning_rate(5, 4, 4, 8.0) == pytest.approx(0.0)


class StopTraining(BaseException):
    """Stop a training in the middle."""


@pytest.mark.parametrize(("epochs", "setting", "every"), [(3, 0, 10), (100, 0, 30), (100, 7, 7)])
def test_a_run_is_validated_ten_times_but_at_most_every_ten_steps(checkpoints, tmp_path, monkeypatch, epochs, setting, every):
    """An epoch has three steps. A number set by the user is used. The identity describes the cached states."""
    recorded: list[Any] = []

    def validate_if_due(running: Session, *_: Any) -> None:
        recorded.append(running.validate_every)
        raise StopTraining

    acquire = resume.acquire
    monkeypatch.setattr(
        resume, "acquire", lambda config, identity, *rest: recorded.append(identity) or acquire(config, identity, *rest)
    )
    monkeypatch.setattr(Session, "validate_if_due", validate_if_due)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=epochs, validate_every=setting)
    with pytest.raises(StopTraining):
        loop.train(config)
    assert recorded[1] == every and "learned from" in recorded[0] and recorded[0]["epochs"] == epochs
