"""Run a task over images in batches. If the device fails, use half the batch, then the CPU."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # comes with transformers

from lora_blip.data.example import Example
from lora_blip.data.image_sources import image_key
from lora_blip.data.prefetch import ImagePrefetcher, Lookahead
from lora_blip.errors import ImageError
from lora_blip.models.library import first_line
from lora_blip.models.precision import autocasting
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks import verification, verification_record
from lora_blip.tasks.base import PredictionTask

Work = Callable[[PredictionTask, Tensor, list[Example]], Iterable[Any]]  # pixel values and examples → a result for each
FAULTS = ("out of memory", "CUDA error", "CUBLAS", "CUDNN", "cuDNN", "HIP error", "device-side assert")


class Runner:
    """`reopen` opens the task again on the CPU, if the weights cannot be read back from a broken device."""

    def __init__(
        self,
        task: PredictionTask,
        batch_size: int = 16,
        precision: str = "fp32",
        reopen: Callable[[], PredictionTask] | None = None,
    ) -> None:
        self.task, self.size, self.precision, self.reopen = task, batch_size, precision, reopen
        self.warned: set[str] = set()
        self.prefetcher = ImagePrefetcher()
        self.fast: bool = getattr(task.backbone, "fast", False)
        self.base = verification_record.base_of(task.backbone) if self.fast else ""
        self.checked = not self.fast  # whether the fast path has been compared with the plain one for what comes next

    def run(self, examples: Iterable[Example], work: Work) -> Iterator[tuple[Example, Any]]:
        """Each example with its result, in order; an image that cannot be read is reported and left out."""
        for example, found in self.each(examples, work):
            if not isinstance(found, ImageError):
                yield example, found
            elif str(found) not in self.warned:
                self.warned.add(str(found))
                tqdm.write(printable(f"left out: {found}"))

    def each(self, examples: Iterable[Example], work: Work, coming: Iterable[Example] = ()) -> Iterator[tuple[Example, Any]]:
        """Each example with its result, or with the ImageError that says why it has none, in order.

        One batch is drawn ahead, and its pictures are decoded while the model computes; `coming`: what the next call
        will ask for. The caller that passes it must close the prefetcher.
        """
        self.task.backbone.model.eval()
        source, coming = Lookahead(examples), list(coming)
        try:
            while some := source.take(self.size):
                yield from self._batch(some, source.peek(self.size) or coming, work)
        finally:
            if not coming:
                self.prefetcher.close()

    def _batch(self, some: list[Example], following: list[Example], work: Work) -> Iterator[tuple[Example, Any]]:
        processor = self.task.backbone.image_processor
        self.prefetcher.announce([*some, *following], processor)
        pictures = self.prefetcher.pictures(some)  # several questions of one picture have one place
        self.prefetcher.announce(following, processor)
        good = [(e, picture) for e in some if isinstance(picture := pictures[image_key(e)], Tensor)]
        here, stacked = [e for e, _ in good], [picture for _, picture in good]
        if good:
            self.check(torch.stack(stacked[: verification.ROWS]), here[: verification.ROWS], work)
        results = self._attempt(torch.stack(stacked), here, work) if good else iter(())
        for e in some:
            picture = pictures[image_key(e)]
            yield e, picture if isinstance(picture, ImageError) else next(results)

    def compute(self, pictures: Tensor, examples: list[Example], work: Work) -> list[Any]:
        """Return the results for decoded images (images, 3, H, W). The mode of the model is the same afterwards."""
        with verification.evaluating(self.task):
            self.check(pictures[: verification.ROWS], examples[: verification.ROWS], work)
            return list(self._attempt(pictures, examples, work))

    def check(self, pictures: Tensor, examples: list[Example], work: Work) -> None:
        """Compare the fast path with the plain one on a few pictures, unless that has been done; it may be off afterwards."""
        if self.checked:
            return
        self.checked = True
        task, again = self.task, getattr(work, "again", lambda: work)
        pictures = pictures.to(task.backbone.device)
        what = "ranking" if getattr(work, "texts", ()) else "prediction"
        run = lambda: list(again()(task, pictures, examples))  # noqa: E731
        verification.before_prediction(task, self.base, self.precision, run, what, tqdm.write)

    def check_first(self, examples: list[Example], work: Work) -> None:
        """`check`, with the pictures of a block that is about to come."""
        self.prefetcher.announce(examples, self.task.backbone.image_processor)
        pictures = self.prefetcher.pictures(examples)
        good = [(e, picture) for e in examples if isinstance(picture := pictures[image_key(e)], Tensor)][: verification.ROWS]
        if good:
            self.task.backbone.model.eval()
            self.check(torch.stack([picture for _, picture in good]), [e for e, _ in good], work)

    def _attempt(self, pictures: Tensor, examples: list[Example], work: Work) -> Iterator[Any]:
        """A result for each; what the first half gave is handed on before the second half can fail."""
        device = self.task.backbone.device
        try:
            with autocasting(device, self.precision)():
                found, reason = list(work(self.task, pictures.to(device), examples)), ""
        except RuntimeError as error:  # torch's out-of-memory and accelerator errors are such
            if not gave_out(error, device):
                raise
            found, reason = [], first_line(error)
        half = len(examples) // 2
        if not reason:
            yield from (result for _, result in zip(examples, found, strict=True))
        elif half:
            self._warn("half", f"{device} gave out ({reason}); going on with batches of {half} and fewer")
            self.size = min(self.size, half)
            release(device)
            yield from self._attempt(pictures[:half], examples[:half], work)
            yield from self._attempt(pictures[half:], examples[half:], work)
        else:
            self._warn("cpu", f"{device} gave out even for one image ({reason}); going on, slower, on the CPU")
            self._move_to_cpu()
            yield from self._attempt(pictures, examples, work)

    def _move_to_cpu(self) -> None:
        try:
            self.task.backbone.model.to("cpu")  # first of all: as fp32, it would take twice the memory where there is none
            self.task.move(torch.device("cpu"))
        except RuntimeError:
            if self.reopen is None:
                raise
            self.task = self.reopen()
        self.task.backbone.model.eval()
        self.precision, self.checked = "fp32", not self.fast

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            tqdm.write(printable(f"warning: {message}"))


def gave_out(error: RuntimeError, device: torch.device) -> bool:
    """Whether an error is the accelerator's own, and not a fault of what it was asked."""
    if device.type == "cpu":
        return False
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, kinds) or any(fault in str(error) for fault in FAULTS)


def release(device: torch.device) -> None:
    """Give cached memory back, where the device still answers."""
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            return  # a kernel fault outlives everything; the CPU comes next
