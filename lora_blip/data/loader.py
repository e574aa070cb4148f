"""Examples → batches of tensors, in an order that depends on the seed and the epoch alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lora_blip.data.dataset import ImageDataset, ImageItem, Key
from lora_blip.data.example import Example
from lora_blip.data.preprocessing import pixels_of
from lora_blip.runtime.signals import ignore_in_worker


class EpochBatches(Sampler[list[Key]]):
    """Batches of keys for one epoch after another; the last batch of an epoch may be short.

    `wanted`: the numbers of those that come, in this order; None: all. A run that goes on, and each of several
    processes, reads a part of an epoch.
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.epoch = 0
        self.wanted: Sequence[int] | None = None

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(self.count))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for number in range(len(self)) if self.wanted is None else self.wanted:
            start = number * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


class Slot(NamedTuple):
    """A micro-batch of an epoch as one rank meets it."""

    number: int
    idle: bool = False  # it is another rank's own: computed only to keep step, and counted as nothing


def slots_of_steps(batches: int, accumulation: int, rank: int = 0, ranks: int = 1) -> list[list[Slot]]:
    """Which micro-batches of an epoch make up each of its steps, for one of several ranks.

    A step is `accumulation` micro-batches of every rank, dealt out in turn, so that ranks × accumulation is what
    decides the updates. The tail of an epoch is a step too; a rank for which nothing is left repeats its first, idle.
    """
    size = accumulation * ranks
    steps = []
    for start in range(0, batches, size):
        stop = min(start + size, batches)
        mine = [first + rank for first in range(start, stop, ranks)]
        steps.append([Slot(number) if number < stop else Slot(start, idle=True) for number in mine])
    return steps


class Known(NamedTuple):
    """What of the pictures of a batch need not be computed: the states that enter the first block that may change them."""

    states: Tensor  # (known, tokens, width)
    places: list[int]  # of these among the pictures; the others, in order, are in the batch's pixel_values
    keys: list[str]  # of the others, to keep their states under


@dataclass(frozen=True)
class Stack:
    """What a worker hands over: examples, the pictures that they are about, and their pixel values (images, 3, H, W)."""

    examples: list[Example]
    pixel_values: Tensor
    picture: list[int] | None = None  # (examples,) which picture each is about; None: the one of its own number
    known: Known | None = None

    def pin_memory(self) -> "Stack":
        """Called by the DataLoader, so that the copy to a GPU does not hold anybody up."""
        known = self.known and self.known._replace(states=self.known.states.pin_memory())
        return replace(self, pixel_values=self.pixel_values.pin_memory(), known=known)


def stack(rows: list[ImageItem]) -> Stack:
    examples = [example for row in rows for example in row.examples]
    picture = [number for number, row in enumerate(rows) for _ in row.examples]
    fresh = [row.pixel_values for row in rows if row.pixel_values is not None]
    pixel_values = torch.stack(fresh) if fresh else torch.empty(0, 3, 0, 0)
    places = [number for number, row in enumerate(rows) if row.states is not None]
    keys = [row.key for row in rows if row.states is None]
    known = None
    if places or any(keys):
        states = [row.states for row in rows if row.states is not None]
        known = Known(torch.stack(states) if states else torch.empty(0), places, keys)
    return Stack(examples, pixel_values, None if len(examples) == len(rows) else picture, known)


def loader(dataset: ImageDataset, batch_size: int, shuffle: bool, seed: int, workers: int, pin: bool) -> DataLoader[Stack]:
    """A DataLoader over `EpochBatches`; set `.batch_sampler.epoch` (and `.wanted`) before each epoch."""
    batches = EpochBatches(len(dataset), batch_size, shuffle, seed)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collate_fn turns its items into a Stack
        batch_sampler=batches, num_workers=workers, collate_fn=stack, pin_memory=pin,
        persistent_workers=workers > 0, worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(seed),  # its own, so that the number of workers moves no other draw
    )  # fmt: skip


def first_stack(batches: DataLoader[Stack]) -> Stack:
    """The first batch of the loader's epoch, read in this process: no worker is started for it."""
    keys: list[Key] = next(iter(batches.batch_sampler))  # type: ignore[arg-type]
    pictures: Any = batches.dataset
    return stack([pictures.look(key, known=False) for key in keys])


def close(batches: DataLoader[Stack]) -> None:
    """End the worker processes now: left to the garbage collector, each is waited for in vain for 5 s."""
    iterator: Any = getattr(batches, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # they do not hear a SIGTERM


def pixel_values(image: Any, image_processor: Any) -> Tensor:
    """One picture → (3, H, W) float32, exactly as the checkpoint's own processor makes it."""
    return pixels_of(image_processor)(image)
