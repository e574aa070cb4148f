"""Predict any number of images in blocks. Each process gets blocks, and the results come back in order."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from tqdm import tqdm  # comes with transformers

from lora_blip.data.example import Example
from lora_blip.data.prefetch import Lookahead
from lora_blip.errors import ImageError, OutputError
from lora_blip.inference.batch_runner import Runner, Work
from lora_blip.inference.finished import key_of
from lora_blip.inference.output import Output
from lora_blip.inference.prediction import RANKS_KEPT, Prediction, printed
from lora_blip.runtime import signals
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.limits import is_lost_peer
from lora_blip.runtime.progress import ProgressMeter
from lora_blip.runtime.signals import StopRequest
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks import verification

SHOWN = 20  # predictions and unreadable images that are printed; the files have all

Found = list[tuple[Example, Prediction | ImageError]]
Block = tuple[int, list[Example], list[bool]]  # its number, its examples, and which of them are already done


class BlockScheduler:
    """Give block b to rank b % count. Only the main rank reads the source, and it collects the predictions of all ranks.

    A block has the same examples after a resume: if a part of it is done, the whole block is predicted again and only the
    missing part is written. Each block has a separate seed. So no text depends on where a run was killed, sampled texts too.
    """

    def __init__(self, ranks: Ranks, runner: Runner, seed: int, stop_request: StopRequest, out: Output) -> None:
        self.ranks, self.runner, self.seed, self.stop_request, self.out = ranks, runner, seed, stop_request, out
        self.size = runner.size  # the runner halves it if the memory runs out

    def run(self, examples: Iterable[Example], work: Work, take: Callable[[Found], None]) -> None:
        """Predict all examples. On the main rank, call `take` after each round with the predictions that `out` does not have.

        Raise Stopped after the round in which a signal arrived, and OutputError if another process is lost.
        """
        try:
            self._run(examples, work, take)
        except RuntimeError as error:
            if self.ranks.count == 1 or not is_lost_peer(error):
                raise
            raise OutputError(
                "another process was lost; the written lines are safe: start again with the same settings and output_dir"
            ) from None
        finally:
            self.runner.prefetcher.close()

    def _run(self, examples: Iterable[Example], work: Work, take: Callable[[Found], None]) -> None:
        blocks, count = Lookahead(self._undone(examples)), self.ranks.count
        while turn := self.ranks.broadcast(self._alone(lambda: (blocks.take(count), blocks.peek(count)))):
            dealt, following = turn  # the next round is known early, so its images are decoded meanwhile
            if not dealt:
                break
            self._check(dealt[0], work)
            mine = self._said(self._mine(dealt), self._mine(following), work)
            everyone = self.ranks.all_gather((mine, self.stop_request.signal))
            found = [
                (example, said)
                for (_, some, over), (said_of, _) in zip(dealt, everyone, strict=False)
                for example, said, is_over in zip(some, said_of, over, strict=True)
                if not is_over
            ]
            self._alone(lambda: take(found))
            self._stop_if_told([number for _, number in everyone])
        if turn is None:  # the main rank failed, and reports the error
            raise SystemExit(2)
        self._stop_if_told(self.ranks.all_gather(self.stop_request.signal))

    def _check(self, block: Block, work: Work) -> None:
        """Let all processes use the main rank's decision about the fast path. A single process decides in `each`."""
        if self.ranks.count == 1 or self.runner.checked:
            return
        self._alone(lambda: self.runner.check_first(block[1], work))
        self.runner.checked = True
        if not self.ranks.broadcast(self.runner.task.backbone.fast):
            verification.disable(self.runner.task)

    def _undone(self, examples: Iterable[Example]) -> Iterator[Block]:
        iterator, number, done = iter(examples), 0, self.out.done.matcher()
        while (some := list(islice(iterator, self.size))) and not self.stop_request.signal:
            over = [done(example) for example in some]
            if not all(over):
                yield number, some, over
            number += 1

    def _mine(self, dealt: list[Block]) -> Block:
        return dealt[self.ranks.rank] if self.ranks.rank < len(dealt) else (0, [], [])

    def _said(self, block: Block, following: Block, work: Work) -> list[Prediction | ImageError]:
        number, examples, _ = block
        torch.manual_seed(self.seed + number)
        return [_short(said) for _, said in self.runner.each(examples, work, following[1])]

    def _alone(self, act: Callable[[], Any]) -> Any:
        """Call `act` on the main rank only. If it raises, the other ranks stop too."""
        if not self.ranks.main:
            return None
        try:
            return act()
        except BaseException:
            self.ranks.broadcast(None)
            raise

    def _stop_if_told(self, received: list[int]) -> None:
        if any(received):
            print(printable(self.out.paused()) if self.out else "", flush=True)
            raise signals.Stopped(signals.INTERRUPTED if signal.SIGINT in received else signals.SAVED)


def _short(said: Prediction | ImageError) -> Prediction | ImageError:
    """Truncate the ranking before it is sent between processes."""
    return said if isinstance(said, ImageError) else replace(said, ranking=said.ranking[:RANKS_KEPT])


class ProgressDisplay(ProgressMeter):
    """Print the first predictions and the progress, on the main rank."""

    def __init__(self, name: str, count: int, out: Output | None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(name, count, "image", out.lines if out else 0, is_shown=out is not None, clock=clock)
        self.out, self.shown = out, 0

    def move(self, found: Found) -> None:
        self.update(len(found))

    def pace(self) -> str:
        """Return a line with the number of images, the time and the speed; "" if nothing was left to do."""
        done = self.done - self.before
        return f"{done:,} images in {self.seconds:,.1f} s, {self.speed:,.1f} images/s\n" if done else ""

    def show(self, found: Found, base: dict[int, str]) -> None:
        for example, said in found[: max(0, SHOWN - self.shown)]:
            line = printable(f"left out: {said}") if isinstance(said, ImageError) else printed(said, base.get(key_of(example)))
            tqdm.write(line)
        if self.shown <= SHOWN < self.shown + len(found) and self.out:
            tqdm.write(printable(f"the rest goes to {self.out.path} without being shown here"))
        self.shown += len(found)
        self.move(found)
