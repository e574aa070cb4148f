"""A log gets a line at least every ten seconds; the tests use a fake clock."""

import io
import sys
import threading
from itertools import pairwise

import pytest

from lora_blip.cli import COMMANDS
from lora_blip.inference.blocks import ProgressDisplay
from lora_blip.runtime import progress
from lora_blip.runtime.progress import BEAT, SILENCE, Heartbeat, LogStream, ProgressMeter, heartbeat, phase, time_left, track


class Clock:
    """A clock that changes only when a test sets `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def test_two_lines_of_a_log_are_less_than_ten_seconds_apart() -> None:
    """The log gets a line at least every ten seconds while loading, printing work and merging run."""
    clock, times = Clock(), []

    class Noting(io.StringIO):
        def write(self, text: str) -> int:
            times.append(clock.now)
            return super().write(text)

    stream = Noting()
    log = LogStream(stream, clock)
    pulse = Heartbeat(log, "loading torch, which takes 5 to 20 s")

    def wait(seconds: float, line: str = "") -> None:
        for beat in range(round(seconds / BEAT)):
            clock.now += BEAT
            pulse.beat()
            if line and beat % 8 == 0:
                log.write(f"{line}\n")

    log.write("train\n")
    with pytest.MonkeyPatch.context() as patch:  # an earlier test may have begun a phase
        patch.setattr(progress, "_begun", threading.Event())
        wait(20)
    with phase("loading a model"):
        wait(60)
    with phase(lambda: f"step {round(clock.now)} of 9000"):
        wait(30, "a line of its own")
        with phase("merging"):
            wait(30)
        wait(25)
    printed = stream.getvalue()
    assert max(gaps(times)) < 10 and SILENCE + BEAT < 10
    assert printed.count("… loading torch, which takes 5 to 20 s (") == 2
    assert printed.count("loading a model") == 6 and "… loading a model (27 s since the start)" in printed
    assert printed.count("merging") == 3 and "… step 1162 of 9000" in printed
    assert printed.index("a line of its own") < printed.index("merging") < printed.index("… step")


def test_work_that_is_counted_prints_a_line_in_a_log_and_a_bar_on_a_terminal(capsys, monkeypatch) -> None:
    clock = Clock()
    with ProgressMeter("caption", 1000, "image", done=100, clock=clock) as shown:
        for _ in range(60):
            clock.now += 0.5
            shown.update(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "caption: 136 of 1,000 images, 4.0 a second, about 4 min left" and len(lines) == 3

    monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with ProgressMeter("caption", 4, "image", clock=clock) as shown:
        clock.now += 60
        shown.update(4)
    assert not capsys.readouterr().out and "4/4" in terminal.getvalue()


def test_the_progress_of_inference_is_printed_in_a_log(capsys) -> None:
    """The main rank prints progress lines of inference. The other ranks print none."""
    clock = Clock()

    class Written:
        lines = 5

    for out in (Written(), None):
        with ProgressDisplay("caption", 50, out, clock) as screen:  # type: ignore[arg-type]
            clock.now += 9
            screen.count_results([None] * 18)  # type: ignore[list-item]
            assert screen.speed_line() == "18 images in 9.0 s, 2.0 images/s\n"
    assert capsys.readouterr().out == "caption: 23 of 50 images, 2.0 a second, about 14 s left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, ""), (-1, ""), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (360_000, "100 h")],
)
def test_the_remaining_time_has_a_unit_in_which_it_is_at_least_two(seconds: float, text: str) -> None:
    assert time_left(seconds) == (f", about {text} left" if text else "")


def test_track_yields_the_items_unchanged_and_leaves_no_phase() -> None:
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"] and not progress._phases
    with pytest.raises(ZeroDivisionError), phase("dividing"):
        print(1 // 0)
    assert not progress._phases


def test_the_heartbeat_watches_only_a_log_of_the_main_process(monkeypatch) -> None:
    """The heartbeat prints only to a log of the main process. Other streams stay unchanged, and the stream is restored."""
    for is_terminal, rank, is_watched in ((False, "0", True), (True, "0", False), (False, "1", False)):
        stream = io.TextIOWrapper(raw := io.BytesIO(), write_through=False)
        stream.isatty = lambda answer=is_terminal: answer  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("RANK", rank)
        clock = Clock()
        arrived = threading.Event()
        with heartbeat(clock=clock), phase(lambda: arrived.set() or "a long\x1b[2J load"):  # called in this turn
            print("starting")
            assert (raw.getvalue() == b"starting\n") is is_watched
            clock.now += 60
            assert arrived.wait(30 if is_watched else 2 * BEAT) is is_watched
        assert sys.stdout is stream and not progress._phases
        stream.flush()
        assert (raw.getvalue() == "starting\n… a long\\x1b[2J load (60 s since the start)\n".encode()) is is_watched
        assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


@pytest.mark.parametrize("name", ["train", "infer", "evaluate", "prepare", "doctor"])
def test_each_command_with_a_log_has_a_heartbeat(name: str, monkeypatch) -> None:
    """Each command starts the heartbeat before its imports."""
    watched = []

    def refuse(module: str, *_: object, **__: object) -> None:
        watched.append(isinstance(sys.stdout, LogStream))
        raise ImportError(module)

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr("builtins.__import__", refuse)
    with pytest.raises(ImportError, match="lora_blip"):
        COMMANDS[name].run(None)
    assert watched[:1] == [True]


def test_the_plural_of_batch_is_batches() -> None:
    for unit, plural in (("batch", "batches"), ("image", "images")):
        assert ProgressMeter("validation", 3, unit).line() == f"validation: 0 of 3 {plural}"
