"""Test resuming: N + M steps == N steps, SIGKILL at any point, resume, M steps, bit for bit."""

import errno
import hashlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.robustness import chaos
from lora_blip.config import TrainConfig
from lora_blip.data.example import Example
from lora_blip.errors import CheckpointError, ConfigError, LockedError, TrainingError
from lora_blip.kernels import paths
from lora_blip.lora import adapter_file
from lora_blip.models import identity
from lora_blip.models.identity import weights_digest
from lora_blip.models.language import Language
from lora_blip.models.packing import PackedRows
from lora_blip.runtime import lock, signals
from lora_blip.runtime.files import make_whole
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME
from lora_blip.tasks.text_task import TextTask
from lora_blip.training import checkpoint, learner, loop, resume, session
from lora_blip.training.checkpoint import STATE, TENSORS
from lora_blip.training.learner import Learner
from lora_blip.training.loop import train
from lora_blip.training.loss_scale import LossScaler
from lora_blip.training.run_folder import Run
from lora_blip.training.session import Session
from tests.support.kill import Killed, killed_at, nothing
from tests.support.models import WHOLE
from tests.support.runs import (
    assert_same,
    before_each_step,
    config_of,
    elsewhere,
    lines,
    metrics_of,
    only_run,
    score,
)

# ---------------------------------------------------------------- exactly


@pytest.mark.parametrize(
    ("kind", "precision", "deaths"),
    [
        ("blip", "fp32", (1, 1, 2, 3, 4, 7)),
        pytest.param("blip", "bf16", (5, 6), marks=pytest.mark.slow),
        pytest.param("blip", "fp16", (2, 8), marks=pytest.mark.slow),
        pytest.param("opt", "fp32", (9, 2), marks=pytest.mark.slow),
        pytest.param("t5", "bf16", (4, 1), marks=pytest.mark.slow),
        pytest.param("vqa", "fp32", (8, 3), marks=pytest.mark.slow),
        ("itm", "fp32", (3, 5)),
    ],
)
def test_a_run_that_is_killed_several_times_equals_an_uninterrupted_run(checkpoints, tmp_path, kind, precision, deaths):
    """Law 6 holds for a kill at any micro-batch, within or between steps, with dropout, augmentation and sampled negatives."""
    config = config_of(checkpoints, tmp_path, kind, precision=precision, max_skipped=40, batch_size=4 if kind == "itm" else 2)
    uninterrupted = train(config)
    again = elsewhere(config)
    for death in deaths:
        with killed_at(death):
            train(again)
    path = train(again)
    assert_same(uninterrupted, path)
    assert path.parent == only_run(again)
    assert not (path.parent / checkpoint.FOLDER).exists()  # a finished run is never resumed


@pytest.mark.parametrize(
    "kind", ["opt", pytest.param("t5", marks=pytest.mark.slow), pytest.param("blip", marks=pytest.mark.slow)]
)
def test_a_killed_run_with_several_captions_per_image_equals_an_uninterrupted_one(checkpoints, tmp_path, monkeypatch, kind):
    """Law 6 holds for packed rows, also with adapters on the text."""
    config = config_of(checkpoints, tmp_path, kind, targets=WHOLE[kind], precision="fp32")
    source, packed, real = Path(config.annotations), list[bool](), TextTask.batch
    entries = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    several = [entry | {"text": f"{entry['text']}{end}"} for entry in entries for end in ("", " on a table", " and no cube")]
    source.write_text("\n".join(map(json.dumps, several)), encoding="utf-8")

    def batch(task: Any, *rest: Any) -> Any:
        result = real(task, *rest)
        packed.append(isinstance(result.rows, PackedRows))
        return result

    monkeypatch.setattr(TextTask, "batch", batch)
    uninterrupted, again = train(config), elsewhere(config)
    for death in (2, 5):
        with killed_at(death):
            train(again)
    assert_same(uninterrupted, train(again))
    assert any(packed)


def test_a_run_that_resumes_on_another_machine_takes_the_same_fast_paths(checkpoints, tmp_path, monkeypatch, capsys):
    """The other machine has another table. Law 6 holds, because the checkpoint contains the row. A new run uses the new row."""
    config = config_of(checkpoints, tmp_path, precision="fp32")
    uninterrupted = train(config)
    again, other = elsewhere(config), replace(paths.row(), processor="other", onednn=0, onednn_narrow=0, fused=paths.NEVER)
    with killed_at(3):
        train(again)
    assert list(paths.read(only_run(again) / "paths.json").values()) == [paths.measured()]
    monkeypatch.setattr(paths, "measured", lambda: other)
    path = train(again)
    assert_same(uninterrupted, path)
    new = elsewhere(config, "new")
    assert (
        lines(train(new)) != lines(uninterrupted)
        and "fast paths for other (docs/fast_paths.md): float32 products by oneDNN, " in capsys.readouterr().out
    )
    assert list(paths.read(only_run(new) / "paths.json").values()) == [other]


