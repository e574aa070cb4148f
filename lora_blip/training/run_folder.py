"""The folder of a training run, with settings, metrics, adapter and checkpoints, and its progress on the terminal."""

import errno
import json
import math
import os
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm  # comes with transformers

from lora_blip.config import TrainConfig
from lora_blip.errors import AdapterError, CheckpointError, ConfigError
from lora_blip.lora import adapter_file
from lora_blip.runtime import lock
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.files import FULL, make_whole, room_for, sweep, unused_path, write_whole
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, METRICS_NAME
from lora_blip.runtime.untrusted import printable
from lora_blip.training import checkpoint
from lora_blip.training.best import Best, shown
from lora_blip.training.checkpoint import Saved
from lora_blip.training.learner import Learner, Update
from lora_blip.training.tensorboard import summary_writer

INTACT = (  # after the error of a full disk
    ". The existing checkpoints are intact: free some space, then start again with the same settings to resume from the newest"
)
NO_SCALARS = ("step", "epoch", "seconds", "skipped")  # of a line of metrics.jsonl: not for TensorBoard


def run_name(config: TrainConfig, now: datetime) -> str:
    """`lora_bs2_ep4_lr0.0001_r16_a32_20260607_161536`"""
    return f"lora_bs{config.batch_size}_ep{config.epochs}_lr{config.lr:g}_r{config.r}_a{config.alpha:g}_{now:%Y%m%d_%H%M%S}"


