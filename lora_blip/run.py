"""What a training run leaves behind: its folder with settings, metrics and adapter, and its progress on the terminal."""

import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # comes with transformers

from lora_blip import adapter
from lora_blip.config import ConfigError, TrainConfig
from lora_blip.tasks.task import Task

BEST_NAME, METRICS_NAME = "best.safetensors", "metrics.jsonl"
NO_SCALARS = ("step", "epoch", "seconds", "skipped")  # of a line of metrics.jsonl: not for TensorBoard


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
    """The folder of one run and the progress bar: config.json, metrics.jsonl, adapter.safetensors (the last),
    best.safetensors (the best by `config.best_by`), loss.png.
    """

    def __init__(self, config: TrainConfig, task: Task, total: int) -> None:
        self.config, self.task = config, task
        self.folder = fresh(Path(config.output_dir) / run_name(config, datetime.now()))
        self.folder.mkdir(parents=True)
        (self.folder / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
        self.metrics = (self.folder / METRICS_NAME).open("a", encoding="utf-8")
        self.bar = tqdm(total=total, unit="step", disable=None, dynamic_ncols=True)
        self.started = self.logged = time.perf_counter()
        self.images = 0
        self.last: dict[str, Any] = {}
        self.last_note = ""
        self.best = Best(config.best_by)
        self.board = summary_writer()(self.folder) if config.tensorboard else None

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
        """Log it, and keep the adapter if it is the best so far (none is kept before the first step)."""
        self._write({"step": step, "epoch": epoch, **{f"val_{key}": round(value, 6) for key, value in scores.items()}})
        figures = ", ".join(f"{key.replace('_', ' ')} {shown(key, value)}" for key, value in scores.items())
        self.bar.write(f"{f'step {step}' if step else 'before training'}: validation {figures}")
        self.last = {f"val_{key}": value for key, value in scores.items()}
        if self.best.better(step, scores) and step:
            self._save(self.folder / BEST_NAME, step)
        self.logged, self.images = time.perf_counter(), 0

    def save(self, step: int, finished: bool, merge_drift: dict[str, float] | None = None) -> Path:
        return self._save(self.folder / adapter.FILE_NAME, step, merge_drift, finished=finished)

    def _save(self, path: Path, step: int, merge_drift: dict[str, float] | None = None, **about: Any) -> Path:
        summary = {"steps": step, **about, **self.last, "settings": asdict(self.config)}
        return adapter.save(
            path, self.task.backbone, task=self.task.metadata(), training=summary, merge_drift=merge_drift, overwrite=True
        )

    def best_line(self) -> str:
        """Which step was the best, and where its adapter is; "" when nothing was validated."""
        value = abs(self.best.rank[0])
        if not math.isfinite(value):
            return ""
        what = f"best {self.best.by.replace('_', ' ')}, {shown(self.best.by, value)}"
        return (
            f"{what}, after step {self.best.step}: {self.folder / BEST_NAME}" if self.best.step else f"{what}, before training"
        )

    def close(self) -> None:
        self.bar.close()
        self.metrics.close()
        if self.board:
            self.board.close()

    def _write(self, entry: dict[str, Any]) -> None:
        """A line of metrics.jsonl; JSON has no NaN and no infinity, so these are null."""
        entry = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
        if self.board:
            for key in (key for key, value in entry.items() if key not in NO_SCALARS and value is not None):
                self.board.add_scalar(key, entry[key], entry["step"])
        self.metrics.write(json.dumps(entry) + "\n")
        self.metrics.flush()


@dataclass
class Best:
    """The best validation so far by one score; of equal scores the one of lower loss."""

    by: str  # "loss", or a score of which more is better
    step: int = 0
    stale: int = 0  # validations since
    rank: tuple[float, float] = (-math.inf, -math.inf)

    def better(self, step: int, scores: dict[str, float]) -> bool:
        """Take note of a validation; a score that is no number is never better."""
        value = -scores["loss"] if self.by == "loss" else scores[self.by]
        rank = (value, -scores["loss"])
        if rank > self.rank:
            self.step, self.stale, self.rank = step, 0, rank
            return True
        self.stale += 1
        return False


def shown(key: str, value: float) -> str:
    """A loss in digits, a share in per cent."""
    return f"{value:.4f}" if key == "loss" or not 0 <= value <= 1 else f"{value:.1%}"


def summary_writer() -> Any:
    """The class of TensorBoard's writers (extra: tensorboard). Raises ConfigError when it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "tensorboard = True, and TensorBoard is not installed: pip install 'lora_blip[tensorboard]', or set it to False"
        ) from None
    return SummaryWriter


def fresh(path: Path) -> Path:
    """The path, or if that is taken the same with a number: two runs in one second get names of their own."""
    names = (path, *(path.with_name(f"{path.name}_{number}") for number in range(2, 1000)))
    return next(name for name in names if not name.exists())
