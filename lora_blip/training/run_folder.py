"""What a training run leaves behind: its folder with settings, metrics and adapter, and its progress on the terminal."""

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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
from lora_blip.runtime.files import FULL, make_whole, sweep, unused_path, write_whole
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, METRICS_NAME
from lora_blip.runtime.untrusted import printable
from lora_blip.training import checkpoint
from lora_blip.training.best import Best, shown
from lora_blip.training.checkpoint import Saved
from lora_blip.training.learner import Learner, Update
from lora_blip.training.tensorboard import summary_writer

NO_SCALARS = ("step", "epoch", "seconds", "skipped")  # of a line of metrics.jsonl: not for TensorBoard


def run_name(config: TrainConfig, now: datetime) -> str:
    """`lora_bs2_ep4_lr0.0001_r16_a32_20260607_161536`"""
    return f"lora_bs{config.batch_size}_ep{config.epochs}_lr{config.lr:g}_r{config.r}_a{config.alpha:g}_{now:%Y%m%d_%H%M%S}"


class Run:
    """The folder of one run and the progress bar: config.json, metrics.jsonl, adapter.safetensors (the last),
    best.safetensors (the best by `config.best_by`), loss.png, and while it goes on checkpoints/.

    `saved`: the checkpoint of an interrupted run, whose folder is gone on with. Of several ranks only the main one
    writes; the others keep count. Raises LockedError if another process writes into the folder.
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
        """On every rank, since all decide together when to stop."""
        self.last, best = about["last"], about["best"]
        if best["by"] == self.best.by:  # else the scores of before are of another kind
            rank = (best["rank"][0], best["rank"][1])
            improved, reached = best.get("improved", best["step"]), best.get("reached", rank[0])  # older checkpoints lack these
            self.best = Best(best["by"], best["step"], best["stale"], rank, self.config.min_improvement, improved, reached)

    def _open(self, saved: Saved | None, held: ExitStack) -> None:
        with room_for(self.folder):
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
        """The folder with its first checkpoint in it: one that is there can be gone on with."""
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
                self.folder = unused_path(self.folder)  # another run began in the same second

    def _begin(self, folder: Path) -> None:
        (folder / "config.json").write_bytes(self._settings())
        (folder / METRICS_NAME).touch()
        self._keep(folder, 0)

    def _settings(self) -> bytes:
        return (json.dumps(asdict(self.config), indent=1) + "\n").encode()

    def _take_up(self, saved: Saved, metrics: Path) -> None:
        """Everything as it was at the checkpoint; what came after it is made again."""
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
            (self.folder / BEST_NAME).unlink(missing_ok=True)  # it came after the checkpoint, and comes again

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
        """Log it, and keep the adapter if it is the best so far (none is kept before the first step)."""
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
        """The adapter as it is, to try out; the run goes on from its checkpoint."""
        step, total = self.learner.progress.step, self.learner.progress.total
        saved = ""
        if step:
            try:
                saved = f" its adapter so far is {self.save(step, finished=False)};"
            except AdapterError as error:  # one that says nothing, or NaN
                saved = f" its adapter is not saved: {error};"
        with suppress(OSError):  # a terminal that is gone
            print("\n" + printable(f"stopped after {step} of {total} steps;{saved} the same settings again go on with it"))

    def line(self, training: int, validation: int, precision: str) -> str:
        """One line of what is going to be done."""
        learner, progress = self.learner, self.learner.progress
        doing = f"after step {progress.step}, the rest of " if progress.step or progress.slot else ""
        lines = f"{training} lines to train on, {validation} held out"
        ranks = f", {learner.ranks.count} processes, {learner.traffic / 1e6:.2f} MB of gradients sent by each a step"
        among = ranks if learner.ranks.count > 1 else ""
        return f"{printable(self.folder)}: {doing}{progress.total} steps of {precision}, {lines}{among}"

    def _save(self, path: Path, step: int, merge_drift: dict[str, float] | None = None, **about: Any) -> Path:
        summary = {"steps": step, **about, **self.last, "settings": asdict(self.config)}
        task = self.learner.task
        with room_for(self.folder):
            return adapter_file.save(
                path, task.backbone, task=task.metadata(), training=summary, merge_drift=merge_drift, overwrite=True
            )

    # ---------------------------------------------------------------- checkpoints

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint, by the main rank's clock."""
        return self.main and time.perf_counter() - self.checkpointed >= self.config.checkpoint_seconds

    def checkpoint(self) -> None:
        """Keep all that the run is at this moment. Raises CheckpointError on a full disk, with the older ones whole."""
        if not self.main:
            self.learner.state_dict()  # in which the ranks meet
            return
        with room_for(self.folder):
            os.fsync(self.metrics.fileno())
            self._keep(self.folder, os.fstat(self.metrics.fileno()).st_size)

    def _keep(self, folder: Path, metrics: int) -> None:
        """A checkpoint in a folder, of which `metrics` bytes of metrics.jsonl are part."""
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
        """The run is finished, and is never gone on with."""
        if self.main:
            with (self.folder / METRICS_NAME).open("rb") as metrics:
                os.fsync(metrics.fileno())
            checkpoint.forget(self.folder)

    def best_line(self) -> str:
        """Which step was the best, and where its adapter is; "" when nothing was validated."""
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
        """Hand the numbers of a line to TensorBoard."""
        for key in (key for key, value in entry.items() if key not in NO_SCALARS and value is not None):
            self.board.add_scalar(key, entry[key], entry["step"])
        return True

    def _write(self, entry: dict[str, Any]) -> None:
        """A line of metrics.jsonl; JSON has no NaN and no infinity, so these are null."""
        entry = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
        if self.board and attempt("TensorBoard from here on", lambda: self._track(entry)) is None:
            self.board = None
        with room_for(self.folder):
            line = (json.dumps(entry) + "\n").encode()
            if self.metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """A disk that is full, or a quota that is reached, becomes an error that says what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CheckpointError(
            f"no room left to write in {folder} ({error.strerror}). Checkpoints that are there already are whole: free some "
            "space, then start again with the same settings, to go on from the newest"
        ) from None


def digits(value: float) -> float:
    """As many as float32 has."""
    return float(f"{value:.8g}")