class Run:
    """The folder of one run, and the progress bar.

    The folder contains config.json, metrics.jsonl, adapter.safetensors (the last), best.safetensors (the best by
    `config.best_by`), loss.png, and during the run checkpoints/. `saved` is the checkpoint of an interrupted run, which
    continues in its folder. Only the main rank writes. Raise LockedError if another process writes into the folder.
    """

    def __init__(
        self, config: TrainConfig, learner: Learner, about: dict[str, Any], held: ExitStack, saved: Saved | None = None
    ) -> None:
        self.config, self.learner, self.identity, self.main = config, learner, about, learner.ranks.main
        self.best = Best(config.best_by, min_improvement=config.min_improvement)
        self.images = 0
        self.last: dict[str, Any] = {}
        self.last_note = ""
        self.board: Any = None
        self.closing = ExitStack()
        now = time.perf_counter()
        self.started = self.logged = self.checkpointed = now
        self.folder = saved.run if saved else unused_path(Path(config.output_dir) / run_name(config, datetime.now()))
        self.bar = tqdm(
            total=learner.progress.total, initial=learner.progress.step, unit="step", disable=None if self.main else True,
            dynamic_ncols=True,
        )  # fmt: skip
        if saved:
            self._remember(saved.about["run"])
        learner.ranks.on_main(lambda: self._open(saved, held))
        self.folder = learner.ranks.broadcast(self.folder)

    def _remember(self, about: dict[str, Any]) -> None:
        """Restore the best score, on every rank, because all ranks decide when to stop."""
        self.last, best = about["last"], about["best"]
        if best["by"] == self.best.by:  # otherwise the earlier scores cannot be compared
            rank = (best["rank"][0], best["rank"][1])
            improved, reached = best.get("improved", best["step"]), best.get("reached", rank[0])  # older checkpoints lack these
            self.best = Best(best["by"], best["step"], best["stale"], rank, self.config.min_improvement, improved, reached)

    def _open(self, saved: Saved | None, held: ExitStack) -> None:
        with room_for(self.folder, CheckpointError, INTACT):
            self._fill(saved, held)

    def _fill(self, saved: Saved | None, held: ExitStack) -> None:
        if not saved:
            self._make()
            held.enter_context(lock.held(self.folder))
        metrics = self.folder / METRICS_NAME
        if saved:
            self._take_up(saved, metrics)
            write_whole(self.folder / "config.json", self._settings())
        self.metrics = self.closing.enter_context(metrics.open("ab", buffering=0))
        if self.config.tensorboard:
            purge = self.learner.progress.step + 1 if saved else None
            self.board = attempt("TensorBoard", lambda: summary_writer()(self.folder, purge_step=purge))
            self.closing.callback(attempt, "whole TensorBoard file", lambda: self.board and self.board.close())

    def _make(self) -> None:
        """Create the folder with its first checkpoint in it, so that an existing folder can always be resumed."""
        while True:
            try:
                make_whole(self.folder, self._begin)
                return
            except OSError as error:
                if error.errno in FULL:
                    raise
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not os.path.lexists(self.folder):
                    raise ConfigError(
                        f"output_dir = {self.config.output_dir!r}: {error.strerror or error}; give a folder that can be written"
                    ) from None
                self.folder = unused_path(self.folder)  # another run started in the same second

    def _begin(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(self._settings())
        (folder / METRICS_NAME).touch()
        self._keep(folder, 0)

    def _settings(self) -> bytes:
        return (json.dumps(asdict(self.config), indent=1) + "\n").encode()

    def _take_up(self, saved: Saved, metrics: Path) -> None:
        """Restore the files of the checkpoint. What was written after it is removed, and is written again."""
        about = saved.about["run"]
        sweep(self.folder)
        metrics.touch()
        if metrics.stat().st_size < about["metrics"]:
            print(printable(f"warning: lines of {metrics} are gone since the checkpoint was made"))
        os.truncate(metrics, min(about["metrics"], metrics.stat().st_size))
        self.started -= about["seconds"]
        kept = saved.folder / checkpoint.BEST
        if kept.exists():
            write_whole(self.folder / BEST_NAME, kept.read_bytes())
        else:
            (self.folder / BEST_NAME).unlink(missing_ok=True)  # it was written after the checkpoint, and will be written again

    def log_step(self, step: int, epoch: int, update: Update, rate: float, images: int) -> None:
        self.images += images
        self.bar.update(1)
        if not self.main or (step % self.config.log_every and step != self.bar.total and step != 1):
            return
        now = time.perf_counter()
        entry = {
            "step": step, "epoch": epoch, "loss": digits(update.loss), "lr": rate,
            "grad_norm": digits(update.grad_norm), "images_per_s": round(self.images / (now - self.logged), 2),
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
        if self.main:
            self._write({"step": step, "epoch": epoch, "skipped": note, "loss_scale": update.scale})
            self.bar.write(printable(f"after step {step}, one was skipped: {note}"))

    def log_validation(self, step: int, epoch: int, scores: dict[str, float]) -> None:
        """Log the scores, and save the adapter if it is the best (not before the first step)."""
        better = self.best.better(step, scores)
        self.last = {f"val_{key}": value for key, value in scores.items()}
        self.logged, self.images = time.perf_counter(), 0
        if not self.main:
            return
        self._write({"step": step, "epoch": epoch, **{f"val_{key}": round(value, 6) for key, value in scores.items()}})
        figures = ", ".join(f"{key.replace('_', ' ')} {shown(key, value)}" for key, value in scores.items())
        self.bar.write(f"{f'step {step}' if step else 'before training'}: validation {figures}")
        if better and step:
            self._save(self.folder / BEST_NAME, step)

    @property
    def adapter_path(self) -> Path:
        return self.folder / ADAPTER_NAME

    def save(self, step: int, finished: bool, merge_drift: dict[str, float] | None = None) -> Path:
        path = self.adapter_path
        return self._save(path, step, merge_drift, finished=finished) if self.main else path

    def save_unfinished(self) -> None:
        """Save the current adapter, so that the user can try it, and print how to resume the run."""
        step, total = self.learner.progress.step, self.learner.progress.total
        saved = ""
        if step:
            try:
                saved = f" its adapter so far is {self.save(step, finished=False)};"
            except AdapterError as error:  # B is zero, or a value is NaN
                saved = f" its adapter is not saved: {error};"
        with suppress(OSError):  # a terminal that is gone
            print(
                "\n" + printable(f"stopped after {step} of {total} steps;{saved} start again with the same settings to resume")
            )

    def line(self, training: int, validation: int, precision: str) -> str:
        """Return one line with the folder, the number of steps and the data."""
        learner, progress = self.learner, self.learner.progress
        doing = f"after step {progress.step}, the rest of " if progress.step or progress.slot else ""
        lines = f"{training} lines to train on, {validation} held out"
        ranks = f", {learner.ranks.count} processes, {learner.traffic / 1e6:.2f} MB of gradients sent by each a step"
        among = ranks if learner.ranks.count > 1 else ""
        return f"{printable(self.folder)}: {doing}{progress.total} steps of {precision}, {lines}{among}"

    def _save(self, path: Path, step: int, merge_drift: dict[str, float] | None = None, **about: Any) -> Path:
        summary = {"steps": step, **about, **self.last, "settings": asdict(self.config)}
        task = self.learner.task
        with room_for(self.folder, CheckpointError, INTACT):
            return adapter_file.save(
                path, task.backbone, task=task.metadata(), training=summary, merge_drift=merge_drift, overwrite=True
            )

    # ---------------------------------------------------------------- checkpoints

    @property
    def due(self) -> bool:
        """Return True if it is time for a checkpoint, by the clock of the main rank."""
        return self.main and time.perf_counter() - self.checkpointed >= self.config.checkpoint_seconds

    def checkpoint(self) -> None:
        """Write a checkpoint. Raise CheckpointError if the disk is full; the older checkpoints are then intact."""
        if not self.main:
            self.learner.state_dict()  # it gathers tensors from all ranks
            return
        with room_for(self.folder, CheckpointError, INTACT):
            os.fsync(self.metrics.fileno())
            self._keep(self.folder, os.fstat(self.metrics.fileno()).st_size)

    def _keep(self, folder: Path, metrics: int) -> None:
        """Write a checkpoint into a folder. It includes the first `metrics` bytes of metrics.jsonl."""
        tensors, about = self.learner.state_dict()
        self.checkpointed = time.perf_counter()
        about["identity"] = self.identity
        seconds = self.checkpointed - self.started
        about["run"] = {
            "name": self.folder.name,
            "metrics": metrics,
            "seconds": seconds,
            "last": self.last,
            "best": asdict(self.best),
        }
        step = self.learner.progress.step
        checkpoint.write(folder, step, tensors, about, folder / BEST_NAME, self.config.keep_checkpoints)

    def done(self) -> None:
        """Remove the checkpoints of a finished run."""
        if self.main:
            with (self.folder / METRICS_NAME).open("rb") as metrics:
                os.fsync(metrics.fileno())
            checkpoint.forget(self.folder)

    def best_line(self) -> str:
        """Return a line with the best step and the path of its adapter; "" if nothing was validated."""
        value = abs(self.best.rank[0])
        if not math.isfinite(value):
            return ""
        what = f"best {self.best.by.replace('_', ' ')}, {shown(self.best.by, value)}"
        kept = f"{what}, after step {self.best.step}: {self.folder / BEST_NAME}"
        return printable(kept) if self.best.step else f"{what}, before training"

    def close(self) -> None:
        self.bar.close()
        self.closing.close()

    def _track(self, entry: dict[str, Any]) -> bool:
        """Write the numbers of a line to TensorBoard."""
        for key in (key for key, value in entry.items() if key not in NO_SCALARS and value is not None):
            self.board.add_scalar(key, entry[key], entry["step"])
        return True

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl. JSON has no NaN and no infinity, so these are null."""
        entry = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
        if self.board and attempt("TensorBoard from here on", lambda: self._track(entry)) is None:
            self.board = None
        with room_for(self.folder, CheckpointError, INTACT):
            line = (json.dumps(entry) + "\n").encode()
            if self.metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def digits(value: float) -> float:
    """Round to 8 significant digits, as many as float32 has."""
    return float(f"{value:.8g}")
