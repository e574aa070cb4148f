"""What a training run leaves behind: its folder with settings, metrics and adapter, and its progress on the terminal."""

import json
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # comes with transformers

from lora_blip import adapter
from lora_blip.config import TrainConfig
from lora_blip.tasks.caption import CaptionTask


@dataclass(frozen=True)
class Update:
    loss: float  # mean over the label tokens of the whole step
    grad_norm: float  # before clipping
    skipped: bool  # nothing was changed, because a gradient was not finite
    scale: float  # of the GradScaler; 1 without it


def run_name(config: TrainConfig, now: datetime) -> str:
    """`lora_bs2_ep4_lr0.0001_r16_a32_20260607_161536`"""
    return f"lora_bs{config.batch_size}_ep{config.epochs}_lr{config.lr:g}_r{config.r}_a{config.alpha:g}_{now:%Y%m%d_%H%M%S}"


class Run:
    """The folder of one run: config.json, metrics.jsonl, adapter.safetensors, loss.png; and the progress bar."""

    def __init__(self, config: TrainConfig, task: CaptionTask, total: int) -> None:
        self.config, self.task = config, task
        self.folder = fresh(Path(config.output_dir) / run_name(config, datetime.now()))
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        self.metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.bar = tqdm(total=total, unit="step", disable=None, dynamic_ncols=True)
        self.started = self.logged = time.perf_counter()
        self.images = 0
        self.last: dict[str, Any] = {}
        self.last_note = ""

    def log_step(self, step: int, epoch: int, update: Update, rate: float, images: int) -> None:
        self.images += images
        self.bar.update(1)
        if step % self.config.log_every and step != self.bar.total and step != 1:
            return
        now = time.perf_counter()
        entry = {
            "step": step, "epoch": epoch, "loss": round(update.loss, 6), "lr": rate,
            "grad_norm": round(update.grad_norm, 6), "images_per_s": round(self.images / (now - self.logged), 2),
            "seconds": round(now - self.started, 3),
        }  # fmt: skip
        if update.scale != 1:
            entry["loss_scale"] = update.scale
        self.images, self.logged = 0, now
        self._write(entry)
        self.bar.set_postfix_str(f"loss {update.loss:.4f}, lr {rate:.1e}, {entry['images_per_s']:.1f} images/s")
        if self.bar.disable and (step % (10 * self.config.log_every) == 0 or step in (1, self.bar.total)):
            print(f"step {step}/{self.bar.total}  loss {update.loss:.4f}  lr {rate:.1e}  {entry['images_per_s']:.1f} images/s")

    def log_skip(self, step: int, epoch: int, update: Update, note: str) -> None:
        self.last_note = note
        self._write({"step": step, "epoch": epoch, "skipped": note, "loss_scale": update.scale})
        self.bar.write(f"after step {step}, one was skipped: {note}")

    def log_validation(self, step: int, epoch: int, scores: dict[str, float]) -> None:
        self._write({"step": step, "epoch": epoch, **{key: round(value, 6) for key, value in scores.items()}})
        self.bar.write(
            f"{'before training' if not step else f'epoch {epoch}'}: validation loss {scores['val_loss']:.4f}, "
            f"exact match {scores['val_exact_match']:.1%}"
        )
        self.last = scores
        self.logged, self.images = time.perf_counter(), 0

    def save(self, step: int, finished: bool, merge_drift: dict[str, float] | None = None) -> Path:
        summary = {"steps": step, "finished": finished, **self.last, "settings": asdict(self.config)}
        path = self.folder / adapter.FILE_NAME
        return adapter.save(
            path, self.task.backbone, task=self.task.metadata(), training=summary, merge_drift=merge_drift, overwrite=True
        )

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()

    def _write(self, entry: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(entry) + "\n")
        self.metrics.flush()


def fresh(path: Path) -> Path:
    """The path, or if that is taken the same with a number: two runs in one second get names of their own."""
    names = (path, *(path.with_name(f"{path.name}_{number}") for number in range(2, 1000)))
    return next(name for name in names if not name.exists())
