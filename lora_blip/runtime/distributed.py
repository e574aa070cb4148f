"""One process, or one of torchrun's many: who writes, what all agree on, what is summed. Nothing else knows of ranks."""

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

Result = TypeVar("Result")
PATIENCE = timedelta(hours=2)  # that ranks wait for the slowest: one may be captioning what the others have done

# Tensors that were lent to gloo. Its threads may hold the last reference to one long after a collective is over, and need the
# GIL to let go. A thread that asks for it when Python has ended takes the process down ("terminate called without an active
# exception"); one that asks while DistributedDataParallel's reducer, freed last, waits for that thread, never gets it.
#
# So objects travel by torch's own two helpers, in tensors that are known here, and not by its `all_gather_object`.
LENT: list[weakref.ref[Tensor]] = []
CPU = torch.device("cpu")
RETURNED = 5.0  # seconds that a process waits at its end for what it lent

# what a dead peer leaves in an error
LOST = ("Connection reset", "Connection closed", "Broken pipe", "NCCL error", "remote process exited")


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. Alone, every method is the identity.

    What is agreed on here are a few bytes over gloo, on the CPU, so that no GPU is waited for. Objects are pickled on
    the way between processes of one program; nothing of the kind is ever read from a file.
    """

    rank: int = 0
    count: int = 1
    local: int = 0  # on this machine: the number of its GPU

    @property
    def main(self) -> bool:
        """Whether this is the one process that writes and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Σ over the ranks of each value, in float64; the same bits on every rank."""
        if self.count == 1:
            return list(values)
        return _summed(torch.tensor(values, dtype=torch.float64)).tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.count == 1:
            return [value]
        mine, _ = _object_to_tensor(value, CPU, None)
        sizes = torch.zeros(self.count, dtype=torch.int64)
        sizes[self.rank] = len(mine)
        *starts, end = [0, *_summed(sizes).cumsum(0).tolist()]
        every = torch.zeros(end, dtype=torch.uint8)
        every[starts[self.rank] :][: len(mine)] = mine
        said = _summed(every)
        return [_tensor_to_object(said[start:stop], stop - start, None) for start, stop in pairwise([*starts, end])]

    def first(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.count == 1:
            return value
        said, size = _object_to_tensor(value, CPU, None) if self.main else (torch.empty(0), torch.zeros(1, dtype=torch.int64))
        count = int(_summed(size))
        said = said if self.main else torch.empty(count, dtype=torch.uint8)
        distributed.broadcast(lent(said)[0], src=0)
        return value if self.main else _tensor_to_object(said, count, None)

    def together(self, act: Callable[[], Result]) -> Result:
        """Return `act()`, which calls no collective. If it fails on any rank, every rank raises an error, and none waits.

        The main rank raises its own error, or a ConfigError that names the rank that failed; the others raise PeerError.
        So one process reports.
        """
        if self.count == 1:
            return act()
        result, failure = None, None
        try:
            result = act()
        except Exception as error:
            failure = error
        said = self.gather(failure and f"{type(failure).__name__}: {failure}")
        if self.main and failure:
            raise failure
        for rank, reason in enumerate(said):
            if reason:
                raise self.error(f"process {rank} failed, and all stop: {reason}") from failure
        return cast(Result, result)

    def on_main(self, act: Callable[[], Result]) -> Result | None:
        """Return `act()` on the main rank and None on the others. If it fails, every rank raises, as in `together`."""
        return self.together(lambda: act() if self.main else None)

    def error(self, message: str) -> ConfigError:
        """Return the error to raise for what every rank has found: only the main rank reports it."""
        return (ConfigError if self.main else PeerError)(message)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sum(0.0)

    def device(self, wanted: str) -> str:
        """The device of this rank: "auto" and "cuda" under torchrun are the GPU of its local number."""
        if self.count > 1 and wanted in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return wanted


ALONE = Ranks()


def lent(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, to be handed to a collective; this process does not end before gloo has let go of them."""
    LENT[:] = [one for one in LENT if one() is not None] + [weakref.ref(tensor) for tensor in tensors]
    return tensors


def _summed(tensor: Tensor) -> Tensor:
    distributed.all_reduce(lent(tensor)[0])
    return tensor


def refuse_several(command: str) -> None:
    """Raise an error in every process if torchrun started several: each would do all of the work and write the same files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        kind = ConfigError if os.environ.get("RANK", "0") == "0" else PeerError
        raise kind(f"{command} is one process; start it without torchrun: python -m lora_blip {command} …")


def is_lost(error: Exception) -> bool:
    """Return True if a collective failed because another process is gone."""
    return any(sign in str(error) for sign in LOST)


def _take_back() -> None:
    deadline = time.monotonic() + RETURNED
    while any(one() is not None for one in LENT) and time.monotonic() < deadline:
        time.sleep(0.001)  # without the GIL


@contextmanager
def joined() -> Iterator[Ranks]:
    """Inside the block this process is one of torchrun's, if torchrun started it; only the main one prints."""
    if distributed.is_available() and distributed.is_initialized():  # the caller's own group
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield ALONE
        return
    cuda = torch.cuda.is_available()
    store, rank, count = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun hands the store of a life to the next one, with the addresses of dead ranks in it: names of its own for each
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else ""
    store = distributed.PrefixStore(f"life {life}", store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=count)
    ranks = Ranks(rank, count, int(os.environ.get("LOCAL_RANK", "0")))
    if cuda:
        torch.cuda.set_device(ranks.local)
    said = sys.stdout
    try:
        with open(os.devnull, "w", encoding="utf-8", errors="replace") as nowhere:  # noqa: PTH123
            if not ranks.main:
                sys.stdout = nowhere
            yield ranks
    except RuntimeError:  # a peer is lost, perhaps: its share may never come back
        LENT.clear()
        raise
    finally:
        sys.stdout = said
        _take_back()
        distributed.destroy_process_group()