def test_a_killed_run_with_generation_options_and_groups_equals_an_uninterrupted_run(checkpoints, tmp_path, monkeypatch):
    """After a resume, the same groups are held out, and validation draws the same texts."""
    texts: dict[str, list[tuple[Any, list[str]]]] = {}
    real = Language.generate_from_features

    def generate(language: Language[Any], *rows: Any, images: Any = None, **named: Any) -> list[str]:
        result = real(language, *rows, images=images, **named)
        texts.setdefault(name, []).append(([Path(image).name for image in images], result))
        return result

    monkeypatch.setattr(Language, "generate_from_features", generate)
    options = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2, "repetition_penalty": 1.2}
    config = config_of(checkpoints, tmp_path, generation=options, group_by=r"(\d)\.png", best_by="loss", val_fraction=0.3)
    name = "uninterrupted"
    uninterrupted = train(config)
    name, again = "killed", elsewhere(config)
    for death in (2, 4, 5):
        with killed_at(death):
            train(again)
    assert_same(uninterrupted, train(again))
    assert (
        texts["killed"][-1] == texts["uninterrupted"][-1] and len({text for _, drawn in texts["killed"] for text in drawn}) > 3
    )
    held_out = {image for images, _ in texts["uninterrupted"] for image in images}
    assert held_out == {image for images, _ in texts["killed"] for image in images}
    groups = {image[-5] for image in held_out}
    assert held_out == {f"{number}.png" for number in range(16) if str(number)[-1] in groups} and len(held_out) > len(groups)


def test_steps_after_the_checkpoint_are_repeated(checkpoints, tmp_path):
    """The run is killed 4 steps after its only checkpoint. After the resume, metrics.jsonl contains each line once."""
    config = config_of(checkpoints, tmp_path, validate_every=1, best_by="loss", epochs=3)
    uninterrupted = train(config)
    again = replace(elsewhere(config), checkpoint_seconds=1e9)
    with killed_at(11):
        train(again)
    run = only_run(again)
    (folder,) = (run / checkpoint.FOLDER).iterdir()
    assert folder.name.endswith("_step0") and (run / BEST_NAME).exists()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(session, "remaining_steps", raising(Killed))
        patch.setattr(Session, "rescue", nothing)
        train(again)
    assert not (run / BEST_NAME).exists()  # the run had no best adapter at the checkpoint
    assert_same(uninterrupted, train(again))


def raising(error: type[BaseException]) -> Callable[..., None]:
    def act(*_: object) -> None:
        raise error

    return act


@pytest.mark.parametrize("death", [5, 7])
def test_patience_continues_to_count_after_a_resume(checkpoints, tmp_path, monkeypatch, death):
    """A run that is killed near the first of two stale validations stops early at the same step as without the kill."""
    scores = [score(9), score(2, 0.5), score(3, 0.5), score(3, 0.5), score(1, 0.9)]
    real = Run.log_validation
    monkeypatch.setattr(Run, "log_validation", lambda run, step, epoch, _: real(run, step, epoch, scores[step]))
    config = config_of(checkpoints, tmp_path, epochs=9, validate_every=1, patience=2)
    uninterrupted = train(config)
    assert lines(uninterrupted)[-1]["step"] == 3
    with killed_at(death):
        train(elsewhere(config))
    assert_same(uninterrupted, train(elsewhere(config)))


def test_a_finished_run_is_not_resumed(checkpoints, tmp_path):
    """A second start with the same settings creates a second run. A resume of the finished run is an error."""
    config = config_of(checkpoints, tmp_path, epochs=1)
    first, second = train(config), train(config)
    assert first.parent != second.parent
    assert_same(first, second)
    with pytest.raises(CheckpointError, match="the run is finished; to train its adapter further"):
        train(replace(config, resume=str(first.parent)))


def test_resume_off_starts_a_new_run(checkpoints, tmp_path):
    config = config_of(checkpoints, tmp_path)
    with killed_at(4):
        train(config)
    train(replace(config, resume="off"))
    assert len(list(Path(config.output_dir).glob("20*"))) == 2


def test_the_newest_keep_checkpoints_checkpoints_are_kept(checkpoints, tmp_path):
    config = config_of(checkpoints, tmp_path, keep_checkpoints=3)
    with killed_at(9):
        train(config)
    folders = sorted((only_run(config) / checkpoint.FOLDER).iterdir())
    assert [folder.name.split("_")[1] for folder in folders] == ["step2", "step3", "step3"]
    assert [checkpoint.read(folder).state["progress"]["slot"] for folder in folders] == [0, 0, 1]


