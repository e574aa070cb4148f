"""Write the folder of a training run (settings, metrics, adapters, checkpoints) and print its progress."""

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
from lora_blip.data.source_digest import source_digest
from lora_blip.data.splits import RULES
from lora_blip.errors import AdapterError, CheckpointError, ConfigError
from lora_blip.kernels import paths
from lora_blip.lora import adapter_file
from lora_blip.metrics.names import named_score
from lora_blip.runtime import lock
from lora_blip.runtime.command_line import this_command
from lora_blip.runtime.counts import counted, rounded
from lora_blip.runtime.extras import attempt
from lora_blip.runtime.files import FULL, make_whole, open_to_append, room_for, sweep, unused_path, write_new, write_whole
from lora_blip.runtime.progress import phase, remaining_time
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, METRICS_NAME, run_name
from lora_blip.runtime.settings import stored_settings
from lora_blip.runtime.system_errors import sync, writing
from lora_blip.runtime.untrusted import os_error_reason, printable
from lora_blip.training import checkpoint
from lora_blip.training.best import Best, scores_differ
from lora_blip.training.checkpoint import Saved
from lora_blip.training.learner import Learner, Update
from lora_blip.training.tensorboard import summary_writer

# the end of the message about a full disk
INTACT = ". The existing checkpoints are intact: {first}start again with the same settings to resume from the newest"
NO_SCALARS = ("step", "epoch", "seconds", "skipped")  # entries of metrics.jsonl that TensorBoard does not show


