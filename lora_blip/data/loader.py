"""Make batches of tensors. Their order depends only on the seed and the epoch."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from typing_extensions import TypeVar  # comes with torch

from lora_blip.data.dataset import ImageDataset, ImageItem, Key
from lora_blip.data.example import Example
from lora_blip.data.preprocessing import Scaling, pixels_of
from lora_blip.runtime.row_selection import select_rows
from lora_blip.runtime.signals import ignore_in_worker

Rows = TypeVar("Rows", default=Any)  # the tokenized texts of a batch


class EpochBatches(Sampler[list[Key]]):
    """Yield the batches of an epoch, each as a list of keys of `ImageDataset`. The last batch may be smaller.

    Set `epoch` before each epoch. Set `selected` to the numbers of the batches to read, in order, or to None for all of them.
    A run that is resumed within an epoch reads only the rest of it. Each of several processes reads only its own batches.
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
    """One micro-batch of an optimizer step, on one rank."""

    number: int  # the number of the micro-batch in the epoch
    is_filler: bool = False  # a repeated micro-batch with weight 0: all ranks must make the same collective calls


def slots_of_steps(batches: int, accumulation: int, rank: int = 0, ranks: int = 1) -> list[list[Slot]]:
    """Return the micro-batches of each step of an epoch, for one rank.

    A step has `accumulation` micro-batches per rank, assigned to the ranks in turn. So the updates depend only on the product
    ranks × accumulation. The last step of an epoch can have fewer micro-batches. If none is left for a rank, the rank computes
    the first micro-batch of the step again, as a filler.
    """
    size = accumulation * ranks
    steps = []
    for start in range(0, batches, size):
        stop = min(start + size, batches)
        numbers = [first + rank for first in range(start, stop, ranks)]
        steps.append([Slot(number) if number < stop else Slot(start, is_filler=True) for number in numbers])
    return steps


class CachedStates(NamedTuple):
    """States that were read from the cache for some images of a batch. The frozen part of the ViT is not computed for these."""

    states: Tensor  # (cached images, tokens, width), see `tasks.frozen_prefix`
    indices: list[int]  # (cached images,) their positions in the batch; pixel_values contains the other images, in order
    keys: list[str]  # (other images,) the cache keys for the states of the other images


@dataclass(frozen=True)
class HostBatch:
    """A batch in CPU memory, as a loader worker returns it. `Task.batch` makes a `DeviceBatch` from it."""

    examples: list[Example]
    pixel_values: Tensor  # (images, 3, H, W), float32, or uint8 with `scaling`: a quarter of the bytes to copy
    image_index: list[int] | None = None  # (examples,) the image of each example; None: example i has image i
    cached_states: CachedStates | None = None
    scaling: Scaling | None = None  # computes float32 from uint8 on the device

    def pin_memory(self) -> "HostBatch":
        """Return the batch in pinned memory, so that copies to a GPU are asynchronous. The DataLoader calls this."""
        cached = self.cached_states and self.cached_states._replace(states=self.cached_states.states.pin_memory())
        return replace(self, pixel_values=self.pixel_values.pin_memory(), cached_states=cached)

    def to(self, device: torch.device, rows: Rows, count: float, prefix: Any = None) -> "DeviceBatch[Rows]":
        """Return the batch on a device, with its tokenized texts. The other arguments are fields of DeviceBatch."""
        index, cached, pixels = self.image_index, self.cached_states, self.pixel_values.to(device, non_blocking=True)
        return DeviceBatch(
            self.examples,
            self.scaling.of_planes(pixels) if self.scaling else pixels,
            rows,
            count,
            None if index is None else torch.tensor(index).to(device, non_blocking=True),  # no wait for the GPU
            cached and cached._replace(states=cached.states.to(device, non_blocking=True)),
            prefix,
        )


@dataclass(frozen=True)
class DeviceBatch(Generic[Rows]):
    """A batch on the model's device, made by `Task.batch` from a `HostBatch`."""

    examples: list[Example]
    pixel_values: Tensor  # (images without cached states, 3, H, W)
    rows: Rows
    count: float  # number of label tokens (for retrieval: of rows); the loss of a step is divided by the total of its batches
    image_index: Tensor | None = None  # (examples,) the image of each example; None: example i has image i
    cached_states: CachedStates | None = None  # the states of the images that are not in pixel_values
    prefix: Any = None  # the `tasks.frozen_prefix.Prefix` that computed the cached states

    @property
    def images(self) -> int:
        return len(self.pixel_values) + (len(self.cached_states.indices) if self.cached_states else 0)

    def encode_images(self, encoder: Any) -> Tensor:
        """Return the features of each image by a `tasks.base.ImageEncoder`, from cached states if there are any."""
        encode, images = self.encoding(encoder)
        return encode(images)

    def encoding(self, encoder: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Return the function that computes the features, and its input: pixel values, or states after the frozen part."""
        if self.cached_states and self.prefix:
            return self.prefix.continue_from, self.prefix.states_of(self.pixel_values, self.cached_states)
        return encoder.encode_images, self.pixel_values

    def per_example(self, values: Tensor) -> Tensor:
        """Return values of images (images, …) as values of examples (examples, …)."""
        return values if self.image_index is None else select_rows(values, self.image_index)


def collate(items: list[ImageItem], scaling: Scaling | None = None) -> HostBatch:
    """Return the items as one batch. scaling: that of the items if they have bytes."""
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
    return HostBatch(examples, pixel_values, None if len(examples) == len(items) else image_index, cached, scaling)


def loader(dataset: ImageDataset, batch_size: int, shuffle: bool, seed: int, workers: int, pin: bool) -> DataLoader[HostBatch]:
    """Return a DataLoader over `EpochBatches`. Set `.batch_sampler.epoch` (and `.selected`) before each epoch."""
    batches = EpochBatches(len(dataset), batch_size, shuffle, seed)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collate_fn makes a HostBatch of its items
        batch_sampler=batches, num_workers=workers, collate_fn=partial(collate, scaling=scaling_of(dataset)), pin_memory=pin,
        persistent_workers=workers > 0, worker_init_fn=ignore_in_worker,
        generator=torch.Generator().manual_seed(seed),  # a separate one: workers must not change other random draws
    )  # fmt: skip


def first_batch(batches: DataLoader[HostBatch]) -> HostBatch:
    """Return the first batch of the loader's epoch. Read it in this process, without starting workers."""
    keys: list[Key] = next(iter(batches.batch_sampler))  # type: ignore[arg-type]
    dataset: Any = batches.dataset
    return collate([dataset.item(key, use_cached=False) for key in keys], scaling_of(dataset))


def scaling_of(dataset: Any) -> Scaling | None:
    """Return the scaling of a data set whose items have bytes, else None."""
    return dataset.pixels.scaling if dataset.pixels.exact else None


def close(batches: DataLoader[HostBatch]) -> None:
    """End the worker processes now. Without this call, the garbage collector ends them and waits 5 s for each."""
    iterator: Any = getattr(batches, "_iterator", None)
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
        for worker in iterator._workers:
            worker.kill()  # workers ignore SIGTERM


def pixel_values(image: Any, image_processor: Any) -> Tensor:
    """Return the pixel values of one image, (3, H, W) float32, bit for bit as the checkpoint's own processor makes them."""
    return pixels_of(image_processor)(image)
