"""The contestant peft with Hugging Face's Trainer, as its users write it, without logging and saving."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from benchmarks.contestants.peers import Inputs, rows_of
from benchmarks.suite.plan import RATE
from lora_blip.models.loading import Backbone

Row = dict[str, Tensor]


class Ready(Dataset[Row]):
    """The same row of tensors in each item, so that only the training takes time."""

    def __init__(self, inputs: Inputs, count: int) -> None:
        self.rows = [{key: value[row].cpu() for key, value in inputs.items()} for row in range(len(inputs["input_ids"]))]
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        return self.rows[index % len(self.rows)]


class Files(Dataset[Row]):
    """An item for each line. Its image is opened and processed each time; its text was tokenized before."""

    def __init__(
        self, backbone: Backbone, lines: list[tuple[Path, str]], change: Callable[[Image.Image, str], Any] | None = None
    ):
        self.lines, self.change = lines, change
        self.rows = rows_of(backbone, [text for _, text in lines])
        self.processor = BlipImageProcessorPil(size=dict(backbone.image_processor.size))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Row:
        path, text = self.lines[index]
        image = Image.open(path).convert("RGB")
        if self.change:
            image = self.change(image, text)
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, **{key: value[index] for key, value in self.rows.items()}}


def stacked(rows: list[Row]) -> Inputs:
    """Return a batch that is padded to its own longest row."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    longest = int(batch["attention_mask"].sum(1).max())
    return {key: value if key == "pixel_values" else value[:, :longest] for key, value in batch.items()}


class Watch(TrainerCallback):
    """Records when the training began, and when each step ended."""

    def __init__(self) -> None:
        self.began = 0.0
        self.steps: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(time.perf_counter())


def train(model: Any, data: Dataset[Row], precision: str, batch_size: int, watch: Watch, device: str, **settings: Any) -> None:
    """Run `Trainer.train()` once. `watch` records the times."""
    kind: dict[str, Any] = {"bf16": precision == "bf16", "fp16": precision == "fp16", "use_cpu": device == "cpu"}
    quiet: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    given = {"learning_rate": RATE, "weight_decay": 0.01, "max_grad_norm": 1.0, **settings}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=batch_size, remove_unused_columns=False, **kind, **quiet, **given
        )
        trainer = Trainer(model, arguments, data_collator=stacked, train_dataset=data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # otherwise the next Trainer wraps it again
        vars(model).pop("_is_accelerate_prepared", None)  # otherwise the next Trainer does not wrap it, and trains in fp32


def seconds_a_step(model: Any, inputs: Inputs, precision: str, steps: int, device: str) -> float:
    """Return the mean seconds of `steps` steps after the first. The first step includes the start."""
    watch, rows = Watch(), len(inputs["input_ids"])
    train(model, Ready(inputs, rows * (steps + 1)), precision, rows, watch, device, num_train_epochs=1)
    return a_step(watch.steps)


def a_step(ends: list[float]) -> float:
    """Return the mean seconds of the steps after the first, from their end times."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)