class Run:
    """The folder of one run, and its progress bar.

    The folder contains config.json, metrics.jsonl, adapter.safetensors (the last adapter), best.safetensors (the adapter with
    the best score `config.best_by`) and loss.png. During the run, it also contains checkpoints/. Only the main process writes.
    """

    def __init__(
        self, config: TrainConfig, learner: Learner, identity: dict[str, Any], closing: ExitStack, saved: Saved | None = None
    ) -> None:
        """Create the folder of a new run. If the checkpoint `saved` is given, use the folder of its run instead.

        The folder is locked until `closing` is closed. Raise LockedError if another process writes into it.
        """
        self.config, self.learner, self.identity, self.main = config, learner, identity, learner.ranks.main
        self.best = Best(config.best_by, min_improvement=config.min_improvement)
        self.images, self.earlier = 0, learner.progress.step  # images since the last logged step; steps of earlier processes
        self.last_scores: dict[str, Any] = {}  # scores of the last validation, and its step
        self.data_digest = source_digest(config.annotations) if self.main else ""
        self.data_changed = False  # True: before a resume, the run had other training lines
        self.rescored = False  # True: scores from before a resume cannot be compared with the current ones
        self.last_skip = self.figures = ""  # reason of the last skipped step; figures of the last logged step
        self.board: Any = None  # TensorBoard's SummaryWriter
        self.closing = ExitStack()
        self.opened = self.started = self.logged = self.checkpointed = time.perf_counter()
        name = run_name(config.task, config.model, config.targets, datetime.now())
        self.folder = saved.run if saved else unused_path(Path(config.output_dir) / name)
        self.bar = tqdm(
            total=learner.progress.total, initial=learner.progress.step, unit="step", disable=None if self.main else True,
            dynamic_ncols=True,
        )  # fmt: skip
        self.closing.enter_context(phase(self.state))
        if saved:
            earlier, state = saved.state.get("identity", {}), saved.state["run"]
            same = earlier.get("training lines") == identity["training lines"]
            self.data_changed = state.get("data_changed", False) or not same
            self.keeps_best = not scores_differ(earlier, identity)
            self.rescored = state.get("rescored", False) or not self.keeps_best
            if self.keeps_best:  # on every process: each one decides when `patience` is exhausted
                self.last_scores, self.best = state["last"], Best.restored(state["best"], config.min_improvement)
        learner.ranks.on_main(lambda: self._open(saved, closing))
        self.folder = learner.ranks.broadcast(self.folder)

    def _open(self, saved: Saved | None, closing: ExitStack) -> None:
        """Create or restore the folder, lock it, and open metrics.jsonl and TensorBoard."""
        with room_for(self.folder, CheckpointError, INTACT):
            if saved:  # `resume.acquire` holds the lock
                with writing(self.folder):
                    self._restore_files(saved)
                write_whole(self.folder / "config.json", self._settings())
            else:
                self._create_folder()
                closing.enter_context(lock.held(self.folder))
            self.metrics = self.closing.enter_context(open_to_append(self.folder / METRICS_NAME))
            if self.config.tensorboard:
                # TensorBoard removes earlier entries whose step is `next_step` or later
                next_step = self.learner.progress.step + 1 if saved else None
                self.board = attempt("TensorBoard", lambda: summary_writer()(self.folder, purge_step=next_step))
                self.closing.callback(attempt, "complete TensorBoard file", lambda: self.board and self.board.close())

    def _create_folder(self) -> None:
        """Create the folder with its first checkpoint, so that every folder of a run can be resumed."""
        while True:
            try:
                return make_whole(self.folder, self._fill_folder)
            except OSError as error:
                if error.errno in FULL:
                    raise
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not os.path.lexists(self.folder):
                    raise ConfigError(
                        f"output_dir = {self.config.output_dir!r}: {error.strerror or error}; give a folder that can be "
                        "written, such as --output-dir runs"
                    ) from None
                self.folder = unused_path(self.folder)  # another run started in the same second

    def _fill_folder(self, folder: Path) -> None:
        for name, content in ((METRICS_NAME, b""), ("config.json", self._settings()), (paths.NAME, paths.table(paths.row()))):
            write_new(folder / name, content)
        self._write_checkpoint(folder, 0)

    def _settings(self) -> bytes:
        return (json.dumps(asdict(self.config), indent=1) + "\n").encode()

    def _restore_files(self, saved: Saved) -> None:
        """Restore metrics.jsonl and best.safetensors to their state at the checkpoint. The run writes later lines again."""
        state, metrics = saved.state["run"], self.folder / METRICS_NAME
        sweep(self.folder)
        metrics.touch()
        if metrics.stat().st_size < state["metrics"]:
            print(printable(f"warning: {metrics} is shorter than it was at the checkpoint; its removed lines are lost"))
        os.truncate(metrics, min(state["metrics"], metrics.stat().st_size))
        self.started -= state["seconds"]
        best = saved.folder / checkpoint.BEST
        if best.exists() and self.keeps_best:
            write_whole(self.folder / BEST_NAME, best.read_bytes())
        else:
            (self.folder / BEST_NAME).unlink(missing_ok=True)  # written after the checkpoint

    # ---------------------------------------------------------------- metrics

    def state(self) -> str:
        """Return the last step and its figures. `phase` prints them if nothing else is printed for a while."""
        progress = self.learner.progress
        return f"step {progress.step:,} of {progress.total:,}" + f", {self.figures}" * bool(self.figures)

    def log_step(self, step: int, epoch: int, update: Update, rate: float, images: int) -> None:
        """Advance the progress bar. Every `log_every` steps, write a line of metrics.jsonl."""
        self.images += images
        self.bar.update(1)
        if not self.main or (step % self.config.log_every and step not in (1, self.bar.total)):
            return
        now = time.perf_counter()
        entry = {
            "step": step, "epoch": epoch, "loss": rounded(update.loss), "lr": rate,
            "grad_norm": rounded(update.grad_norm), "images_per_s": round(self.images / (now - self.logged), 2),
            "seconds": round(now - self.started, 3),
        }  # fmt: skip
        if update.scale != 1:
            entry["loss_scale"] = update.scale
        self.images, self.logged = 0, now
        self._write(entry)
        self.bar.set_postfix_str(figures := f"loss {update.loss:.4f}, lr {rate:.1e}, {entry['images_per_s']:.1f} images/s")
        done = step - self.earlier - self.config.compile  # in this process, without the step that compiles
        self.figures = figures + remaining_time(now - self.opened, done, self.bar.total - step)
        if self.bar.disable and (step % (10 * self.config.log_every) == 0 or step in (1, self.bar.total)):
            print(f"step {step}/{self.bar.total}  {self.figures}")

    def log_skip(self, step: int, epoch: int, update: Update, reason: str) -> None:
        """Write and print the reason for a skipped step. step: the number of updates before it."""
        self.last_skip = reason
        if self.main:
            self._write({"step": step, "epoch": epoch, "skipped": reason, "loss_scale": update.scale})
            self.bar.write(printable(f"the step after step {step} was skipped: {reason}"))

    def log_validation(self, step: int, epoch: int, scores: dict[str, float]) -> None:
        """Write and print the scores. Save the adapter if it is the best so far, but not before the first step."""
        is_best = self.best.record(step, scores)
        self.last_scores = {"step": step} | {f"val_{key}": value for key, value in scores.items()}
        self.logged, self.images = time.perf_counter(), 0
        if not self.main:
            return
        self._write({"step": step, "epoch": epoch, **{f"val_{key}": round(value, 6) for key, value in scores.items()}})
        texts = ", ".join(named_score(key, value) for key, value in scores.items())
        self.bar.write(f"{f'step {step}' if step else 'before training'}: validation {texts}")
        if is_best and step:
            self._save(self.folder / BEST_NAME, step)

    def _write(self, entry: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and write it to TensorBoard. Write NaN and infinity as null, as JSON has neither."""
        entry = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
        if self.board and attempt("TensorBoard from here on", lambda: self._write_scalars(entry)) is None:
            self.board = None
        with room_for(self.folder, CheckpointError, INTACT), writing(self.folder / METRICS_NAME):
            line = (json.dumps(entry) + "\n").encode()
            if self.metrics.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_scalars(self, entry: dict[str, Any]) -> bool:
        for key in (key for key, value in entry.items() if key not in NO_SCALARS and value is not None):
            self.board.add_scalar(key, entry[key], entry["step"])
        return True

    # ---------------------------------------------------------------- adapters

    @property
    def adapter_path(self) -> Path:
        return self.folder / ADAPTER_NAME

    def save(self, step: int, finished: bool, merge_drift: dict[str, float] | None = None) -> Path:
        """Save the current adapter as adapter.safetensors and return its path."""
        return self._save(self.adapter_path, step, merge_drift, finished=finished) if self.main else self.adapter_path

    def save_unfinished(self) -> None:
        """Save the current adapter so that the user can test it, and print how to resume the run."""
        progress, result = self.learner.progress, ""
        if progress.step:
            try:
                result = f" the current adapter is {self.save(progress.step, finished=False)};"
            except AdapterError as error:  # B is zero, or a value is NaN
                result = f" the current adapter is not saved: {error};"
        initial = ["--init-adapter", self.config.init_adapter] if self.config.init_adapter else []  # the path of "latest"
        command = this_command(without=["--resume", *initial[:1]], added=[*initial, "--resume", str(self.folder)])
        how = f"to resume: {command}" if command else "start again with the same settings to resume"
        if progress.fails(self.config.max_skipped, self.config.epochs):
            how = "a resumed run would stop in the same way"
        with suppress(OSError):  # the terminal may be closed
            print("\n" + printable(f"stopped after step {progress.step} of {progress.total};{result} {how}"))

    def _save(self, path: Path, step: int, merge_drift: dict[str, float] | None = None, **extra: Any) -> Path:
        is_validated = self.last_scores.get("step", step) == step  # older checkpoints lack the step
        scores = {key: value for key, value in self.last_scores.items() if is_validated and key != "step"}
        summary = {"steps": step, **extra, **scores, "settings": stored_settings(self.config), "data_rules": RULES}
        summary |= {"data_digest": self.data_digest} | ({"data_changed": True} if self.data_changed else {})
        if source := self.identity.get("init_adapter"):
            summary["init_adapter"] = {"path": self.config.init_adapter, "sha256": source}
        task = self.learner.task
        with room_for(self.folder, CheckpointError, INTACT):
            return adapter_file.save(
                path, task.backbone, task=task.metadata(), training=summary, merge_drift=merge_drift, overwrite=True
            )

    # ---------------------------------------------------------------- checkpoints

    @property
    def checkpoint_is_due(self) -> bool:
        """Return True if `checkpoint_seconds` have passed since the last checkpoint, by the clock of the main process."""
        return self.main and time.perf_counter() - self.checkpointed >= self.config.checkpoint_seconds

    def checkpoint(self) -> None:
        """Write a checkpoint. Raise CheckpointError if the disk is full; the older checkpoints are then unchanged."""
        if not self.main:
            self.learner.state_dict()  # a collective: the main process gathers the gradients of all processes
            return
        with room_for(self.folder, CheckpointError, INTACT), writing(self.folder):
            sync(self.metrics.fileno())
            self._write_checkpoint(self.folder, os.fstat(self.metrics.fileno()).st_size)

    def _write_checkpoint(self, folder: Path, metrics: int) -> None:
        """Write a checkpoint into a folder. It includes the first `metrics` bytes of metrics.jsonl."""
        tensors, state = self.learner.state_dict()
        self.checkpointed = time.perf_counter()
        state["identity"] = self.identity
        state["run"] = {
            "name": self.folder.name, "metrics": metrics, "seconds": self.checkpointed - self.started,
            "last": self.last_scores, "best": asdict(self.best), "data_changed": self.data_changed,
            "rescored": self.rescored,
        }  # fmt: skip
        checkpoint.write(folder, self.learner.progress.step, tensors, state, folder / BEST_NAME, self.config.keep_checkpoints)

    def delete_checkpoints(self) -> None:
        """Sync metrics.jsonl to the disk, then remove the checkpoints of a finished run."""
        if self.main:
            try:
                with (self.folder / METRICS_NAME).open("rb") as metrics:
                    sync(metrics.fileno())
                checkpoint.delete_all(self.folder)
            except OSError as error:  # the run is complete
                folder = self.folder / checkpoint.FOLDER
                print(
                    printable(f"warning: the checkpoints cannot be removed: {os_error_reason(error)}; remove {folder} yourself")
                )

    # ---------------------------------------------------------------- lines for the terminal

    def summary_line(self, training: int, validation: int, precision: str) -> str:
        """Return one line with the folder, the number of steps, and the numbers of training and validation lines."""
        learner, progress = self.learner, self.learner.progress
        resumed = f", resumed after step {progress.step}" if progress.step or progress.slot else ""
        lines = f"{counted(training, 'training line')}, {counted(validation, 'validation line')}"
        if learner.ranks.count > 1:
            lines += f"; {learner.ranks.count} processes, each sends {learner.traffic / 1e6:.2f} MB of gradients per step"
        return f"{printable(self.folder)}: {counted(progress.total, 'step')} in {precision}{resumed}; {lines}"

    def close(self) -> None:
        """Close the progress bar and the files."""
        self.bar.close()
        self.closing.close()