# ---------------------------------------------------------------- stopped by a signal


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_next_micro_batch_and_has_a_separate_exit_code(checkpoints, tmp_path, number, code):
    """The signal comes during an accumulation. The accumulated gradients are saved, and nothing is computed twice."""
    config = replace(config_of(checkpoints, tmp_path), checkpoint_seconds=1e9)
    uninterrupted = train(config)
    before = signal.getsignal(number)
    done = []
    real = loop.accumulate_gradients

    def accumulate(learner: Learner, *rest: object, **named: object) -> None:
        done.append(1)
        real(learner, *rest, **named)
        if len(done) == 5:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", accumulate)
        with pytest.raises(SystemExit) as stopped_with:
            train(elsewhere(config))
        assert stopped_with.value.code == code and len(done) == 5
        run = only_run(elsewhere(config))
        saved = checkpoint.newest(run)[0]
        assert saved is not None and (saved.state["progress"]["step"], saved.state["progress"]["slot"]) == (1, 2)
        assert any(key.startswith("gradient/0/") for key in saved.tensors())
        assert adapter_file.read(run / ADAPTER_NAME).metadata["training"]["finished"] is False
        assert_same(uninterrupted, train(elsewhere(config)))
    assert len(done) == 14  # two epochs of seven
    assert signal.getsignal(number) is before


def test_a_signal_to_the_process_group_does_not_end_the_loader_workers(checkpoints, tmp_path, capfd):
    """A scheduler sends SIGTERM to every process of the job. The run still saves its position, and resumes bit for bit."""
    config = replace(config_of(checkpoints, tmp_path), checkpoint_seconds=1e9, num_workers=2)
    uninterrupted = train(config)
    child = os.fork()
    if not child:
        os.setsid()
        real = loop.accumulate_gradients

        def accumulate(learner: Learner, *rest: object, **named: object) -> None:
            real(learner, *rest, **named)
            if (learner.progress.step, learner.progress.slot) == (3, 1):
                os.killpg(0, signal.SIGTERM)
                time.sleep(0.5)  # enough time to notice a dead worker

        loop.accumulate_gradients = accumulate
        try:
            train(elsewhere(config))
        except SystemExit as stopped_with:
            os._exit(int(stopped_with.code or 0))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == signals.SAVED, capfd.readouterr().err
    saved = checkpoint.newest(only_run(elsewhere(config)))[0]
    assert saved is not None and (saved.state["progress"]["step"], saved.state["progress"]["slot"]) == (3, 1)
    assert_same(uninterrupted, train(elsewhere(config)))


def test_a_signal_stops_a_long_validation(checkpoints, tmp_path):
    """The run stops between two batches of a validation. The validation is repeated, and has one line in metrics.jsonl."""
    config = replace(config_of(checkpoints, tmp_path), checkpoint_seconds=1e9)
    uninterrupted = train(config)
    real, calls = session.validate, []

    def validate(*arguments: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "validate", validate)
        with pytest.raises(SystemExit):
            train(elsewhere(config))
    assert_same(uninterrupted, train(elsewhere(config)))


def test_a_second_ctrl_c_stops_at_once_but_not_while_saving():
    with signals.catch_signals() as stop_request:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_request.signal == signal.SIGINT
        stop_request.saving = True
        os.kill(os.getpid(), signal.SIGINT)
        stop_request.saving = False
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# ---------------------------------------------------------------- errors


def test_after_an_error_within_a_step_the_run_resumes_at_its_start(checkpoints, tmp_path, monkeypatch):
    """The accumulated gradients are discarded. After the fix, the run ends as if there had been no error."""
    config = replace(config_of(checkpoints, tmp_path), checkpoint_seconds=1e9)
    uninterrupted = train(config)
    real, count = loop.accumulate_gradients, 0

    def accumulate(learner: Learner, *rest: object, **named: object) -> None:
        nonlocal count
        count += 1
        real(learner, *rest, **named)
        if count == 5:
            raise ZeroDivisionError("by chance")

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(loop, "accumulate_gradients", accumulate)
        train(elsewhere(config))
    saved = checkpoint.newest(only_run(elsewhere(config)))[0]
    assert saved is not None and (saved.state["progress"]["step"], saved.state["progress"]["slot"]) == (1, 0)
    assert_same(uninterrupted, train(elsewhere(config)))


@pytest.mark.parametrize("moment", ["update_parameters", "log_step"])
def test_a_partial_or_unlogged_update_is_not_saved(checkpoints, tmp_path, monkeypatch, moment):
    """After an error between the start of AdamW's step and its log line, the run resumes from the checkpoint before it."""
    config = config_of(checkpoints, tmp_path)
    uninterrupted = train(config)
    owner: Any = loop if moment == "update_parameters" else Run
    real = getattr(owner, moment)

    def half(first: Any, *rest: object) -> object:
        update = real(first, *rest) if owner is loop else None
        if (first if owner is loop else first.learner).progress.step == 2:
            raise ZeroDivisionError
        return update or real(first, *rest)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(owner, moment, half)
        train(elsewhere(config))
    assert_same(uninterrupted, train(elsewhere(config)))


