"""Run a task on images in batches. If the device fails, try half the batch, and finally the CPU."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # comes with transformers

from lora_blip.data.example import Example
from lora_blip.data.image_sources import image_key
from lora_blip.data.prefetch import ImagePrefetcher, Lookahead
from lora_blip.errors import ImageError, ModelError
from lora_blip.lora.routing_state import outside_blocks
from lora_blip.models.finite import cause_of, checking_outputs
from lora_blip.models.library import first_line
from lora_blip.models.precision import autocasting
from lora_blip.runtime.limits import CPU_ALLOCATOR
from lora_blip.runtime.untrusted import printable
from lora_blip.tasks import verification, verification_record
from lora_blip.tasks.base import PredictionTask

# (task, pixel values, examples) → one result per example
Work = Callable[[PredictionTask, Tensor, list[Example]], Iterable[Any]]
FAULTS = ("out of memory", "CUDA error", "CUBLAS", "CUDNN", "cuDNN", "HIP error", "device-side assert")


class Runner:
    """Run a function of a task on batches of images.

    reload_on_cpu: loads the task again from its files, on the CPU, and returns it. It is called if the device has failed and
    the weights cannot be copied from the device. report: called with each line to print.
    """

    def __init__(
        self,
        task: PredictionTask,
        batch_size: int = 16,
        precision: str = "fp32",
        reload_on_cpu: Callable[[], PredictionTask] | None = None,
        report: Callable[[str], object] = tqdm.write,
    ) -> None:
        self.task, self.size, self.precision, self.reload_on_cpu = task, batch_size, precision, reload_on_cpu
        self.warned, self.report = set[str](), report
        self.prefetcher = ImagePrefetcher()
        self.fast: bool = getattr(task.backbone, "fast", False)
        self.base_digest = verification_record.base_of(task.backbone) if self.fast else ""
        self.checked = not self.fast  # False if the fast path must still be compared with the plain one

    def run(self, examples: Iterable[Example], work: Work) -> Iterator[tuple[Example, Any]]:
        """Yield each example with its result, in order. Print each unreadable image once, and leave it out."""
        for example, result in self.run_with_errors(examples, work):
            if not isinstance(result, ImageError):
                yield example, result
            elif str(result) not in self.warned:
                self.warned.add(str(result))
                self.report(printable(f"left out: {result}"))

    def run_with_errors(
        self, examples: Iterable[Example], work: Work, next_examples: Iterable[Example] = ()
    ) -> Iterator[tuple[Example, Any]]:
        """Yield each example with its result, or with the ImageError if its image cannot be read, in order.

        The images of the next batch are decoded while the model computes.
        next_examples: the first examples of the next call. They are decoded too, and the caller must close the prefetcher.
        """
        self.task.backbone.model.eval()
        source, next_examples = Lookahead(examples), list(next_examples)
        try:
            while batch := source.take(self.size):
                yield from self._batch(batch, source.peek(self.size) or next_examples, work)
        finally:
            if not next_examples:
                self.prefetcher.close()

    def _batch(self, examples: list[Example], following: list[Example], work: Work) -> Iterator[tuple[Example, Any]]:
        """Yield the examples of a batch with their results. Decode the images of `following` while the model computes."""
        processor = self.task.backbone.image_processor
        self.prefetcher.announce([*examples, *following], processor)
        pictures = self.prefetcher.pictures(examples)  # {key: pixel values or ImageError}, one entry per image
        self.prefetcher.announce(following, processor)
        good = [(e, picture) for e in examples if isinstance(picture := pictures[image_key(e)], Tensor)]
        readable, stacked = [e for e, _ in good], [picture for _, picture in good]
        if good:
            self.check(torch.stack(stacked[: verification.ROWS]), readable[: verification.ROWS], work)
        results = self._compute_with_fallback(torch.stack(stacked), readable, work) if good else iter(())
        for e in examples:
            picture = pictures[image_key(e)]
            yield e, picture if isinstance(picture, ImageError) else next(results)

    def compute(self, pictures: Tensor, examples: list[Example], work: Work) -> list[Any]:
        """Return the results for decoded images (images, 3, H, W). Restore the mode (train or eval) of the model."""
        with verification.evaluating(self.task):
            self.check(pictures[: verification.ROWS], examples[: verification.ROWS], work)
            return list(self._compute_with_fallback(pictures, examples, work))

    def check(self, pictures: Tensor, examples: list[Example], work: Work) -> None:
        """Compare the fast path with the plain one on a few images, once. Disable the fast path if the results differ."""
        if self.checked:
            return
        self.checked = True
        task, for_check = self.task, getattr(work, "for_check", lambda: work)
        pictures = pictures.to(task.backbone.device)
        kind = "ranking" if getattr(work, "texts", ()) else "prediction"
        run = lambda: list(for_check()(task, pictures, examples))  # noqa: E731
        # a block of the caller may choose adapters for other rows than those of the check
        outside_blocks(lambda: verification.before_prediction(task, self.base_digest, self.precision, run, kind, self.report))

    def check_with_images_of(self, examples: list[Example], work: Work) -> None:
        """Check the fast path with the first readable images of these examples, before they are predicted."""
        self.prefetcher.announce(examples, self.task.backbone.image_processor)
        pictures = self.prefetcher.pictures(examples)
        good = [(e, picture) for e in examples if isinstance(picture := pictures[image_key(e)], Tensor)][: verification.ROWS]
        if good:
            self.task.backbone.model.eval()
            self.check(torch.stack([picture for _, picture in good]), [e for e, _ in good], work)

    def _compute_with_fallback(self, pictures: Tensor, examples: list[Example], work: Work) -> Iterator[Any]:
        """Yield the results. If the device fails, compute two half batches. If it fails for a single image, use the CPU.

        The results of the first half are yielded before the second half is computed.
        """
        device = self.task.backbone.device
        try:
            with autocasting(device, self.precision)(), checking_outputs(self.task.output_modules()) as check:
                results, reason = list(work(self.task, pictures.to(device), examples)), ""
            if check.failed:
                raise self._nonfinite(pictures.to(device), examples, work)
        except RuntimeError as error:  # the base class of torch.OutOfMemoryError and torch.AcceleratorError
            if not is_device_failure(error, device):
                raise
            results, reason = [], first_line(error)
        half = len(examples) // 2
        if not reason:
            yield from (result for _, result in zip(examples, results, strict=True))
        elif half:
            fix = f"set BATCH_SIZE (or --batch-size) to {half}"
            self._warn("half", f"{device} failed ({reason}); continuing with batches of at most {half}; {fix}")
            self.size = min(self.size, half)
            release(device)
            yield from self._compute_with_fallback(pictures[:half], examples[:half], work)
            yield from self._compute_with_fallback(pictures[half:], examples[half:], work)
        elif device.type == "cpu":
            fix = "end other programs, or use a smaller base, a smaller image_size or base_dtype = bf16"
            flags = "lora-blip infer: --image-size, --base-dtype"
            raise ModelError(f"the CPU has too little memory for a batch of one image ({reason}); {fix} ({flags})")
        else:
            self._warn("cpu", f"{device} failed for a single image ({reason}); continuing on the CPU, which is slower")
            self._move_to_cpu()
            yield from self._compute_with_fallback(pictures, examples, work)

    def _nonfinite(self, pictures: Tensor, examples: list[Example], work: Work) -> ModelError:
        """Return the error for a batch whose outputs contain NaN or infinity. Its texts would be wrong."""
        model = self.task.backbone.model
        with autocasting(pictures.device, self.precision)():
            cause = cause_of(model, lambda: list(work(self.task, pictures, examples)))
        if self.precision == "fp16" or any(each.dtype == torch.float16 for each in model.parameters()):
            cause += (
                '. fp16 overflows easily: use PRECISION = "bf16" (--precision bf16; in Python: precision="bf16"), or "fp32"'
            )
        first = f"{examples[0].name} is in a batch whose" if len(examples) > 1 else f"{examples[0].name}: its"
        return ModelError(printable(f"{first} outputs are not finite: {cause}"))

    def _move_to_cpu(self) -> None:
        """Move the task to the CPU in fp32, or load it again if the weights cannot be copied."""
        try:
            self.task.backbone.model.to("cpu")  # move before the cast: fp32 needs twice the memory
            self.task.move(torch.device("cpu"))
        except (RuntimeError, ValueError):  # ValueError: weights of bitsandbytes cannot be cast
            if self.reload_on_cpu is None:
                raise
            self.task = self.reload_on_cpu()
        self.task.backbone.model.eval()
        self.precision, self.checked = "fp32", not self.fast

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            self.report(printable(f"warning: {message}"))


def is_device_failure(error: RuntimeError, device: torch.device) -> bool:
    """Return True if an error comes from the device (memory, driver, kernel), not from a mistake in the code."""
    if device.type == "cpu":
        return CPU_ALLOCATOR in str(error)
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError)
    return isinstance(error, kinds) or any(fault in str(error) for fault in FAULTS)


def release(device: torch.device) -> None:
    """Free the cached memory of the device, unless the device has failed."""
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:
            return  # after a kernel fault, every CUDA call fails; the caller continues on the CPU
