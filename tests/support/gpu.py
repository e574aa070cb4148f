"""The differences between a CUDA device and the CPU in the tests of `tests/gpu`, and their oracle: the CPU in float32."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_blip.config import TrainConfig
from lora_blip.inference import batch_runner
from lora_blip.tasks.base import Task
from lora_blip.training import learner, loop
from lora_blip.training.loop import train
from lora_blip.training.loss_scale import LossScaler
from tests.support.runs import elsewhere, metrics_of
from tests.support.steps import reads_a_value

HALF = ["fp16", "bf16"]
# largest relative difference to the CPU in float32; cuDNN computes the patch embedding of fp32 in TF32, with 11 bits
BOUND = {"fp32": 2e-3, "fp16": 5e-3, "bf16": 2e-2}


def pairs(kinds: list[str], precisions: list[str] = HALF, fast: tuple[str, str] = ("", "")) -> list[Any]:
    """Return (kind, precision) without T5 in fp16, which is refused. On the CPU, all but `fast` have the marker slow."""
    all_pairs = [(kind, precision) for kind in kinds for precision in precisions if (kind, precision) != ("t5", "fp16")]
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair != fast), id="-".join(pair)) for pair in all_pairs]


def losses_of(path: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(path) if "loss" in line]


def trained(config: TrainConfig) -> Path:
    """Train with a loss scale at which no step of the tiny models overflows, so that no step is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "LossScaler", partial(LossScaler, scale=64.0))
        return train(config)


def assert_as_on_the_cpu(config: TrainConfig, path: Path, **truth: Any) -> None:
    """Assert that a run has the losses of transformers' own computation on the CPU in float32, and that it learned.

    truth: other settings of the oracle.
    """
    plain = {"device": "cpu", "precision": "fp32", "fast": False, "compile": False, "checkpointing": False, "cache_gb": 0.0}
    expected = losses_of(trained(replace(elsewhere(config, "truth"), **plain | truth)))
    assert len(expected) > 3 and min(expected) < (1 - 3 * BOUND[config.precision]) * expected[0]
    assert losses_of(path) == pytest.approx(expected, rel=BOUND[config.precision])


def assert_near(tensors: list[torch.Tensor], truths: list[torch.Tensor], bound: float) -> None:
    """Assert that the distance of all tensors together is at most `bound` times the norm of the truths."""
    assert len(tensors) == len(truths) > 0
    truth = torch.cat([each.detach().double().cpu().flatten() for each in truths])
    actual = torch.cat([each.detach().double().cpu().flatten() for each in tensors])
    assert truth.any()
    assert (actual - truth).norm() <= bound * truth.norm()


# ---------------------------------------------------------------- reads of values


class HostReadError(AssertionError):
    """A GPU would make the host wait here."""


class NoReads(TorchDispatchMode):
    """Raise HostReadError for an operation that reads a value. It stands for CUDA's debug mode on the CPU."""

    def __init__(self, is_allowed: bool = False) -> None:
        super().__init__()
        self.is_allowed = is_allowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.is_allowed and reads_a_value(func, args):
            raise HostReadError(func.name())
        return func(*args, **(kwargs or {}))

    @contextmanager
    def allowed(self) -> Iterator[None]:
        before, self.is_allowed = self.is_allowed, True
        try:
            yield
        finally:
            self.is_allowed = before


@contextmanager
def sync_mode(mode: str) -> Iterator[None]:
    """Set what CUDA does in the block if the host waits for the device: "default" (nothing) or "error" (RuntimeError)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def only_the_read_of_a_step(task: Task) -> Iterator[list[int]]:
    """Raise an error in the block for each read of a value, except in `loop.read_values`. Yield how many values it read.

    On the CPU, the tensors of the host are on the same device. So `task.batch` may read values there, and also the loss of
    retrieval, which selects the negatives on the host. `tests/training/test_host_syncs.py` covers both on the meta device.
    """
    lengths: list[int] = []
    mode, is_cpu = NoReads(task.needs_negatives), task.backbone.device.type == "cpu"
    refused: AbstractContextManager[Any] = mode if is_cpu else sync_mode("error")
    allowed: Callable[[], AbstractContextManager[Any]] = mode.allowed if is_cpu else partial(sync_mode, "default")
    real, batch = loop.read_values, task.batch

    def read_values(values: list[torch.Tensor]) -> list[float]:
        lengths.append(len(values))
        with allowed():
            return real(values)

    def read_batch(*given: Any) -> Any:
        with allowed():
            return batch(*given)

    with pytest.MonkeyPatch.context() as patch, refused:
        patch.setattr(loop, "read_values", read_values)
        if is_cpu:
            patch.setattr(task, "batch", read_batch)
        yield lengths


# ---------------------------------------------------------------- memory


class Allocations(TorchDispatchMode):
    """Count the bytes of the storages that operations create on the CPU. Raise an error like CUDA's above `limit` bytes."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self.limit, self.bytes, self.peak = limit, 0, 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if id(storage) not in before and storage not in self.known:
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        if self.bytes > self.limit:
            raise torch.OutOfMemoryError("the rehearsal is out of memory")
        return result

    def _free(self, count: int) -> None:
        self.bytes -= count


def peak_of(device: str, act: Callable[[], object]) -> int:
    """Return the largest increase of the allocated bytes during `act`."""
    if device == "cpu":
        with Allocations() as allocations:
            act()
        return allocations.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    return torch.cuda.max_memory_allocated() - before


def starve(device: str, spare: int, blocks: Any) -> None:
    """Leave only `spare` bytes of memory until the ExitStack `blocks` is closed."""
    if device == "cpu":
        patch = blocks.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(batch_runner, "is_device_failure", lambda error, _: isinstance(error, torch.OutOfMemoryError))
        blocks.enter_context(Allocations(spare))
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    blocks.callback(torch.cuda.set_per_process_memory_fraction, 1.0)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
