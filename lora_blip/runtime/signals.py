"""Stop after the current batch on Ctrl-C, SIGTERM (a scheduler) or SIGUSR1 (before a preemption)."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SAVED = 75  # exit status after a scheduler's signal, when everything is saved: EX_TEMPFAIL, "try again later"
INTERRUPTED = 130  # exit status after Ctrl-C
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """The first signal that was received, or 0. A second Ctrl-C stops at once, except while `saving` is set."""

    def __init__(self) -> None:
        self.signal = 0
        self.saving = False

    def note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and not self.saving:
            raise KeyboardInterrupt
        first, self.signal = not self.signal, self.signal or number
        if first:
            text = "stopping after this batch; press Ctrl-C again to stop at once" if number == signal.SIGINT else "stopping"
            with suppress(OSError):  # the terminal may be closed; not `print`, which the signal may have interrupted
                os.write(2, f"\n{signal.Signals(number).name}: {text}\n".encode())


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Record signals inside the block instead of stopping. Outside the main thread, record nothing."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python runs signal handlers only in the main thread
        return
    before: dict[Any, Any] = {number: signal.signal(number, request.note) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_in_worker(_worker: int) -> None:
    """Ignore the signals in a loader worker. A signal to a process group reaches workers too.

    The main process needs its workers for the last batch: a dead worker is an error there. `data.loader.close` ends them.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopped(SystemExit):
    """The run received a signal, and has saved everything."""