def test_out_of_memory_saves_and_prints_settings_that_need_less(checkpoints, tmp_path, monkeypatch):
    """The run can resume with half the batch and twice the accumulation, if ALLOW_CHANGED is set."""
    config = replace(config_of(checkpoints, tmp_path, batch_size=4, accumulation=1, epochs=2), checkpoint_seconds=1e9)

    def exhaust(count: int, _: Learner) -> None:
        if count == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        before_each_step(patch, exhaust)
        with pytest.raises(
            TrainingError, match=r"batch_size = 4 .*32×32\. Try --batch-size 2 --accumulation 2; .*--base-dtype"
        ):
            train(config)
    run = only_run(config)
    saved = checkpoint.newest(run)[0]
    assert saved is not None and saved.state["progress"]["step"] == 2
    smaller = replace(config, batch_size=2, accumulation=2, resume=str(run))
    with pytest.raises(CheckpointError, match="batch_size was 4 and is 2; accumulation was 1 and is 2"):
        train(smaller)
    path = train(replace(smaller, allow_changed=True))
    assert [entry["step"] for entry in metrics_of(path) if "loss" in entry] == list(range(1, 9)) and path.parent == run
    assert "data_changed" not in adapter_file.read(path).metadata["training"]  # the lines are the same


def test_the_time_left_after_a_resume_does_not_count_earlier_processes(checkpoints, tmp_path, monkeypatch, capsys):
    """Before, the seconds of all processes were divided by the steps of the last one."""
    config = config_of(checkpoints, tmp_path, epochs=8, log_every=1)
    with killed_at(5):
        train(config)
    restore_files = Run._restore_files

    def long_ago(self: Run, saved: checkpoint.Saved) -> None:
        restore_files(self, saved)
        self.started -= 1e6  # as if earlier processes had trained for eleven days

    monkeypatch.setattr(Run, "_restore_files", long_ago)
    capsys.readouterr()
    train(config)
    printed = capsys.readouterr().out
    assert "resumed after step" in printed and " left" in printed and not re.search(r"\d (h|min|days?)\b.* left", printed)


# ---------------------------------------------------------------- not the same run


