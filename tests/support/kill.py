"""Kill trainings, as SIGKILL or a lost process would."""

import faulthandler
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from lora_blip.training import loop
from lora_blip.training.session import Session


class Killed(BaseException):
    """Simulate SIGKILL inside one process: nothing is saved after it."""


def nothing(_: Session) -> None:
    """Save nothing, as a killed process does."""


@contextmanager
def killed_at(micro_batch: int) -> Iterator[None]:
    """Raise Killed in a training inside the block when it reaches this micro-batch, counted from 1."""
    real, count = loop.accumulate_gradients, 0

    def accumulate(*given: Any, **named: Any) -> None:
        nonlocal count
        count += 1
        if count == micro_batch:
            raise Killed
        real(*given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", accumulate)
        patch.setattr(Session, "rescue", nothing)
        with pytest.raises(Killed):
            yield


LONGEST = 90  # seconds that processes may take before they count as stuck


def run_processes(count: int, act: Callable[[], object], restarts: int = 0) -> list[int]:
    """Execute `act` in `count` processes, with torchrun's environment variables. Return their exit codes.

    If one fails, all of them start again, up to `restarts` times, as torchrun's `--max-restarts` does.
    """
    for life in range(restarts + 1):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(life)
        codes = _run_once(count, act)
        if not any(codes):
            break
    del os.environ["TORCHELASTIC_RESTART_COUNT"]
    return codes


def _run_once(count: int, act: Callable[[], object]) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def act_as(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        act()

    return _exit_codes([forked(partial(act_as, rank)) for rank in range(count)])


def forked(act: Callable[[], object]) -> int:
    """Start `act` in a forked process and return its pid."""
    child = os.fork()
    if not child:
        _run_and_exit(act)
    return child


def _exit_codes(children: list[int]) -> list[int]:
    """Return the exit codes of the processes. Kill those that still run after LONGEST seconds."""
    deadline, codes = time.monotonic() + LONGEST, {}
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def _run_and_exit(act: Callable[[], object]) -> None:
    """Run `act` and exit the forked process without pytest's cleanup. A stuck process prints its stack before it is killed.

    It exits before the error is freed: gloo sometimes waits forever for a lost process when the frames of an error are freed.
    """
    faulthandler.dump_traceback_later(LONGEST - 5, file=2)
    try:
        act()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
