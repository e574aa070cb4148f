"""Compute the number of steps of a run, and read the micro-batches of each step."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lora_blip.config import TrainConfig
from lora_blip.data.loader import HostBatch, Slot, slots_of_steps
from lora_blip.runtime.distributed import Ranks
from lora_blip.training.learner import Progress


def total_steps(config: TrainConfig, micro_batches: int, ranks: int = 1) -> int:
    """Return the number of steps of a run. An epoch has `micro_batches` micro-batches, over all processes."""
    steps = config.epochs * steps_of_epoch(config, micro_batches, ranks)
    return min(steps, config.max_steps) if config.max_steps else steps


def steps_of_epoch(config: TrainConfig, micro_batches: int, ranks: int = 1) -> int:
    """Return the number of steps of an epoch of `micro_batches` micro-batches, over all processes."""
    return -(-micro_batches // (config.accumulation * ranks))


def remaining_steps(
    batches: DataLoader[HostBatch], epochs: int, accumulation: int, progress: Progress, ranks: Ranks
) -> Iterator[tuple[list[Slot], list[HostBatch]]]:
    """Yield the slots and the micro-batches of each remaining step, for this process.

    The first step starts after the micro-batches whose gradients are already accumulated. This function advances
    `progress.epoch`; the caller counts the steps.
    """
    sampler: Any = batches.batch_sampler
    while progress.epoch < epochs and progress.step < progress.total:
        steps = slots_of_steps(len(batches), accumulation, ranks.rank, ranks.count)[progress.group :]
        if steps:
            steps[0] = steps[0][progress.slot :]
        # `epoch` seeds the order of the lines; `selected` are the numbers of the micro-batches to read
        sampler.epoch, sampler.selected = progress.epoch, [slot.number for slots in steps for slot in slots]
        host_batches = iter(batches)
        for slots in steps:
            if progress.step < progress.total:
                yield slots, list(islice(host_batches, len(slots)))
        progress.epoch, progress.group = progress.epoch + 1, 0