def test_a_changed_run_is_refused_with_the_name_of_the_change(checkpoints, tmp_path, capsys):
    """With a path, this is an error. With "auto", a new run starts, and the reason is printed."""
    config = config_of(checkpoints, tmp_path)
    with killed_at(5):
        train(config)
    run = only_run(config)
    here = replace(config, resume=str(run))
    for changes, message in (
        ({"lr": 5e-3}, "lr was 0.01 and is 0.005"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"precision": "bf16"}, "precision was 'fp32' and is 'bf16'"),
        ({"model": str(checkpoints["opt"])}, "base weights are not the same"),
        ({"model": str(other_pixels(checkpoints["blip"], tmp_path / "base"))}, "base processors are not the same"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(replace(here, **changes))
    source = Path(config.annotations)
    source.write_text(source.read_text().replace("a red picture", "a red photo", 1))
    with pytest.raises(CheckpointError, match="lines are not the same"):
        train(here)
    capsys.readouterr()
    assert train(replace(config, epochs=1)).parent != run
    assert "was interrupted, and this start does not resume it, because epochs was 2 and is 1" in capsys.readouterr().out
    path = train(replace(here, allow_changed=True))
    assert "continuing although" in capsys.readouterr().out
    assert adapter_file.read(path).metadata["training"]["data_changed"] is True


def test_scores_of_other_validation_lines_do_not_count(checkpoints, tmp_path, capsys, monkeypatch):
    """Before, a run that was resumed with other data reported the score and kept the best weights of the earlier data."""
    config = config_of(checkpoints, tmp_path, val_fraction=0.0, epochs=4, best_by="exact_match", resume="auto")
    held_out = tmp_path / "val.jsonl"
    held_out.write_text("".join(Path(config.annotations).read_text().splitlines(True)[:3]))
    config = replace(config, val_annotations=str(held_out))
    scores = iter([0.5, *[0.9] * 99])
    monkeypatch.setattr(session, "validate", lambda *_: {"loss": 1.0, "exact_match": next(scores)})
    with killed_at(9):
        train(config)
    run = only_run(config)
    assert (run / BEST_NAME).exists()
    saved = checkpoint.newest(run)[0]
    assert saved is not None and saved.state["run"]["best"]["rank"][0] == 0.9
    held_out.write_text(held_out.read_text().replace("picture", "photo"))
    monkeypatch.setattr(session, "validate", lambda *_: {"loss": 2.0, "exact_match": 0.25})
    path = train(replace(config, resume=str(run), allow_changed=True))
    printed, step = capsys.readouterr().out, saved.state["progress"]["step"]
    assert "earlier validation scores cannot be compared with those of this start, so they do not count" in printed
    assert f"\nvalidation exact match: best adapter 25.0%, after step {step}: {path.with_name(BEST_NAME)}" in printed
    assert adapter_file.read(path.with_name(BEST_NAME)).metadata["training"]["val_exact_match"] == 0.25
    assert [(line["step"], line["val_exact_match"]) for line in metrics_of(path) if "val_exact_match" in line].count(
        (step, 0.25)
    ) == 1


def test_a_run_that_is_resumed_without_validation_keeps_its_best_weights(checkpoints, tmp_path, monkeypatch):
    """No later validation can choose others."""
    scores = iter([0.5, *[0.9] * 99])
    monkeypatch.setattr(session, "validate", lambda *_: {"loss": 1.0, "exact_match": next(scores)})
    for number, changes in enumerate(({"val_fraction": 0.0}, {"val_fraction": 0.0, "num_beams": 2})):
        (tmp_path / str(number)).mkdir()
        config = config_of(checkpoints, tmp_path / str(number), epochs=4, best_by="auto")
        with killed_at(9):
            train(config)
        run = only_run(config)
        best = (run / BEST_NAME).read_bytes()
        train(replace(config, resume=str(run), allow_changed=True, **changes))
        if number:  # the old weights were chosen with another generation
            assert not (run / BEST_NAME).exists()
        else:
            assert (run / BEST_NAME).read_bytes() == best
        scores = iter([0.5, *[0.9] * 99])


def test_a_changed_run_without_a_remaining_step_is_an_error(checkpoints, tmp_path):
    """Before, it was saved as a finished run, although it had learned nothing from the new settings."""
    config = config_of(checkpoints, tmp_path, epochs=4)
    with killed_at(26):
        train(config)
    run, before = only_run(config), checkpoint.newest(only_run(config))[0]
    notes = resume.find(replace(config, epochs=2), before.state["identity"] | {"epochs": 2})[1]
    assert "epochs was 4 and is 2. To resume it, undo this change" in notes[0] and "--allow-changed" not in notes[0]
    with pytest.raises(CheckpointError, match=r"epochs was 4 and is 2\. Undo the change, or start a new run"):
        train(replace(config, epochs=2, resume=str(run)))
    with pytest.raises(CheckpointError, match=r"no step remains, because the run has done \d+ steps in 3 epochs; set EPOCHS"):
        train(replace(config, epochs=2, resume=str(run), allow_changed=True))
    after = checkpoint.newest(run)[0]
    assert before is not None and after is not None and after.state == before.state
    path = train(replace(config, epochs=6, resume=str(run), allow_changed=True))
    assert adapter_file.read(path).metadata["training"]["steps"] == 6 * 3  # three steps per epoch


def test_only_the_newest_interrupted_run_is_described():
    state, config = {"progress": {"epoch": 1, "step": 5}}, TrainConfig(epochs=2)
    others = [(SimpleNamespace(run=Path(f"runs/{name}"), state=state), ["lr was 0.1 and is 0.2"]) for name in "abcde"]
    assert resume._note_on_others(others[:1], config).endswith("add --resume runs/a --allow-changed")
    for finished in (replace(config, epochs=1), replace(config, max_steps=5)):
        assert resume._note_on_others(others[:1], finished).endswith("To resume it, undo this change")
    other_base = [(others[0][0], ["base weights are not the same"])]
    assert resume._note_on_others(other_base, config).endswith("To resume it, undo this change")
    note = resume._note_on_others(others, config)
    assert note.startswith("runs/a was interrupted") and note.count("because") == 1
    assert note.endswith(". Older interrupted runs with other settings: runs/b, runs/c, runs/d, …")


def other_pixels(checkpoint: Path, folder: Path) -> Path:
    """Return a copy of the checkpoint with another pixel mean in its image processor."""
    shutil.copytree(checkpoint, folder)
    file = folder / "preprocessor_config.json"
    file = file if file.exists() else folder / "processor_config.json"
    processor = json.loads(file.read_text())
    processor.get("image_processor", processor)["image_mean"] = [0.1, 0.2, 0.3]
    file.write_text(json.dumps(processor))
    return folder


def test_a_run_resumes_with_moved_data_and_base_and_other_workers(checkpoints, tmp_path):
    config = config_of(checkpoints, tmp_path / "a")
    uninterrupted = train(config)
    with killed_at(6):
        train(elsewhere(config))
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("runs*"))
    shutil.copytree(checkpoints["blip"], tmp_path / "base")
    moved = replace(elsewhere(config), annotations=str(tmp_path / "b" / "annotations.jsonl"), model=str(tmp_path / "base"))
    assert_same(uninterrupted, train(replace(moved, num_workers=2, log_every=1)))


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_path_without_a_checkpoint_is_an_error_before_anything_is_written(checkpoints, tmp_path, folder):
    config = config_of(checkpoints, tmp_path, resume=str(tmp_path / folder))
    with pytest.raises(CheckpointError, match="resume = "):
        train(config)
    assert not Path(config.output_dir).exists()


# ---------------------------------------------------------------- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def plant(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb()))


