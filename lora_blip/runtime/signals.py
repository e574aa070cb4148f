"""Being asked to stop: Ctrl-C, a scheduler's SIGTERM, SIGUSR1 before a preemption. What is under way is finished first."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SAVED = 75  # exit status of a run that was told to make room and has saved: EX_TEMPFAIL, "try again later"
INTERRUPTED = 130  # of one that its user stopped
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Heard:
    """Which signal came first, 0 for none. A second Ctrl-C stops at once, unless something is being saved."""

    def __init__(self) -> None:
        self.signal = 0
        self.saving = False  # set it, and a signal only leaves its note: what is being saved is saved whole

    def note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal and not self.saving:
            raise KeyboardInterrupt
        first, self.signal = not self.signal, self.signal or number
        if first:
            said = "stopping when this batch is done; Ctrl-C again stops at once" if number == signal.SIGINT else "stopping"
            with suppress(OSError):  # whoever reads may have been stopped too; print may be in the middle of a line
                os.write(2, f"\n{signal.Signals(number).name}: {said}\n".encode())


@contextmanager
def heard() -> Iterator[Heard]:
    """Inside the block, signals that ask to stop are noted instead of acted on; outside the main thread none is heard."""
    noted = Heard()
    if threading.current_thread() is not threading.main_thread():
        yield noted  # signals reach the main thread alone
        return
    before: dict[Any, Any] = {number: signal.signal(number, noted.note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def exit_code(number: int) -> int:
    """130 for Ctrl-C, SAVED for what a scheduler sends."""
    return INTERRUPTED if number == signal.SIGINT else SAVED


def ignore_in_worker(_worker: int) -> None:
    """For loader workers: signals to a whole group reach them too, and their parent needs them for its last batch.

    A dead worker is an error in the middle of whatever its parent does; `data.batches.close` ends them otherwise.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Told(SystemExit):
    """The run was told to stop, and has saved."""
