"""Predict any number of images in blocks. Each process computes some blocks, and the results are in the order of the images."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from tqdm import tqdm  # comes with transformers

from lora_blip.data.example import Example
from lora_blip.data.prefetch import Lookahead
from lora_blip.errors import ImageError, OutputError
from lora_blip.inference.batch_runner import Runner, Work
from lora_blip.inference.finished import key_of
from lora_blip.inference.output import Output
from lora_blip.inference.prediction import RANKING_LENGTH, Prediction, format_prediction
from lora_blip.runtime import signals
from lora_blip.runtime.counts import counted, plural
from lora_blip.runtime.distributed import Ranks
from lora_blip.runtime.limits import is_lost_peer
from lora_blip.runtime.progress import ProgressMeter
from lora_blip.runtime.signals import StopRequest
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks import verification

SHOWN = 20  # largest number of predictions and unreadable images that are printed; the files contain all

Results = list[tuple[Example, Prediction | ImageError]]
Block = tuple[int, list[Example], list[bool]]  # number, examples, and for each example whether it is already done


class BlockScheduler:
    """Predict blocks of examples in rounds.

    In a round, rank 0 predicts the next unfinished block, rank 1 the block after it, and so on.

    Only the main rank reads the examples. It collects the predictions of all ranks.

    Each block has the same examples after a resume. If only a part of a block is done, the whole block is predicted again, and
    only the missing part is written. So no text depends on where a run was stopped, even with sampling.
    """

    def __init__(self, ranks: Ranks, runner: Runner, stop_request: StopRequest, out: Output) -> None:
        self.ranks, self.runner, self.stop_request, self.out = ranks, runner, stop_request, out
        self.size = runner.size  # fixed: the runner halves its own size if the memory runs out

    def run(self, examples: Iterable[Example], work: Work, handle: Callable[[Results], None]) -> None:
        """Predict all examples. After each round, call `handle` on the main rank with the new predictions.

        Raise Stopped after the round in which a signal arrived, and OutputError if another process is lost.
        """
        try:
            self._run(examples, work, handle)
        except RuntimeError as error:
            if self.ranks.count == 1 or not is_lost_peer(error):
                raise
            raise OutputError(
                "another process was lost; the written lines are safe. Start all processes again with the same settings and "
                "--output-dir to resume"
            ) from None
        finally:
            self.runner.prefetcher.close()

    def _run(self, examples: Iterable[Example], work: Work, handle: Callable[[Results], None]) -> None:
        blocks, count = Lookahead(self._unfinished_blocks(examples)), self.ranks.count
        while this_round := self.ranks.broadcast(self._on_main(lambda: (blocks.take(count), blocks.peek(count)))):
            current, following = this_round  # `following` is decoded while `current` is computed
            if not current:
                break
            self._check(current[0], work)
            own = self._predict_block(self._own_block(current), self._own_block(following), work)
            gathered = self.ranks.all_gather((own, self.stop_request.signal))
            results = [
                (example, result)
                for (_, examples_of_block, done), (results_of_block, _) in zip(current, gathered, strict=False)
                for example, result, is_done in zip(examples_of_block, results_of_block, done, strict=True)
                if not is_done
            ]
            self._on_main(lambda: handle(results))
            self._stop_if_requested([number for _, number in gathered])
        if this_round is None:  # the main rank failed and reports the error
            raise SystemExit(2)
        self._stop_if_requested(self.ranks.all_gather(self.stop_request.signal))

    def _check(self, block: Block, work: Work) -> None:
        """Check the fast path on the main rank, and use the result on all ranks. A single process checks in the runner."""
        if self.ranks.count == 1 or self.runner.checked:
            return
        self._on_main(lambda: self.runner.check_with_images_of(block[1], work))
        self.runner.checked = True
        if not self.ranks.broadcast(self.runner.task.backbone.fast):
            verification.disable(self.runner.task)

    def _unfinished_blocks(self, examples: Iterable[Example]) -> Iterator[Block]:
        """Yield each block that has an example without a result, until a signal arrives."""
        iterator, number, is_done = iter(examples), 0, self.out.done.matcher()
        while (block := list(islice(iterator, self.size))) and not self.stop_request.signal:
            done = [is_done(example) for example in block]
            if not all(done):
                yield number, block, done
            number += 1

    def _own_block(self, blocks: list[Block]) -> Block:
        """Return the block of this rank, or an empty one."""
        return blocks[self.ranks.rank] if self.ranks.rank < len(blocks) else (0, [], [])

    def _predict_block(self, block: Block, following: Block, work: Work) -> list[Prediction | ImageError]:
        return [_truncated(result) for _, result in self.runner.run_with_errors(block[1], work, following[1])]

    def _on_main(self, action: Callable[[], Any]) -> Any:
        """Call `action` on the main rank, and return its result there. If it raises an error, stop the other ranks too."""
        if not self.ranks.main:
            return None
        try:
            return action()
        except BaseException:
            self.ranks.broadcast(None)
            raise

    def _stop_if_requested(self, received: list[int]) -> None:
        if any(received):
            print(printable(self.out.describe_stop()) if self.out else "", flush=True)
            raise signals.Stopped(signals.INTERRUPTED if signal.SIGINT in received else signals.SAVED)


def _truncated(result: Prediction | ImageError) -> Prediction | ImageError:
    """Truncate the ranking before it is sent between processes."""
    return result if isinstance(result, ImageError) else replace(result, ranking=result.ranking[:RANKING_LENGTH])


class ProgressDisplay(ProgressMeter):
    """Print the progress and the first SHOWN predictions, on the main rank only."""

    def __init__(
        self, name: str, count: int, out: Output | None, clock: Callable[[], float] = time.monotonic, unit: str = "image"
    ) -> None:
        super().__init__(name, count, unit, out.lines if out else 0, is_shown=out is not None, clock=clock)
        self.out, self.shown = out, 0

    def count_results(self, results: Results) -> None:
        """Count the results without printing them."""
        self.update(len(results))

    def speed_line(self) -> str:
        """Return a line with the number of images or questions, the time and the speed; "" if this run predicted none."""
        done = self.done - self.before
        return f"{counted(done, self.unit)} in {self.seconds:,.1f} s, {self.speed:,.1f} {plural(self.unit)}/s\n" if done else ""

    def show(self, results: Results, base: dict[int, str]) -> None:
        """Count the results. Print them if fewer than SHOWN were printed before. base: the texts of the base by `key_of`."""
        for example, result in results[: max(0, SHOWN - self.shown)]:
            if isinstance(result, ImageError):
                tqdm.write(printable(f"left out: {result}"))
            else:
                tqdm.write(format_prediction(result, base.get(key_of(example))))
        if self.shown <= SHOWN < self.shown + len(results) and self.out:
            tqdm.write(printable(f"the other predictions are written to {self.out.path} and not printed"))
        self.shown += len(results)
        self.count_results(results)