class Bomb:
    """Create a file when this object is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(Path(os.environ["PLANTED"])),)


@pytest.mark.parametrize("damage", [cut, flip, remove, plant])
@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_if_the_newest_checkpoint_is_damaged_the_one_before_it_is_used(
    checkpoints, tmp_path, monkeypatch, capsys, damage, name
):
    """Law 10: no code of the damaged checkpoint is executed."""
    monkeypatch.setenv("PLANTED", str(tmp_path / "planted"))
    config = config_of(checkpoints, tmp_path)
    uninterrupted = train(config)
    with killed_at(6):
        train(elsewhere(config))
    older, newer = sorted((only_run(elsewhere(config)) / checkpoint.FOLDER).iterdir())
    damage(newer / name)
    path = train(elsewhere(config))
    assert f"{newer} is damaged" in capsys.readouterr().out and not (tmp_path / "planted").exists()
    assert_same(uninterrupted, path)
    assert older.parent.parent == path.parent


def test_two_runs_that_begin_in_one_second_have_separate_folders(checkpoints, tmp_path, monkeypatch):
    """The second run creates its folder at the same time as the first. Each folder has its own settings and results."""
    config = config_of(checkpoints, tmp_path, epochs=1)
    alone = train(elsewhere(replace(config, seed=2), "alone"))
    real = Run._fill_folder

    def begin(run: Run, folder: Path) -> None:
        real(run, folder)
        monkeypatch.setattr(Run, "_fill_folder", real)
        finished.append(train(replace(config, seed=2)))

    finished: list[Path] = []
    monkeypatch.setattr("lora_blip.training.run_folder.run_name", lambda *_: "lora_same")
    monkeypatch.setattr(Run, "_fill_folder", begin)
    first = train(config)
    assert first.parent != finished[0].parent
    for path, seed in ((first, 0), (finished[0], 2)):
        assert json.loads((path.parent / "config.json").read_text())["seed"] == seed
    assert_same(alone, finished[0])


def test_a_checkpoint_is_chosen_under_the_lock(checkpoints, tmp_path, monkeypatch):
    """Another process may write newer checkpoints before the lock: the newest one is used. If it finishes, this is an error."""
    config = config_of(checkpoints, tmp_path)
    uninterrupted = train(config)
    with killed_at(3):
        train(elsewhere(config))
    stale = checkpoint.newest(only_run(elsewhere(config)))[0]
    with killed_at(6):
        train(elsewhere(config))
    assert stale is not None and not stale.folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "find", lambda *_: (stale, []))
        assert_same(uninterrupted, train(elsewhere(config)))
        with pytest.raises(CheckpointError, match="has just finished"):
            train(elsewhere(config))


def test_a_backup_of_a_run_is_not_resumed(checkpoints, tmp_path):
    """The copy of an interrupted run is not resumed, even if it is newer."""
    config = config_of(checkpoints, tmp_path)
    with killed_at(4):
        train(config)
    run = only_run(config)
    shutil.copytree(run, run.with_name("backup"))
    content = {path: path.read_bytes() for path in run.with_name("backup").rglob("*") if path.is_file()}
    assert train(config).parent == run and content == {path: path.read_bytes() for path in content}


def test_a_renamed_run_is_reported_with_the_flag_that_resumes_it(checkpoints, tmp_path, capsys):
    config = config_of(checkpoints, tmp_path)
    with killed_at(4):
        train(config)
    run = only_run(config)
    run.rename(run.with_name("mine"))
    assert train(config).parent.name != "mine"
    printed = capsys.readouterr().out
    assert f"{run.with_name('mine')} was interrupted and renamed (from {run.name}). To resume it, add --resume" in printed
    assert train(replace(config, resume=str(run.with_name("mine")))).parent.name == "mine"


def test_an_exact_run_is_preferred_to_a_newer_one_that_changed(checkpoints, tmp_path):
    config = config_of(checkpoints, tmp_path)
    for seed in (0, 5):
        with killed_at(4):
            train(replace(config, seed=seed, resume="off"))
    assert json.loads((train(replace(config, allow_changed=True)).parent / "config.json").read_text())["seed"] == 0


@pytest.mark.parametrize("changes", [{"best_by": "loss"}, {"targets": "text"}, {"r": 4}, {"variant": "dora"}])
def test_with_allow_changed_a_run_resumes_or_names_the_reason(checkpoints, tmp_path, changes):
    """Another BEST_BY starts without a best score. Adapters on other modules or of another rank cannot be resumed."""
    config = config_of(checkpoints, tmp_path, best_by="exact_match")
    with killed_at(6):
        train(config)
    changed = replace(config, allow_changed=True, resume=str(only_run(config)), **changes)
    with pytest.raises(CheckpointError, match="Undo the change") as refused:
        train(replace(changed, allow_changed=False))
    assert ("--allow-changed" in str(refused.value)) == ("best_by" in changes)
    if "best_by" in changes:
        assert train(changed).parent == only_run(config)
    else:
        with pytest.raises(CheckpointError, match="set MODEL, TARGETS, R and VARIANT to the values of that run"):
            train(changed)


def test_the_loss_scale_and_its_growth_are_restored(checkpoints, tmp_path, monkeypatch):
    """fp16: the loss scale was halved and will grow soon. It stays equal to that of a run that is not killed."""
    monkeypatch.setattr(learner, "LossScaler", lambda enabled: LossScaler(enabled, 2.0**24, growth_interval=3))
    config = config_of(checkpoints, tmp_path, precision="fp16", max_skipped=40, epochs=6, patience=0)
    uninterrupted = train(config)
    scales = [entry["loss_scale"] for entry in metrics_of(uninterrupted) if "loss" in entry]
    assert len(set(scales)) > 1
    with killed_at(30):
        train(elsewhere(config))
    assert_same(uninterrupted, train(elsewhere(config)))


def test_after_a_kill_a_skipped_step_names_the_same_module(checkpoints, tmp_path, monkeypatch):
    """The micro-batch with the loss that is not finite came before the kill, in the same step."""
    real = loop.accumulate_gradients

    def accumulate(learner: Learner, batch: Any, slot: Any, is_last: bool) -> None:
        layer = learner.task.backbone.model.vision_model.encoder.layers[1].mlp.fc1
        sound, poisoned = layer.weight.data.clone(), (learner.progress.epoch, slot.number) == (0, 3)
        if poisoned:
            layer.weight.data.fill_(3e38)
        real(learner, batch, slot, is_last)
        layer.weight.data.copy_(sound)

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    config = config_of(checkpoints, tmp_path)
    uninterrupted = train(config)
    with killed_at(6):
        train(elsewhere(config))
    path = train(elsewhere(config))
    assert any("skipped" in entry for entry in metrics_of(uninterrupted))
    assert_same(uninterrupted, path)


@pytest.mark.parametrize("when", ["signal", "error after a signal"])
def test_a_failed_save_is_never_reported_as_saved(checkpoints, tmp_path, monkeypatch, when):
    """After SIGTERM and a full disk, or an error in the update, the error is reported, not exit status 75."""
    config = replace(config_of(checkpoints, tmp_path), checkpoint_seconds=1e9)
    real = loop.accumulate_gradients

    def accumulate(learner: Learner, *rest: object, **named: object) -> None:
        real(learner, *rest, **named)
        if (learner.progress.step, learner.progress.slot) == (0, 3):
            os.kill(os.getpid(), signal.SIGTERM)
            if when == "signal":
                monkeypatch.setattr(checkpoint, "make_whole", full)
            else:
                monkeypatch.setattr(loop, "update_parameters", raising(ZeroDivisionError))

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    with pytest.raises(CheckpointError if when == "signal" else ZeroDivisionError):
        train(config)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_closed_terminal_does_not_prevent_saving(checkpoints, tmp_path, monkeypatch):
    """With `train.py | tee log` and Ctrl-C, the reader of stdout is gone, and the run still saves its progress."""
    config = replace(config_of(checkpoints, tmp_path), checkpoint_seconds=1e9)
    uninterrupted = train(config)
    real = os.write

    def broken(handle: int, content: bytes) -> int:
        if handle == 2:
            raise BrokenPipeError
        return real(handle, content)

    def interrupt(count: int, _: Learner) -> None:
        if count == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "write", broken)
        before_each_step(patch, interrupt)
        train(elsewhere(config))
    saved = checkpoint.newest(only_run(elsewhere(config)))[0]
    assert saved is not None and saved.state["progress"]["step"] == 3
    assert_same(uninterrupted, train(elsewhere(config)))


def test_a_run_killed_while_its_folder_was_created_is_not_resumed(checkpoints, tmp_path):
    """Its first checkpoint is complete, but the folder still has its temporary name."""
    config = config_of(checkpoints, tmp_path)
    with killed_at(4):
        train(config)
    run = only_run(config)
    run.rename(run.with_name(f".{run.name}.tmp"))
    assert train(config).parent == only_run(config)


def test_files_are_synced_in_the_order_that_survives_a_power_failure(checkpoints, tmp_path):
    """The order is: metrics, each file of the new checkpoint, its rename, its parent folder, removal of the old checkpoint."""
    happened: list[str] = []
    replace_real, rmtree = Path.replace, shutil.rmtree

    def synced(handle: int) -> None:
        happened.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name.split('_step')[0]}")

    def replaced(path: Path, target: Path) -> Path:
        happened.append(f"rename to {Path(target).name.split('_step')[0]}")
        return replace_real(path, target)

    def removed(path: Path, **named: Any) -> None:
        happened.append("remove" if "000001" in Path(path).name else "tidy")
        rmtree(path, **named)

    config = config_of(checkpoints, tmp_path, keep_checkpoints=1)
    with killed_at(2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "replace", replaced)
        patch.setattr(shutil, "rmtree", removed)
        train(config)
    second = happened[happened.index("sync metrics.jsonl") :]
    order = [second.index(f"sync {name}") for name in ("metrics.jsonl", TENSORS)]
    order += [second.index("rename to 000002"), second.index(f"sync {checkpoint.FOLDER}"), second.index("remove")]
    assert order == sorted(order) and second.index(f"sync {STATE}") < order[2]


def test_an_incomplete_folder_never_has_its_final_name(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "half").write_text("a")
        raise OSError

    with pytest.raises(OSError):
        make_whole(tmp_path / "000001_step0", fill)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- one writer


HOLD = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from lora_blip.runtime import lock
with lock.held(Path(sys.argv[1])):
    child = os.fork()  # a loader worker, which outlives a killed parent for a while
    print(os.getpid() if child else "", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_refused_to_a_second_process_and_not_left_behind_by_a_crash(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    first, second = holder.stdout.readline(), holder.stdout.readline()
    assert first.strip() or second.strip()
    with pytest.raises(ConfigError, match=f"another run is writing into {tmp_path}"), lock.held(tmp_path):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock.held(tmp_path):
        pass
    subprocess.run(["pkill", "-9", "-f", str(tmp_path)], check=False)


def test_a_second_run_beside_the_first_is_refused(checkpoints, tmp_path, capsys):
    """ "auto" in another terminal finds the active run, and does not change it. It is not called interrupted."""
    config = config_of(checkpoints, tmp_path)
    with killed_at(4):
        train(config)
    run = only_run(config)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and (holder.stdout.readline() or True)
    time.sleep(0.1)
    try:
        with pytest.raises(LockedError):
            train(config)
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        train(replace(config, epochs=1))  # a run with other settings shares the folder OUTPUT_DIR
        assert "was interrupted" not in capsys.readouterr().out
    finally:
        subprocess.run(["pkill", "-9", "-f", str(run)], check=False)
        holder.wait()
    train(replace(config, epochs=1, seed=3))
    assert f"{run} was interrupted" in capsys.readouterr().out
    train(config)


# ---------------------------------------------------------------- a full disk


def test_a_full_disk_is_an_error_and_the_old_checkpoint_is_unchanged(checkpoints, tmp_path, capfd):
    """A file size limit has room for one checkpoint but not for the next. Without the limit, the run resumes."""
    config = config_of(checkpoints, tmp_path, targets="vit,text", r=8)
    uninterrupted = train(config)
    again = elsewhere(config)
    child = os.fork()
    if not child:
        real = loop.accumulate_gradients

        def accumulate(learner: Learner, *rest: object, **named: object) -> None:
            if learner.progress.step == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            real(learner, *rest, **named)

        loop.accumulate_gradients = accumulate
        try:
            train(again)
        except CheckpointError as error:
            os.write(2, f"{error}\n".encode())
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    stderr = capfd.readouterr().err
    assert f"no room left to write in {only_run(again)}" in stderr and "existing checkpoints are intact" in stderr
    folders = sorted((only_run(again) / checkpoint.FOLDER).iterdir())
    assert len(folders) == 2 and all(checkpoint.read(folder) for folder in folders)
    assert_same(uninterrupted, train(again))


# ---------------------------------------------------------------- for real


@pytest.mark.slow
def test_sigkill_at_random_moments(monkeypatch, capsys):
    """The benchmark kills a run at least fifty times, in fp32 and bf16. This test kills it a few times."""
    monkeypatch.setattr(sys, "argv", ["chaos", "--kills", "4", "--steps", "12"])
    chaos.main()  # its status depends on the number of kills, which depends on the speed of the machine
    printed = capsys.readouterr().out
    assert printed.count("equal\n") == 4 and "DIFFERS" not in printed and "'SIGKILL':" in printed, printed


@pytest.mark.parametrize("with_images", [True, False])
def test_the_digest_of_the_lines_contains_the_prompt_and_the_question_id(tmp_path, with_images):
    """The id 0 is different from no id. Lines without prompt and id have the digest of earlier versions."""
    (tmp_path / "a.png").write_bytes(b"an image")
    plain = Example(tmp_path / "a.png", "a cube", "a.png", 1)
    lines = [plain, *(replace(plain, **own) for own in ({"prompt": "see"}, {"question_id": 0}, {"question_id": "7"}))]
    assert len({resume.lines_digest([line], with_images) for line in lines}) == len(lines)
    of_earlier_versions: list[object] = ["a.png", "a cube", "", []]
    as_json = json.dumps([*of_earlier_versions, *resume._samples_of(plain.image)] if with_images else [of_earlier_versions])
    assert resume.lines_digest([plain], with_images) == hashlib.sha256(as_json.encode()).hexdigest()


def test_the_digest_of_the_weights_contains_weights_after_a_trainable_parameter(make):
    model = make("blip").model
    next(model.parameters()).requires_grad_()
    before = weights_digest(model)
    [*model.parameters()][-1].data[0] += 1e-3
    assert weights_digest(model) != before


def test_the_digest_of_the_weights_contains_every_value(make):
    """Change one value of a large matrix, between the sampled values."""
    model = make("blip").model
    before = weights_digest(model)
    weight = model.vision_model.encoder.layers[0].mlp.fc1.weight
    assert weight.numel() > 4 * identity.SAMPLES and weights_digest(model) == before
    weight.view(-1)[1] += 1e-3
    assert weights_digest(model) != before
