"""What comes next is drawn, and its pictures are decoded, while the model is at work; never more than is told."""

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

MOST_THREADS = 4  # each may hold a picture of 400 MB while it is made small
T = TypeVar("T")


class Lookahead(Generic[T]):
    """An iterable that can be looked at before it is taken from. What drawing raises is raised when its turn has come."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = iter(items)
        self.drawn: deque[T] = deque()
        self.error: Exception | None = None

    def peek(self, count: int) -> list[T]:
        """The next `count`, or fewer where there are no more."""
        try:
            while self.error is None and len(self.drawn) < count:
                self.drawn.append(next(self.items))
        except StopIteration:
            pass
        except Exception as error:
            self.error = error
        return list(islice(self.drawn, count))

    def take(self, count: int) -> list[T]:
        """The same, taken: the next look begins behind them."""
        found = self.peek(count)
        if self.error is not None and not found:
            error, self.error = self.error, None
            raise error
        for _ in found:
            self.drawn.popleft()
        return found


class ImagePrefetcher:
    """Pictures that are decoded in threads before they are asked for. Only those are kept that were announced last."""

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.making: dict[Any, Future[Tensor | ImageError]] = {}  # place → its pixels

    def announce(self, examples: Iterable[Example], image_processor: Any) -> None:
        """These are wanted now or next, and nothing else is any more."""
        made = pixels_of(image_processor)
        wanted = {image_key(example): example for example in examples}
        for place in [place for place in self.making if place not in wanted]:
            self.making.pop(place).cancel()
        for place, example in wanted.items():
            if place not in self.making:
                self.pool = self.pool or ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "pictures")
                self.making[place] = self.pool.submit(developed, example, made)

    def pictures(self, examples: Iterable[Example]) -> dict[Any, Tensor | ImageError]:
        """Place → pixels (3, H, W) float32, or why there are none, of examples that were announced."""
        return {place: self.making[place].result() for place in {image_key(example) for example in examples}}

    def close(self) -> None:
        """Nothing is wanted any more; what is under way is left to itself."""
        for future in self.making.values():
            future.cancel()
        self.making.clear()
        if self.pool is not None:
            self.pool.shutdown(wait=False)
            self.pool = None


def developed(example: Example, pixels: Callable[[Any], Tensor]) -> Tensor | ImageError:
    """(3, H, W) float32, or the reason why an example has no picture."""
    try:
        return pixels(open_example(example))
    except ImageError as error:
        return ImageError(str(error))  # anew: the frames in its traceback keep a batch of pictures alive
