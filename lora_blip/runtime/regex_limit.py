"""Search with a regex of the user in a limited time: one such as (a+)+b can take years for a text of 50 characters.

Python cannot interrupt a search in its own process, except by a signal in the main thread of Linux and macOS. In other threads
and on Windows, another Python process searches, and is ended when the time is over.
"""

import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from types import FrameType
from typing import Any

CHILD = """
import json, re, sys
pattern = re.compile(json.loads(sys.stdin.readline()))
for line in sys.stdin:
    match = pattern.search(json.loads(line))
    print(json.dumps(match and [match[0], *match.groups()]), flush=True)
"""
Groups = list[str | None] | None  # the text that matches and the groups in parentheses, or None without a match


class LimitedRegex:
    """A regex whose searches take at most `seconds` together."""

    def __init__(self, pattern: str, seconds: float) -> None:
        """Raise re.error if the pattern is not a valid regex."""
        self.pattern, self.seconds = re.compile(pattern), seconds
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def search(self, text: str) -> Groups:
        """Return [match, group, …] of the first match, or None. Raise TimeoutError if the searches take more than `seconds`."""
        if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
            return self._search_with_alarm(text)
        return self._search_in_process(text)

    def _search_with_alarm(self, text: str) -> Groups:
        before: Any = signal.signal(signal.SIGALRM, _raise_timeout)
        try:
            signal.setitimer(signal.ITIMER_REAL, max(self.seconds, 0.001))  # 0 would mean no limit
            match = self.pattern.search(text)
            self.seconds = signal.setitimer(signal.ITIMER_REAL, 0)[0]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)
        return [match[0], *match.groups()] if match else None

    def _search_in_process(self, text: str) -> Groups:
        process = self.process = self.process or self._started()
        assert process.stdin
        before = time.monotonic()
        try:
            process.stdin.write(f"{json.dumps(text)}\n")
            process.stdin.flush()
            answer = self.answers.get(timeout=max(self.seconds, 0.001))
        except (queue.Empty, BrokenPipeError):
            answer = ""
        if not answer:  # too slow, or the process has ended: a regex can also fill the memory
            _end(process)
            raise TimeoutError
        self.seconds -= time.monotonic() - before
        result: Groups = json.loads(answer)
        return result

    def _started(self) -> subprocess.Popen[str]:
        """Return a process that searches in each line of its input. A thread reads its answers."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            encoding="ascii",
        )  # fmt: skip
        weakref.finalize(self, _end, process)
        threading.Thread(target=_read, args=(process, self.answers), daemon=True).start()
        assert process.stdin
        process.stdin.write(f"{json.dumps(self.pattern.pattern)}\n")
        return process


def _read(process: "subprocess.Popen[str]", answers: "queue.SimpleQueue[str]") -> None:
    """Put each line of a process into `answers`, and "" when it has ended."""
    assert process.stdout
    with process.stdout:
        for line in process.stdout:
            answers.put(line)
    answers.put("")


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
    if process.stdin:
        with suppress(OSError):  # a line was still in its buffer
            process.stdin.close()


def _raise_timeout(_number: int, _frame: FrameType | None) -> None:
    raise TimeoutError
