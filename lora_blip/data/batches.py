"""Examples → batches of tensors, in an order that depends on the seed and the epoch alone."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_blip.data.annotations import Example
from lora_blip.data.images import augment, open_image
from lora_blip.stop import ignore_in_worker

Key = tuple[int, int]  # (epoch, index of the example)


class Pictures(Dataset[tuple[Example, Tensor]]):
    """(epoch, index) → the example and its pixel values (3, H, W), float32.

    Augmentation draws from a generator of its own for each key, so that it is the same whatever the
    number of workers and wherever a run is taken up again.
    """

    def __init__(self, examples: list[Example], image_processor: Any, augmented: bool, seed: int) -> None:
        self.examples, self.image_processor, self.augmented, self.seed = examples, image_processor, augmented, seed
        self.side: int = image_processor.size["height"]
        self.words: dict[Path, str] = {}  # all that is said of an image: a mirror must not make any of it false
        for example in examples:
            self.words[example.image] = f"{self.words.get(example.image, '')} {example.words}"

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: Key) -> tuple[Example, Tensor]:
        epoch, index = key
        example = self.examples[index]
        image = open_image(example.image)
        if self.augmented:
            image = augment(image, self.words[example.image], random.Random(f"{self.seed} {epoch} {index}"), self.side)
        return example, pixel_values(image, self.image_processor)


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


@dataclass(frozen=True)
class Stack:
    """What a worker hands over: examples and their pixel values, (images, 3, H, W)."""

    examples: list[Example]
    pixel_values: Tensor


def stack(rows: list[tuple[Example, Tensor]]) -> Stack:
    return Stack([example for example, _ in rows], torch.stack([values for _, values in rows]))


def loader(dataset: Pictures, batch_size: int, shuffle: bool, seed: int, workers: int, pin: bool) -> DataLoader[Stack]:
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
    return stack([batches.dataset[key] for key in keys])  # type: ignore[misc]


def close(batches: DataLoader[Stack]) -> None:
    """End the worker processes now: left to the garbage collector, each is waited for in vain for 5 s."""
    iterator: Any = getattr(batches, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # they do not hear a SIGTERM


def pixel_values(image: Any, image_processor: Any) -> Tensor:
    """One RGB picture → (3, H, W) float32, exactly as the checkpoint's own processor makes it."""
    return image_processor(image, return_tensors="pt")["pixel_values"][0]
