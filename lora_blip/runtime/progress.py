"""Show what a command does: a bar on a terminal, and in a log a line at least every ten seconds.

`phase` names the current work, and `ProgressMeter` also counts what is done. `heartbeat` prints the current phase into the log
of a command if nothing else is printed.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar

from lora_blip.runtime.counts import plural
from lora_blip.runtime.untrusted import printable

T = TypeVar("T")
SILENCE, BEAT = 9.0, 0.5  # seconds: the longest time without a line, and between two checks of it; together less than ten

_phases: list[Callable[[], str]] = []  # what runs now, the innermost last
_begun = threading.Event()  # set by the first phase
_writing = threading.Lock()  # held while the thread prints, so that a forked process does not inherit a locked stream
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_writing.acquire, after_in_parent=_writing.release, after_in_child=_writing.release)


@contextmanager
def phase(state: str | Callable[[], str]) -> Iterator[None]:
    """Name the work inside the block. state: the name, or a function that returns the name with the current numbers."""
    describe = state if callable(state) else lambda: state
    _begun.set()
    _phases.append(describe)
    try:
        yield
    finally:
        _phases.remove(describe)


@contextmanager
def subphase(name: str) -> Iterator[None]:
    """Name a part of the current phase: "scoring the texts of the base: CIDEr"."""
    outer = _phases[-1] if _phases else None
    with phase(lambda: f"{outer()}: {name}" if outer else f"computing {name}"):
        yield


class ProgressMeter:
    """The progress of one piece of work. A context manager: `update` counts what is done.

    name, unit: what is done, and what is counted, such as "base" and "image".
    delay: seconds before a bar appears.
    is_shown: False on a process that is not the main one.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "",
        done: int = 0,
        delay: float = 0.0,
        is_shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from tqdm import tqdm  # late: without tqdm, `cli.missing_dependency` prints how to install it

        self.name, self.total, self.unit, self.done, self.before = name, total, unit, done, done
        self.is_shown, self.clock = is_shown, clock
        self.started = self.printed = clock()
        self.bar = tqdm(
            total=total, initial=done, desc=printable(name), unit=unit, disable=None if is_shown else True,
            dynamic_ncols=True, delay=delay, leave=not delay,
        )  # fmt: skip
        self.phase = phase(self.line)

    def __enter__(self) -> Self:
        self.phase.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.phase.__exit__(None, None, None)
        self.bar.close()

    def update(self, count: int = 1) -> None:
        """Add `count` to what is done. In a log, print a line if the last one is at least SILENCE seconds old."""
        self.bar.update(count)
        self.done += count
        if self.is_shown and self.bar.disable and self.clock() - self.printed >= SILENCE:
            self.printed = self.clock()
            print(printable(self.line()), flush=True)

    @property
    def seconds(self) -> float:
        return self.clock() - self.started

    @property
    def speed(self) -> float:
        """Return how many are done in a second, without those that were done before."""
        return (self.done - self.before) / max(self.seconds, 1e-9)

    def line(self) -> str:
        """Return a line such as "caption: 1,200 of 100,000 images, 15.3 a second, about 108 min left"."""
        line = f"{self.name}: {self.done:,} of {self.total:,}" + f" {plural(self.unit, self.total)}" * bool(self.unit)
        if self.done == self.before:
            return line
        return f"{line}, {self.speed:,.1f} a second" + time_left((self.total - self.done) / self.speed)


def time_left(seconds: float) -> str:
    """Return the remaining time for a line of a log: ", about 5 min left", or "" if nothing remains."""
    unit, each = next(((unit, each) for unit, each in (("h", 3600), ("min", 60)) if seconds >= 2 * each), ("s", 1))
    return f", about {seconds / each:.0f} {unit} left" if seconds > 0 else ""


def remaining_time(elapsed: float, done: int, remaining: int) -> str:
    """Return `time_left` for `remaining` steps, if `done` steps took `elapsed` seconds. Return "" if none is done."""
    return time_left(elapsed / done * remaining) if done > 0 else ""


def track(items: Iterable[T], name: str, total: int, unit: str = "", delay: float = 0.0) -> Iterator[T]:
    """Yield the items and show how many of `total` are done."""
    with ProgressMeter(name, total, unit, delay=delay) as progress:
        for item in items:
            yield item
            progress.update()


class LogStream:
    """A text stream that is not a terminal. Each line is written at once, and `written` is the time of the last one."""

    def __init__(self, stream: Any, clock: Callable[[], float]) -> None:
        self.stream, self.clock, self.written = stream, clock, clock()

    def write(self, text: str) -> int:
        count: int = self.stream.write(text)
        if "\n" in text:
            self.written = self.clock()
            self.stream.flush()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Heartbeat:
    """Print the current phase into a log if it got no line for `SILENCE` seconds. `beat` checks this once."""

    def __init__(self, log: LogStream, first: str = "starting") -> None:
        self.log, self.first, self.started = log, first, log.clock()

    def beat(self) -> None:
        if self.log.clock() - self.log.written < SILENCE:
            return
        with _writing:
            state = next((describe() for describe in _phases[-1:]), "working" if _begun.is_set() else self.first)
            self.log.write(printable(f"… {state} ({self.log.clock() - self.started:.0f} s since the start)") + "\n")


@contextmanager
def heartbeat(first: str = "starting", clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Print at least a line every ten seconds inside the block, to a standard output that is not a terminal.

    first: the name of the work before the first `phase`.
    """
    stream, stopped = sys.stdout, threading.Event()
    if stream is None or stream.isatty() or isinstance(stream, LogStream) or os.environ.get("RANK", "0") != "0":
        yield
        return
    log = LogStream(stream, clock)
    pulse = Heartbeat(log, first)

    def watch() -> None:
        while not stopped.wait(BEAT):
            pulse.beat()

    thread = threading.Thread(target=watch, name="heartbeat", daemon=True)
    sys.stdout = log
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        if sys.stdout is log:
            sys.stdout = stream
