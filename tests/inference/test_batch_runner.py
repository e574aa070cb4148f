"""Test the runner: a device that fails costs time, but no prediction."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lora_blip.data.example import Example
from lora_blip.errors import ImageError, ModelError
from lora_blip.inference.batch_runner import Runner, is_device_failure
from tests.support import tiny

FAILING = torch.device("meta")  # replaces an accelerator: it can have tensors, and it is not the CPU
CPU = torch.device("cpu")


class Weights(nn.Linear):
    """A linear that records whether its weights have been moved to another device."""

    moved = False

    def to(self, *arguments: Any, **named: Any) -> Any:
        self.moved = True
        return super().to(*arguments, **named)


class Fragile:
    """A task whose device fails for more than `limit` images. If `stuck`, its weights cannot be copied from the device."""

    def __init__(
        self, limit: int, stuck: bool = False, device: torch.device = FAILING, failing: torch.device = FAILING
    ) -> None:
        self.limit, self.stuck, self.failing = limit, stuck, failing
        self.backbone = SimpleNamespace(model=Weights(1, 1), device=device, image_processor=tiny.image_processor())
        self.sizes: list[tuple[str, int]] = []
        self.error: Exception = torch.OutOfMemoryError("out of memory: tried to allocate 20 GiB\nand more lines")

    def predict(self, pictures: torch.Tensor, examples: list[Example]) -> list[str]:
        assert len(pictures) == len(examples) and pictures.device == self.backbone.device
        self.sizes.append((self.backbone.device.type, len(examples)))
        if self.backbone.device == self.failing and len(examples) > self.limit:
            raise self.error
        return [f"{self.backbone.device.type} {example.image.stem}" for example in examples]

    def output_modules(self) -> list[nn.Module]:
        return [self.backbone.model]

    def move(self, device: torch.device) -> None:
        if self.stuck:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        assert self.backbone.model.moved  # before the cast, because fp32 weights need more memory on the device
        self.backbone.device = device


@pytest.fixture
def photos(tmp_path: Path) -> list[Example]:
    tiny.write_photos(tmp_path, 11)
    return [Example(tmp_path / "photos" / f"{n}.png", "", f"{n}.png", n) for n in range(11)]


def ran(runner: Runner, examples: Any) -> list[tuple[str, str]]:
    results = runner.run(examples, lambda task, pictures, some: task.predict(pictures, some))
    return [(example.image.stem, result) for example, result in results]


def warnings(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line]


def test_a_batch_that_is_too_large_for_the_memory_and_later_batches_are_halved(photos, capsys):
    task: Any = Fragile(limit=2)
    assert ran(Runner(task, 8), photos) == [(str(n), f"meta {n}") for n in range(11)]
    assert [size for _, size in task.sizes] == [8, 4, 2, 2, 4, 2, 2, 2, 1]  # 8 halved to 2s, then batches of 2
    (warning,) = warnings(capsys)
    assert warning.startswith(
        "warning: meta failed (out of memory: tried to allocate 20 GiB); continuing with batches of at most 4"
    )


def test_a_device_that_fails_for_one_image_is_replaced_by_the_cpu(photos, capsys):
    task: Any = Fragile(limit=0)
    runner = Runner(task, 4, "fp32")
    assert ran(runner, photos) == [(str(n), f"cpu {n}") for n in range(11)]
    assert task.sizes[:3] == [("meta", 4), ("meta", 2), ("meta", 1)] and {kind for kind, _ in task.sizes[3:]} == {"cpu"}
    assert sum(size for kind, size in task.sizes if kind == "cpu") == 11
    half, cpu = warnings(capsys)
    assert "batches of at most 2" in half and "for a single image" in cpu and runner.task is task and runner.precision == "fp32"


def test_if_weights_cannot_be_copied_from_the_device_the_task_is_loaded_again(photos, capsys):
    """After a CUDA error, no CUDA call works in the process, not even `.to("cpu")`."""
    task: Any = Fragile(limit=0, stuck=True)
    task.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    reloaded: Any = Fragile(limit=0, device=CPU)
    reloaded.backbone.model.train()
    runner = Runner(task, 4, "bf16", reload_on_cpu=lambda: reloaded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_blip.inference.batch_runner.autocasting", lambda *_: torch.no_grad)  # meta has no autocast
        assert ran(runner, photos) == [(str(n), f"cpu {n}") for n in range(11)]
    assert runner.task is reloaded and runner.precision == "fp32" and not reloaded.backbone.model.training
    assert len(warnings(capsys)) == 2
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        ran(Runner(Fragile(limit=0, stuck=True), 4), photos)  # without reload_on_cpu, the device's own error


def test_weights_that_cannot_be_cast_are_loaded_again_on_the_cpu(photos):
    """A base of bitsandbytes raises ValueError if it is cast to float32."""
    task: Any = Fragile(limit=0)

    def move(_device: torch.device) -> None:
        raise ValueError("Casting a quantized model to a new `dtype` is unsupported.")

    task.move = move
    reloaded = Fragile(limit=99, device=CPU)
    runner = Runner(task, 4, reload_on_cpu=lambda: reloaded)
    assert len(ran(runner, photos)) == len(photos) and runner.task is reloaded


def test_an_error_neither_loses_nor_repeats_earlier_predictions(photos):
    """The results of the first half are yielded before the second half fails."""
    task: Any = Fragile(limit=2, stuck=True)
    fine = task.predict

    def predict(pictures: torch.Tensor, examples: list[Example]) -> list[str]:
        if any(example.image.stem == "6" for example in examples):
            raise torch.OutOfMemoryError("out of memory")
        return fine(pictures, examples)

    task.predict = predict
    recorded = []
    with pytest.raises(RuntimeError, match="illegal memory access"):
        for example, _ in Runner(task, 8).run(photos, lambda task, *some: task.predict(*some)):
            recorded.append(example.image.stem)
    assert recorded == [str(n) for n in range(6)]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x2 and 3x4)"),
        ValueError("a fault of the task"),
        KeyError("x"),
    ],
)
def test_errors_that_are_not_the_devices_pass_through_unchanged(photos, error):
    task: Any = Fragile(limit=1)
    task.error = error
    with pytest.raises(type(error)) as caught:
        ran(Runner(task, 4), photos)
    assert caught.value is error and task.sizes == [("meta", 4)]


@pytest.mark.parametrize("message", ["can't allocate memory", "not enough memory"])
def test_if_a_cpu_has_too_little_memory_batches_are_halved_and_the_error_has_a_fix(photos, message, capsys):
    """These are PyTorch's messages on Linux and Windows."""
    task: Any = Fragile(limit=2, device=CPU, failing=CPU)
    task.error = RuntimeError(f"[enforce fail] DefaultCPUAllocator: {message}: you tried to allocate 1099511627776 bytes.")
    assert len(ran(Runner(task, 4), photos)) == len(photos)
    (line,) = warnings(capsys)
    assert "cpu failed" in line and "continuing with batches of at most 2" in line
    task = Fragile(limit=0, device=CPU, failing=CPU)
    task.error = RuntimeError(f"[enforce fail] DefaultCPUAllocator: {message}: you tried to allocate 1099511627776 bytes.")
    with pytest.raises(ModelError, match=rf"too little memory for a batch of one image .*{message}.*base_dtype = bf16"):
        ran(Runner(task, 4), photos)


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried …", "MPS backend out of memory (…)", "CUDA error: device-side assert triggered",
     "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"],
)  # fmt: skip
def test_errors_of_a_device_are_recognized(message):
    assert is_device_failure(RuntimeError(message), torch.device("cuda")) and not is_device_failure(RuntimeError(message), CPU)


