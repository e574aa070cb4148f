"""The processes that torchrun starts: their collectives, and which one writes."""

import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed
from torch.distributed.distributed_c10d import _object_to_tensor, _tensor_to_object
from torch.distributed.rendezvous import rendezvous

from lora_blip.errors import ConfigError, PeerError
from lora_blip.runtime.limits import follows_lost_peer

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=2)  # how long a rank waits for the slowest, which may generate a whole block of texts

# A thread of gloo can hold the last reference to a Python object after the collective has ended: to a tensor, or to the context
# in which autograd started the collective. It needs the GIL to release the object. This causes two problems at the end.
# - If Python ends first, the process aborts ("terminate called without an active exception"). So each process waits until gloo
#   has released the tensors in IN_USE. Objects are encoded with two private helpers of torch, because the tensors of
#   `all_gather_object` cannot be recorded here.
# - The destructor of a process group waits for the threads. The destructor of a DistributedDataParallel that has the last
#   reference to the group calls it and holds the GIL, so both wait forever. So GROUPS keeps a reference to each group.
IN_USE: list[weakref.ref[Tensor]] = []
GROUPS: list[distributed.ProcessGroup | None] = []
CPU = torch.device("cpu")
RELEASE_TIME = 5.0  # seconds that a process waits at its end until gloo has released its tensors


@dataclass(frozen=True)
class Ranks:
    """This process among `count` processes. With one process, every method returns its argument.

    The collectives here send a few bytes over gloo, on the CPU, so they do not wait for a GPU. Objects are pickled between
    processes of one program. Nothing pickled is read from a file.
    """

    rank: int = 0
    count: int = 1
    local: int = 0  # rank within this machine: the number of its GPU

    @property
    def main(self) -> bool:
        """Return True in the one process that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Return the sum over the ranks of each value, in float64, with the same bits on every rank."""
        if self.count == 1:
            return list(values)
        return _summed(torch.tensor(values, dtype=torch.float64)).tolist()

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank, on every rank."""
        if self.count == 1:
            return [value]
        encoded, _ = _object_to_tensor(value, CPU, None)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(encoded)
        *starts, end = [0, *_summed(sizes).cumsum(0).tolist()]
        joint = torch.zeros(end, dtype=torch.uint8)
        joint[starts[self.rank] :][: len(encoded)] = encoded
        joint = _summed(joint)
        return [_tensor_to_object(joint[start:stop], stop - start, None) for start, stop in pairwise([*starts, end])]

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's value, on every rank."""
        if self.count == 1:
            return value
        encoded, size = (
            _object_to_tensor(value, CPU, None) if self.main else (torch.empty(0), torch.zeros(1, dtype=torch.int64))
        )
        count = int(_summed(size))
        encoded = encoded if self.main else torch.empty(count, dtype=torch.uint8)
        distributed.broadcast(keep_alive(encoded)[0], src=0)
        return value if self.main else _tensor_to_object(encoded, count, None)

    def together(self, act: Callable[[], Result]) -> Result:
        """Return `act()`. If it fails on any rank, every rank raises an error, so that none waits for another.

        `act` must not call a collective. The main rank raises its own error, or a ConfigError that names the rank that failed.
        The others raise PeerError, so that only the main process prints a message.
        """
        if self.count == 1:
            return act()
        result, failure = None, None
        try:
            result = act()
        except Exception as error:
            failure = error
        reasons = self.all_gather(failure and f"{type(failure).__name__}: {failure}")
        if self.main and failure:
            raise failure
        for rank, reason in enumerate(reasons):
            if reason:
                raise self.error(f"process {rank} failed, and all stop: {reason}") from failure
        return cast(Result, result)

    def on_main(self, act: Callable[[], Result]) -> Result | None:
        """Return `act()` on the main rank and None on the others. If it fails, every rank raises, as in `together`."""
        return self.together(lambda: act() if self.main else None)

    def error(self, message: str) -> ConfigError:
        """Return the error to raise for a problem that every rank has detected. Only the main rank reports it."""
        return (ConfigError if self.main else PeerError)(message)

    def wait(self) -> None:
        """Wait until all ranks have called this."""
        self.sum(0.0)

    def device(self, name: str) -> str:
        """Return the device of this rank. Under torchrun, "auto" and "cuda" are the GPU of its local rank."""
        if self.count > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return name


ALONE = Ranks()


def keep_alive(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, for use in a collective. The process will not end before gloo has released them (see IN_USE)."""
    IN_USE[:] = [ref for ref in IN_USE if ref() is not None] + [weakref.ref(tensor) for tensor in tensors]
    return tensors


def _summed(tensor: Tensor) -> Tensor:
    distributed.all_reduce(keep_alive(tensor)[0])
    return tensor


def refuse_several(command: str) -> None:
    """Raise ConfigError if torchrun started several processes: each would do all of the work and write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        kind = ConfigError if os.environ.get("RANK", "0") == "0" else PeerError
        raise kind(f"{command} runs in one process; start it without torchrun: lora-blip {command} …")


def _wait_for_release() -> None:
    deadline = time.monotonic() + RELEASE_TIME
    while any(ref() is not None for ref in IN_USE) and time.monotonic() < deadline:
        time.sleep(0.001)  # releases the GIL


def cores_of_rank() -> int:
    """Return the number of cores that this process may use, divided by the number of ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the process group if torchrun started this process, and leave it after the block. Only the main rank prints.

    After the loss of another process, `cli.end_at_once` ends the process of a command with os._exit.
    """
    if distributed.is_available() and distributed.is_initialized():  # the caller has initialized a group
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    store, rank, count = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun's store still contains the addresses of an earlier group of these processes, and after a restart those of dead
    # ranks. A prefix separates them.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else ""
    store = distributed.PrefixStore(f"life {restart} group {len(GROUPS)}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT, store=store, rank=rank, world_size=count)
    GROUPS.append(distributed.group.WORLD)
    ranks = Ranks(rank, count, int(os.environ.get("LOCAL_RANK", "0")))
    if cuda:
        torch.cuda.set_device(ranks.local)
    stdout = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8", errors="replace") as devnull:  # noqa: PTH123
            if not ranks.main:
                sys.stdout = devnull
            yield ranks
    except Exception as error:
        if isinstance(error, RuntimeError) or follows_lost_peer(error):  # then gloo may never release its tensors
            IN_USE.clear()
        raise
    finally:
        sys.stdout = stdout
        _wait_for_release()
        distributed.destroy_process_group()
