"""Batches of tensors, in an order that depends only on the seed and the epoch."""

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
    """The batches of an epoch, each as a list of keys of `ImageDataset`. The last batch may be short.

    Set `epoch` before each epoch. `selected` holds the numbers of the batches to read, in this order; None means all. A run
    that resumes within an epoch reads a part of it, and so does each of several processes.
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.epoch = 0
        self.selected: Sequence[int] | None = None

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(self.count))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        for number in range(len(self)) if self.selected is None else self.selected:
            start = number * self.batch_size
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


class Slot(NamedTuple):
    """The place of one micro-batch in a step of one rank."""

    number: int  # of the micro-batch in the epoch
    is_filler: bool = False  # a copy that a rank computes so that all ranks make the same calls; its gradient counts 0


def slots_of_steps(batches: int, accumulation: int, rank: int = 0, ranks: int = 1) -> list[list[Slot]]:
    """Return the micro-batches of each step of an epoch, for one rank.

    A step has `accumulation` micro-batches for every rank, assigned to the ranks in turn. So the updates depend only on
    ranks × accumulation. The last step of an epoch may be shorter. A rank with no micro-batch left computes the first
    one of the step again, as a filler.
    """
    size = accumulation * ranks
    steps = []
    for start in range(0, batches, size):
        stop = min(start + size, batches)
        numbers = [first + rank for first in range(start, stop, ranks)]
        steps.append([Slot(number) if number < stop else Slot(start, is_filler=True) for number in numbers])
    return steps


class CachedStates(NamedTuple):
    """The images of a batch whose states were read from the cache, so that the frozen part of the ViT is not computed."""

    states: Tensor  # (cached images, tokens, width), the input of the first ViT block that may be adapted
    indices: list[int]  # which images of the batch these are; the batch's pixel_values hold the others, in order
    keys: list[str]  # cache keys of the others, under which their states will be stored


@dataclass(frozen=True)
class HostBatch:
    """A batch in CPU memory, as a loader worker returns it. `Task.batch` makes a `DeviceBatch` from it."""

    examples: list[Example]
    pixel_values: Tensor  # (images, 3, H, W)
    image_index: list[int] | None = None  # (examples,) the image of each example; None: example i has image i
    cached_states: CachedStates | None = None

    def pin_memory(self) -> "HostBatch":
        """Return the batch in pinned memory, so that copies to a GPU are asynchronous. The DataLoader calls this."""
        cached = self.cached_states and self.cached_states._replace(states=self.cached_states.states.pin_memory())
        return replace(self, pixel_values=self.pixel_values.pin_memory(), cached_states=cached)


def collate(items: list[ImageItem]) -> HostBatch:
    """Return one batch of the items."""
    examples = [example for item in items for example in item.examples]
    image_index = [number for number, item in enumerate(items) for _ in item.examples]
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    pixel_values = torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0)
    indices = [number for number, item in enumerate(items) if item.states is not None]
    keys = [item.key for item in items if item.states is None]
    cached = None
    if indices or any(keys):
        states = [item.states for item in items if item.states is not None]
        cached = CachedStates(torch.stack(states) if states else torch.empty(0), indices, keys)
    return HostBatch(examples, pixel_values, None if len(examples) == len(items) else image_index, cached)


def loader(dataset: ImageDataset, batch_size: int, shuffle: bool, seed: int, workers: int, pin: bool) -> DataLoader[HostBatch]:
    """Return a DataLoader over `EpochBatches`. Set `.batch_sampler.epoch` (and `.selected`) before each epoch."""
    batches = EpochBatches(len(dataset), batch_size, shuffle, seed)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collate_fn makes a HostBatch of its items
        batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin,
        persistent_workers=workers > 0, worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(seed),  # separate, so that the number of workers changes no other random draw
    )  # fmt: skip


def first_batch(batches: DataLoader[HostBatch]) -> HostBatch:
    """Return the first batch of the loader's epoch. It is read in this process: no worker is started for it."""
    keys: list[Key] = next(iter(batches.batch_sampler))  # type: ignore[arg-type]
    dataset: Any = batches.dataset
    return collate([dataset.item(key, use_cached=False) for key in keys])


def close(batches: DataLoader[HostBatch]) -> None:
    """End the worker processes now. When the garbage collector ends them, it waits 5 s for each."""
    iterator: Any = getattr(batches, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # workers ignore SIGTERM


def pixel_values(image: Any, image_processor: Any) -> Tensor:
    """Return the pixel values of one image, (3, H, W) float32, bit for bit as the checkpoint's own processor makes them."""
    return pixels_of(image_processor)(image)
