"""Read the next examples and decode their images in threads while the model computes."""

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.data.image_sources import image_key, open_example
from lora_blip.data.preprocessing import pixels_of
from lora_blip.errors import ImageError

MOST_THREADS = 4  # largest number of threads; each may hold an image of 400 MB before the image is resized
T = TypeVar("T")


class Lookahead(Generic[T]):
    """An iterator that can read its next items in advance.

    If the iterable raises an error, `take` first returns the items before it, and then raises the error.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.items = iter(items)
        self.drawn: deque[T] = deque()
        self.error: Exception | None = None

    def peek(self, count: int) -> list[T]:
        """Return the next `count` items, or fewer at the end, without removing them."""
        try:
            while self.error is None and len(self.drawn) < count:
                self.drawn.append(next(self.items))
        except StopIteration:
            pass
        except Exception as error:
            self.error = error
        return list(islice(self.drawn, count))

    def take(self, count: int) -> list[T]:
        """Return the next `count` items, or fewer at the end, and remove them."""
        items = self.peek(count)
        if self.error is not None and not items:
            error, self.error = self.error, None
            raise error
        for _ in items:
            self.drawn.popleft()
        return items


class ImagePrefetcher:
    """Decodes images in threads before they are needed. It keeps only the images of the last call of `announce`."""

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.decoding: dict[Any, Future[Tensor | ImageError]] = {}  # by `image_key`

    def announce(self, examples: Iterable[Example], image_processor: Any) -> None:
        """Start to decode the images of these examples, and discard all other images."""
        pixels = pixels_of(image_processor)
        needed = {image_key(example): example for example in examples}
        for key in [key for key in self.decoding if key not in needed]:
            self.decoding.pop(key).cancel()
        for key, example in needed.items():
            if key not in self.decoding:
                self.pool = self.pool or ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "pictures")
                self.decoding[key] = self.pool.submit(decode, example, pixels)

    def pictures(self, examples: Iterable[Example]) -> dict[Any, Tensor | ImageError]:
        """Return {image_key: pixel values (3, H, W) float32, or the error} for examples that were announced."""
        return {key: self.decoding[key].result() for key in {image_key(example) for example in examples}}

    def close(self) -> None:
        """Cancel all decoding. Do not wait for the threads to end."""
        for future in self.decoding.values():
            future.cancel()
        self.decoding.clear()
        if self.pool is not None:
            self.pool.shutdown(wait=False)
            self.pool = None


def decode(example: Example, pixels: Callable[[Any], Tensor]) -> Tensor | ImageError:
    """Return the pixel values of an example's image, (3, H, W) float32, or the error."""
    try:
        return pixels(open_example(example))
    except ImageError as error:
        return ImageError(str(error))  # a new error, because the traceback of the old one keeps a batch of images in memory
