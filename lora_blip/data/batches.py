"""Examples → batches of tensors, in an order that depends on the seed and the epoch alone."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lora_blip.data.annotations import Example
from lora_blip.data.images import augment, open_image

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
    """Batches of keys for one epoch after another; the last batch of an epoch may be short."""

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(range(self.count))
        if self.shuffle:
            random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        keys = [(self.epoch, index) for index in order]
        yield from (keys[start : start + self.batch_size] for start in range(0, self.count, self.batch_size))


@dataclass(frozen=True)
class Stack:
    """What a worker hands over: examples and their pixel values, (images, 3, H, W)."""

    examples: list[Example]
    pixel_values: Tensor


def stack(rows: list[tuple[Example, Tensor]]) -> Stack:
    return Stack([example for example, _ in rows], torch.stack([values for _, values in rows]))


def loader(dataset: Pictures, batch_size: int, shuffle: bool, seed: int, workers: int, pin: bool) -> DataLoader[Stack]:
    """A DataLoader over `EpochBatches`; set `.batch_sampler.epoch` before each epoch."""
    batches = EpochBatches(len(dataset), batch_size, shuffle, seed)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # collate_fn turns its items into a Stack
        batch_sampler=batches, num_workers=workers, collate_fn=stack, pin_memory=pin,
        persistent_workers=workers > 0,
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


def pixel_values(image: Any, image_processor: Any) -> Tensor:
    """One RGB picture → (3, H, W) float32, exactly as the checkpoint's own processor makes it."""
    return image_processor(image, return_tensors="pt")["pixel_values"][0]