def test_an_image_that_cannot_be_read_is_reported_once_and_left_out(photos, capsys):
    photos[3].image.write_bytes(b"broken")
    photos[7].image.unlink()
    task: Any = Fragile(limit=99)
    runner = Runner(task, 4)
    expected = [(str(n), f"meta {n}") for n in range(11) if n not in (3, 7)]
    assert ran(runner, [e for e in photos for _ in range(2)]) == [pair for pair in expected for _ in range(2)]
    assert ran(runner, photos) == expected  # the base, then the adapted: the same two errors are not printed again
    warned = warnings(capsys)
    assert len(warned) == 2 and "3.png is not a usable image" in warned[0] and "7.png does not exist" in warned[1]
    assert ran(runner, photos[3:4]) == []


def test_an_unreadable_image_keeps_its_position_and_has_a_reason(photos):
    """The error is among the other results. It has no traceback: the frames would keep the images of the batch in memory."""
    photos[3].image.write_bytes(b"broken")
    task: Any = Fragile(limit=2)
    twice = [e for e in photos for _ in range(2)]
    results = list(Runner(task, 4).run_with_errors(twice, lambda task, *some: task.predict(*some)))
    assert [example for example, _ in results] == twice
    errors = [result for _, result in results if isinstance(result, ImageError)]
    assert [result for _, result in results if isinstance(result, str)] == [
        f"meta {n}" for n in range(11) if n != 3 for _ in range(2)
    ]
    assert len(errors) == 2 and all("3.png is not a usable image" in str(error) for error in errors)
    assert all(error.__traceback__ is None and error.__context__ is None for error in errors)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 300), (3, 3), (5000, 2)])
def test_an_image_of_any_size_is_accepted(tmp_path, size):
    """The runner does not confuse a side of three pixels with three channels."""
    Image.new("RGB", size, "red").save(tmp_path / "odd.png")
    task: Any = Fragile(limit=1)
    assert ran(Runner(task, 1), [Example(tmp_path / "odd.png", "", "", 0)]) == [("odd", "meta odd")]


def test_examples_are_drawn_as_they_are_needed(photos):
    """The runner predicts an endless source batch by batch."""

    def endless() -> Iterator[Example]:
        while True:
            yield from photos

    task: Any = Fragile(limit=99)
    results = Runner(task, 4).run(endless(), lambda task, *some: task.predict(*some))
    assert [next(results)[1] for _ in range(25)][-1] == "meta 2" and len(task.sizes) == 7
