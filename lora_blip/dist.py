"""One process, or one of torchrun's many: who writes, what all agree on, what is summed. Nothing else knows of ranks."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

PATIENCE = timedelta(hours=2)  # that ranks wait for the slowest: one may be captioning what the others have done

# gloo's side of every group, never freed. DistributedDataParallel's reducer may be the last to let go of a group: it would
# wait for gloo's thread while it holds the GIL, and that thread waits for the GIL to let go of the last collective's tensors.
# The process would hang after its work is done, one time in twenty-five.
KEPT: list[Any] = []

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
        total = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def first(self, value: Any) -> Any:
        """The main rank's value, on every rank."""
        if self.count == 1:
            return value
        holder = [value]
        distributed.broadcast_object_list(holder, src=0)
        return holder[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sum(0.0)

    def device(self, wanted: str) -> str:
        """The device of this rank: "auto" and "cuda" under torchrun are the GPU of its local number."""
        if self.count > 1 and wanted in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local}"
        return wanted


ALONE = Ranks()


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
    KEPT.append(distributed.group.WORLD._get_backend(torch.device("cpu")))  # type: ignore[union-attr]
    ranks = Ranks(rank, count, int(os.environ.get("LOCAL_RANK", "0")))
    if cuda:
        torch.cuda.set_device(ranks.local)
    said = sys.stdout
    try:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            if not ranks.main:
                sys.stdout = nowhere
            yield ranks
    finally:
        sys.stdout = said
        distributed.destroy_process_group()
