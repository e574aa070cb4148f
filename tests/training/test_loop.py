"""Test the training loop: accumulation, frozen weights, fp16, and the files of a run."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from lora_blip.cli import run_command
from lora_blip.config import TrainConfig
from lora_blip.data.image_folders import example_of
from lora_blip.data.loader import DeviceBatch
from lora_blip.data.source_digest import source_digest
from lora_blip.errors import ConfigError, DataError, TrainingError
from lora_blip.inference.setup import describe
from lora_blip.lora import adapter_file, attached
from lora_blip.lora.routing import disable_adapters
from lora_blip.models.loading import load_backbone
from lora_blip.reports import plots
from lora_blip.runtime.runs import ADAPTER_NAME, BEST_NAME, METRICS_NAME, run_name
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import examples, learner, session, setup, summary, validation
from lora_blip.training.best import Best, few_images_warning
from lora_blip.training.learner import Learner, Progress
from lora_blip.training.loop import learning_rate, train
from lora_blip.training.loss_scale import LossScaler
from lora_blip.training.run_folder import Run
from lora_blip.training.session import Session
from tests.support import tiny
from tests.support.models import WHOLE, batch_of, inject
from tests.support.runs import before_each_step, metrics_of, one_step, score, settings

LORA_BLIP = str(Path(sys.executable).with_name("lora-blip"))  # its folder is in PATH
UNEVEN = ["a", "a red cube", "nothing", "a blue cube on top of a green cube", "two cubes"]


def rows(batch: DeviceBatch, first: int, last: int, task: CaptionTask) -> DeviceBatch:
    """Return some rows of a batch as a separate micro-batch, padded again."""
    texts = [example.text for example in batch.examples[first:last]]
    new = task.language.tokenize([task.prompt] * len(texts), texts)
    return DeviceBatch(batch.examples[first:last], batch.pixel_values[first:last], new.pad(), new.label_tokens)


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_accumulated_gradients_equal_those_of_one_batch(make, kind):
    """Law 7: micro-batches of 2, 2 and 1 lines have the gradient of one batch of 5. The captions have 1 to 10 tokens."""
    gradients = []
    for cuts in ((0, 5), (0, 2, 4, 5)):
        task = CaptionTask(make(kind))
        inject(task.backbone)
        batch = batch_of(task, UNEVEN)
        micro = [rows(batch, a, b, task) for a, b in pairwise(cuts)]
        update, moved = one_step(task, micro)
        gradients.append((update.loss, moved))
    (one_loss, one), (many_loss, many) = gradients
    assert many_loss == pytest.approx(one_loss, rel=1e-5)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_unscaled(make):
    """With a loss scale of 1024, the gradient of the update still has the norm `max_grad_norm`."""
    task = CaptionTask(make("blip"))
    inject(task.backbone)
    update, moved = one_step(task, [batch_of(task)], max_grad_norm=0.01, scale=1024.0)
    step = torch.cat([each.flatten() for each in moved])
    assert update.grad_norm > 0.01 and float(step.norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * n / 90) for n in range(90)])
    assert learning_rate(0, 1, 0, 2.0) == 2.0 and learning_rate(3, 4, 50, 2.0) > 0


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_training_changes_every_b_and_no_frozen_weight(checkpoints, make, tmp_path, kind, monkeypatch):
    """Law 2: after training, the base is `torch.equal` to what was loaded, under the same names."""
    captured = {}
    real = setup.open_backbone
    monkeypatch.setattr(setup, "open_backbone", lambda *a, **k: captured.setdefault("opened", real(*a, **k)))
    path = train(settings(checkpoints[kind], tiny.write_photos(tmp_path), targets=WHOLE[kind], prompt="a photo of"))
    fresh = make(kind).model.state_dict()
    after = {key: value for key, value in captured["opened"][0].model.state_dict().items() if ".lora." not in key}
    assert list(after) == list(fresh) and all(torch.equal(after[key], fresh[key].to(after[key].dtype)) for key in fresh)
    saved = adapter_file.read(path)
    assert all(saved.tensors[key].any() for key in saved.tensors)
    assert saved.task["prompt"] == "a photo of" and saved.metadata["training"]["finished"] is True
    drift = saved.metadata["merge_drift"]
    assert 0 < drift["largest_difference"] < 1e-4 * drift["largest_logit"]


@pytest.mark.plots
def test_a_run_writes_its_settings_and_metrics_and_its_loss_falls(checkpoints, tmp_path):
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=6, accumulation=2, validate_every=3)
    path = train(config)
    entries = metrics_of(path)
    steps = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 13))  # 9 lines: batches of 4, 4 and 1; a tail each epoch
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, 3, 6, 9, 12]
    assert json.loads((path.parent / "config.json").read_text())["accumulation"] == 2
    assert (path.parent / "loss.png").stat().st_size > 1000


def test_the_same_seed_gives_the_same_adapter(checkpoints, tmp_path):
    source = tiny.write_photos(tmp_path)
    runs = [train(settings(checkpoints["blip"], source, augment=True, dropout=0.1, num_workers=n)) for n in (0, 2)]
    first, second = (adapter_file.read(path).tensors for path in runs)
    assert runs[0].parent != runs[1].parent and all(torch.equal(first[key], second[key]) for key in first)
    other = adapter_file.read(train(settings(checkpoints["blip"], source, augment=True, dropout=0.1, seed=1))).tensors
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_fp16_amp_trains_on_the_cpu_and_skips_an_overflow(checkpoints, tmp_path, kind, capsys, monkeypatch):
    """A first scale of 2²⁴ overflows. The step is skipped, the scale is halved, training continues."""
    source = tiny.write_photos(tmp_path)
    config = settings(checkpoints[kind], source, precision="fp16", epochs=8, targets=WHOLE[kind], max_skipped=40)
    monkeypatch.setattr(learner, "LossScaler", lambda enabled: LossScaler(enabled, 2.0**24))
    path = train(config)
    entries = metrics_of(path)
    skipped, steps = ([e for e in entries if key in e] for key in ("skipped", "loss"))
    assert skipped and "overflowed at loss scale 1.67772e+07" in skipped[0]["skipped"]
    assert steps[0]["step"] == 1 and steps[0]["lr"] == pytest.approx(config.lr)  # the skipped step did not advance the schedule
    scores = [e["val_loss"] for e in entries if "val_loss" in e]
    assert scores[-1] < 0.9 * scores[0] and steps[-1]["loss_scale"] < 2.0**24
    assert "was skipped: " in capsys.readouterr().out


def test_bf16_trains(checkpoints, tmp_path):
    entries = metrics_of(
        train(settings(checkpoints["t5"], tiny.write_photos(tmp_path), precision="bf16", targets=WHOLE["t5"], epochs=4))
    )
    scores = [entry["val_loss"] for entry in entries if "val_loss" in entry]
    assert scores[-1] < 0.9 * scores[0]


@pytest.mark.parametrize(
    ("changes", "fix"),
    [
        ({"precision": "fp32"}, r"lower LR$"),
        ({"precision": "bf16"}, r'lower LR, or set PRECISION = "fp32" \(--precision fp32\)$'),
        ({"precision": "fp16"}, r"lower LR, or .*--precision bf16\), or .*--precision fp32\)$"),
        ({"precision": "fp32", "compile": True}, r"lower LR, or set COMPILE = False \(--no-compile\)$"),
    ],
)
def test_the_fix_for_skipped_steps_changes_a_setting_of_this_run(changes, fix):
    self: Any = SimpleNamespace(learner=Mock(), config=TrainConfig(max_skipped=2, **changes), run=Mock(last_skip="x"))
    self.learner.progress = Progress(skipped=2)
    with pytest.raises(
        TrainingError,
        match=rf"2 steps in a row: .* To fix it, start a new run \(RESUME = 'off', --resume off\), and in it {fix}",
    ):
        Session.stop_after_skipped_steps(self)


def test_a_loss_that_is_not_finite_names_the_module_and_stops(checkpoints, tmp_path, monkeypatch):
    """If a weight overflows after some steps, the error names the module, no update contains NaN, and the adapter is saved."""

    def poison(count: int, learner: Learner) -> None:
        if count == 3:
            layer = learner.task.backbone.model.vision_model.encoder.layers[1]
            layer.mlp.fc1.weight.data.fill_(3e38)  # the weight is finite, but its products are not

    before_each_step(monkeypatch, poison)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9, max_skipped=2)
    with pytest.raises(TrainingError, match=r"2 steps in a row.*'vision_model\.encoder\.layers\.1\.mlp\.fc1'"):
        train(config)
    (path,) = Path(config.output_dir).rglob(ADAPTER_NAME)
    training = adapter_file.read(path).metadata["training"]
    assert training | {"settings": 0} == {
        "steps": 2,
        "finished": False,
        "settings": 0,
        "data_rules": 2,
        "data_digest": source_digest(config.annotations),
    }


@pytest.mark.parametrize(("good", "fails"), [(1, True), (2, False)], ids=["three steps skipped", "two steps skipped"])
def test_a_short_run_whose_last_steps_are_skipped_does_not_end_as_a_success(
    checkpoints, tmp_path, monkeypatch, capsys, good, fails
):
    """A run of four steps never reaches MAX_SKIPPED = 10. If it fails, it fails again after a resume."""

    def poison(count: int, learner: Learner) -> None:
        if count == good + 1:
            learner.task.backbone.model.vision_model.encoder.layers[1].mlp.fc1.weight.data.fill_(3e38)

    before_each_step(monkeypatch, poison)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=4, val_fraction=0.0, batch_size=64)
    if not fails:
        train(config)
        printed = capsys.readouterr().out
        assert "warning: 2 steps were skipped at the end" in printed and "lower LR" in printed
        return
    for resume in ("off", "auto"):
        last = r"The last reason: the first output .*\. " if resume == "off" else ""
        with pytest.raises(TrainingError, match=rf"^3 steps in a row: skipped .* not finite\. {last}To fix it, .* lower LR"):
            train(replace(config, resume=resume))
        assert "a resumed run would stop in the same way" in capsys.readouterr().out
    before_each_step(monkeypatch, lambda *_: None)
    train(replace(config, resume="auto", lr=1e-5))
    printed = capsys.readouterr().out
    assert "was interrupted" not in printed and "is not resumed: a loss or gradient of its last steps" in printed


@pytest.mark.parametrize("validate_every", [2, 3])
def test_an_unfinished_adapter_has_the_scores_of_its_own_step_only(checkpoints, tmp_path, monkeypatch, validate_every):
    """The run stops after step 4. The scores of step 3, or of the base, are not those of this adapter."""

    def interrupt(count: int, _: Learner) -> None:
        if count == 5:
            raise KeyboardInterrupt

    before_each_step(monkeypatch, interrupt)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9, validate_every=validate_every, device="cpu")
    with pytest.raises(SystemExit):
        train(config)
    (path,) = Path(config.output_dir).rglob(ADAPTER_NAME)
    adapter = adapter_file.read(path)
    validated = [entry["step"] for entry in metrics_of(path) if "val_loss" in entry]
    assert adapter.metadata["training"]["steps"] == 4 and (validated[-1] == 4) is (validate_every == 2)
    assert ("val_loss" in adapter.metadata["training"]) is (validate_every == 2)
    described = describe(CaptionTask(load_backbone(adapter.base, "cpu")), adapter, 1, "fp32")
    assert ("stopped early, not validated" in described) is (validate_every == 3)


def test_ctrl_c_saves_the_progress(checkpoints, tmp_path, monkeypatch):

    def interrupt(count: int, _: Learner) -> None:
        if count == 4:
            raise KeyboardInterrupt

    before_each_step(monkeypatch, interrupt)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    (path,) = Path(config.output_dir).rglob(ADAPTER_NAME)
    assert stopped.value.code == 130 and adapter_file.read(path).metadata["training"]["steps"] == 3


def test_a_caption_is_right_if_it_equals_one_of_several_texts(make, tmp_path, monkeypatch):
    """Exact match is computed by image: a model that always generates one of three right captions has the score 1, not 1/3."""
    source = tiny.write_photos(tmp_path, 4, ["one"] * 4)
    source.write_text(
        source.read_text() + source.read_text().replace("one", "two") + source.read_text().replace("one", "three")
    )
    task = CaptionTask(make("blip"))
    counts = []
    monkeypatch.setattr(
        task, "predict_from_features", lambda features, some: counts.append(len(features)) or ["two"] * len(some)
    )
    held_out = setup.loader_of(
        examples.annotations.read(source)[0], task, TrainConfig(batch_size=3, num_workers=0), shuffle=False
    )
    assert validation.validate(task, held_out, nullcontext)["exact_match"] == 1 and sum(counts) == 4


def test_the_rate_fits_the_size_of_the_base_and_warm_up_the_run(checkpoints, tmp_path):
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), lr=0.0, warmup_steps=500, epochs=5))
    rates = [entry["lr"] for entry in metrics_of(path) if "loss" in entry]
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3]) and rates[-1] < 3e-4
    assert json.loads((path.parent / "config.json").read_text())["lr"] == 3e-3
    assert setup.default_rate(torch.nn.Linear(5000, 5000)) == 1e-4


def test_a_crash_saves_the_adapter_of_the_earlier_steps(checkpoints, tmp_path):
    """If an image is deleted during training, the error is raised, and the adapter of the earlier steps is saved."""
    source = tiny.write_photos(tmp_path)

    def vanish(count: int, _: Learner) -> None:
        if count == 3:
            for photo in (tmp_path / "photos").iterdir():
                photo.unlink()

    config = settings(checkpoints["blip"], source, epochs=9)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DataError, match=r"annotations.jsonl:\d+: .* does not exist"):
        before_each_step(patch, vanish)
        train(config)
    (path,) = Path(config.output_dir).rglob(ADAPTER_NAME)
    assert adapter_file.read(path).metadata["training"]["steps"] >= 3


def test_max_steps_ends_in_the_middle_of_an_epoch(checkpoints, tmp_path):
    entries = metrics_of(train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), max_steps=4, epochs=9)))
    assert (
        [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4] and entries[-1]["step"] == 4 and "val_loss" in entries[-1]
    )


def test_a_run_is_named_by_its_settings():
    now = datetime(2026, 6, 7, 16, 15, 36)
    assert run_name("caption", "assets/tiny-blip", "vit", now) == "2026-06-07_161536_caption_tiny-blip_vit"


@pytest.mark.parametrize(
    ("base", "targets", "end"),
    [
        ("Salesforce/blip2-opt-2.7b", "vit,qformer", "blip2-opt-2.7b_vit-qformer"),
        ("C:\\models\\My base\\", "vit[8:12],text:r=4", "My-base_vit-8-12-text-r-4"),
        ("..", r"encoder\.\d+", "x_encoder-.-d"),
        ("a\x1b[31m\n/\u202e猫", "*", "x_x"),
        ("b" * 500, "v" * 500, f"{'b' * 40}_{'v' * 40}"),
    ],
)
def test_the_name_of_a_run_is_a_short_file_name_of_plain_characters(base, targets, end):
    """A base or target with unusual characters adds no path and no control character to the name, and does not make it long."""
    assert run_name("vqa", base, targets, datetime(2026, 1, 2)) == f"2026-01-02_000000_vqa_{end}"


def test_bad_data_stops_before_anything_is_written_or_is_left_out(checkpoints, tmp_path, capsys):
    source = tiny.write_photos(tmp_path)
    source.write_text(source.read_text() + '{"image": "photos/gone.png", "text": "a"}\n')
    config = settings(checkpoints["blip"], source, epochs=1)
    with pytest.raises(DataError, match=r"annotations\.jsonl:13: .*gone\.png does not exist"):
        train(config)
    assert not Path(config.output_dir).exists()
    train(replace(config, on_bad_data="skip"))
    assert "left out  1 line\n" in capsys.readouterr().out


def test_checkpointing_trains_to_the_same_adapter(checkpoints, tmp_path):
    source = tiny.write_photos(tmp_path)
    plain, frugal = (
        adapter_file.read(train(settings(checkpoints["opt"], source, targets="vit,qformer,lm", checkpointing=c))).tensors
        for c in (False, True)
    )
    for key, value in plain.items():
        torch.testing.assert_close(frugal[key], value, rtol=1e-3, atol=1e-5)


def test_dropout_of_the_adapter_is_only_used_in_training(make):
    backbone = make("blip")
    for x in inject(backbone, "vit").values():
        x.dropout = 0.5
    task = CaptionTask(backbone)
    batch = batch_of(task)
    backbone.model.train()
    assert not torch.equal(task.logits(batch), task.logits(batch))
    backbone.model.eval()
    assert torch.equal(task.logits(batch), task.logits(batch))
    with disable_adapters(backbone.model):
        backbone.model.train()
        assert torch.equal(task.logits(batch), task.logits(batch))  # the backbone's own dropout is off


# ---------------------------------------------------------------- validation, the best, patience


def watched(
    monkeypatch: pytest.MonkeyPatch, scores: list[dict[str, float]] | None = None
) -> dict[int, dict[str, torch.Tensor]]:
    """Return {step: copies of the adapter's tensors at this validation}. `scores` replace the scores of the validations."""
    snapshots: dict[int, dict[str, torch.Tensor]] = {}
    real = Run.log_validation

    def log(run: Run, step: int, epoch: int, computed: dict[str, float]) -> None:
        halves = attached.adapters(run.learner.task.backbone.model).items()
        snapshots[step] = {f"{a}.lora_{h}": getattr(x, h).detach().clone() for a, x in halves for h in "AB"}
        real(run, step, epoch, scores[len(snapshots) - 1] if scores else computed)

    monkeypatch.setattr(Run, "log_validation", log)
    return snapshots


@pytest.mark.parametrize(
    ("by", "scores", "best"),
    [
        ("auto", [score(3), score(2, 0.5), score(1, 0.5), score(4, 0.5), score(0.5, 0.25)], 4),  # ties: the lower loss
        ("loss", [score(3, 1), score(2, 0.5), score(0.5), score(4, 1), score(math.nan, 1)], 4),
        ("exact_match", [score(3), score(2), score(1), score(1), score(2, 0.1)], 8),
    ],
)
def test_the_best_is_the_adapter_of_the_best_validation_to_the_bit(
    checkpoints, tmp_path, monkeypatch, capsys, by, scores, best
):
    snapshots = watched(monkeypatch, scores)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9, max_steps=8, validate_every=2, best_by=by)
    path = train(config)
    best_adapter, last = adapter_file.read(path.parent / BEST_NAME), adapter_file.read(path)
    assert list(snapshots) == [0, 2, 4, 6, 8] and best_adapter.metadata["training"]["steps"] == best
    assert all(torch.equal(best_adapter.tensors[key], value) for key, value in snapshots[best].items())
    assert all(torch.equal(last.tensors[key], value) for key, value in snapshots[8].items())
    assert "finished" not in best_adapter.metadata["training"] and last.metadata["training"]["finished"] is True
    assert f"after step {best}: {path.parent / BEST_NAME}" in capsys.readouterr().out
    for line in (path.parent / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_the_end_warns_if_no_step_is_better_than_the_base(checkpoints, tmp_path, monkeypatch, capsys):
    """Then the loss chooses the step, and the validation images may be a class of their own."""
    watched(monkeypatch, [score(3, 0.125), score(2, 0.125), score(4, 0.0)])
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9, max_steps=4, validate_every=2)
    train(config)
    printed = capsys.readouterr().out
    assert "base 12.5%, best adapter 12.5%, after step 2: " in printed
    assert (
        "\nwarning: no step has a better exact match than the base, so this step was chosen by its loss. The loss fell "
        "(3.0000 → 2.0000): train longer (EPOCHS). Long captions are" in printed
    )


@pytest.mark.parametrize("resumed", [False, True])
def test_the_end_prints_adapter_score_against_the_base_and_next_command(checkpoints, tmp_path, monkeypatch, capsys, resumed):
    """The score of the base is the score before the first step, also in a resumed run."""
    watched(monkeypatch, [score(3, 0.125), score(2, 0.5), score(1, 0.75)])
    source = tiny.write_photos(tmp_path)
    config = settings(checkpoints["blip"], source, epochs=9, max_steps=4, validate_every=2)
    if resumed:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power"):
            before_each_step(patch, lambda count, _: (_ for _ in ()).throw(RuntimeError("power")) if count == 3 else None)
            train(config)
        capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora-blip"])
    path = train(config)
    printed = capsys.readouterr().out.splitlines()
    best = path.parent / BEST_NAME
    assert f"saved {path}" in printed
    assert f"validation exact match: base 12.5%, best adapter 75.0%, after step 4: {best}" in printed
    run = path.parent.relative_to(tmp_path)
    assert printed[-2] == f"next (for other images, change --images): lora-blip infer --adapter {run} --images photos"
    start = "to score it on images that training has not used (write their images and texts to test.jsonl first): "
    assert printed[-1] == f"{start}lora-blip evaluate --adapter {run} --references test.jsonl"


@pytest.mark.parametrize(
    ("program", "start"),
    [(LORA_BLIP, "lora-blip"), ("train_mine.py", "python -m lora_blip"), ("lora_blip/__main__.py", "python -m lora_blip")],
)
def test_a_copy_of_train_py_prints_commands_that_need_no_path(tmp_path, monkeypatch, program, start):
    monkeypatch.setattr("sys.argv", [program])
    monkeypatch.chdir(tmp_path)
    assert summary.next_command("caption", tmp_path / "run", []) == f"{start} infer --adapter run"


def test_the_next_command_runs_infer_beside_train(tmp_path, monkeypatch):
    """`python project/train.py` prints a command with project/infer.py and the flags of the task, quoted for a shell."""
    for name in ("train.py", "infer.py"):
        (tmp_path / name).touch()
    (tmp_path / "image_test").mkdir()
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train.py"), "--epochs", "1"])
    monkeypatch.chdir(tmp_path)
    command = f"python {tmp_path}/infer.py --adapter 'a run'"
    assert summary.next_command("caption", tmp_path / "a run", []) == command
    assert summary.next_command("vqa", tmp_path / "a run", []) == f"{command} --question 'what color is it?'"
    asked = replace(example_of("image_train/1.png"), question="how many?", answers=("two",))  # a question of the data
    assert summary.next_command("vqa", tmp_path / "a run", [asked]) == f"{command} --question 'how many?'"
    for folder, flag in (("image_train", ""), ("my/photos", " --images my/photos"), ("photos", " --images photos")):
        example = example_of(f"{folder}/1.png")  # image_test belongs to image_train only
        assert summary.next_command("caption", tmp_path / "a run", [example]) == command + flag


def test_few_drawn_validation_images_name_the_validation_file_beside_the_annotations(tmp_path):
    drawn = partial(few_images_warning, [example_of("1.png")], True)
    assert "hold out more: VAL_FRACTION" in drawn(str(tmp_path / "train.csv"))
    (tmp_path / "val.csv").touch()
    assert drawn(str(tmp_path / "train.csv")).endswith(f"is for validation: --val-annotations {tmp_path / 'val.csv'}")
    assert "hold out more: VAL_FRACTION" in drawn(str(tmp_path / "val.csv"))


def test_a_start_with_the_best_possible_score_gets_no_warning(tmp_path):
    """No step can be better. Before, the advice was to choose another score or other images."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_exact_match": 1.0, "val_cider": 1.2}\n')
    for by, value, expected in (
        ("exact_match", 1.0, "the exact match of the initial adapter is already the best possible"),
        ("cider", 1.2, "warning: no"),
    ):
        best = Best(by, step=4, rank=(value, -1.0))
        line = summary.score_line(tmp_path, best, "initial adapter")
        assert expected in line and ("warning" in line) == (by == "cider")


def test_the_file_that_evaluates_has_other_images_than_the_training(tmp_path, monkeypatch):
    """A test file with training images is not named. One that was found needs no --image-root if it has its own paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora-blip"])
    run, test, root = tmp_path / "run", tmp_path / "test.csv", ["--image-root", "photos"]
    examples = [example_of(str(tmp_path / "photos" / f"{n}.png")) for n in range(3)]
    of = partial(summary.evaluate_line, "caption", run, str(tmp_path / "train.csv"))
    keys = ["--image-key", "Datei", "--text-key", "Wort"]
    line = of("", examples, keys)  # no file exists: the flags fit the file that the line asks for
    assert "texts to test.csv with the columns of train.csv first): " in line
    assert line.endswith("--references test.csv --image-key Datei --text-key Wort")
    line = summary.evaluate_line("caption", run, str(tmp_path / "train.jsonl"), "", examples, keys)
    assert "texts to test.jsonl with the keys of train.jsonl first): " in line and line.endswith("--text-key Wort")
    assert "texts to test.jsonl first): " in summary.evaluate_line("caption", run, str(tmp_path / "train.jsonl"), "", examples)
    own = f"images of {tmp_path / 'train.csv'}: lora-blip evaluate --adapter run --references {tmp_path / 'train.csv'}"
    assert of("", examples, keys, "test") == f"to score it on the test {own} --image-key Datei --text-key Wort"
    assert of("val.csv", examples, (), "test").endswith("--references val.csv")  # the test lines may be in val.csv
    assert of("", examples, (), "val") == f"to score it on the validation {own}"
    assert of("val.csv", examples, (), "val").endswith("--references val.csv")  # the validation lines were those of val.csv
    for text, names_it in (
        ("image,text\nphotos/7.png,a\nphotos/1.png,b\n", False),
        ("image,text\nphotos/7.png,a\nphotos/11.png,b\n", True),
        ('image;text\n"photos/../photos/2.png";a\n', False),
        (f"image\ttext\n{tmp_path}/photos/0.png\ta\n", False),
        ("image,text\n1.png,a\n", True),  # another folder
    ):
        test.write_text(text)
        assert ("--references held_out.csv" not in of("", examples)) is names_it
        found = "the images of test.csv: " if names_it else "images that training has not used (write"
        assert of("", examples).startswith(f"to score it on {found}")
    assert "held_out.csv first" in of("", examples, root)  # relative to photos, it is the image of the training
    test.write_text("image,text\n9.png,a\n")
    assert of("", examples, root).endswith(f"{test} --image-root photos")
    (tmp_path / "9.png").touch()
    assert of("", examples, root).endswith(f"--references {test}")
    assert of("val.csv", examples).endswith(f"the images of test.csv: lora-blip evaluate --adapter run --references {test}")
    for chosen in (str(test), f"val.csv,{test}"):  # the validation file is the test file
        assert of(chosen, examples).startswith("to score it on the validation images: ")
    test.write_text("Bild;Beschreibung\n9.png;a\n")  # neither usual names of columns nor those of the training
    for names in (keys, ()):
        assert f"{tmp_path / 'test.csv'}" not in of("", examples, names) and "held_out.csv" in of("", examples, names)
    test.write_text("Datei;Wort\n9.png;a\n")
    assert of("", examples, keys).endswith(f"{test} --image-key Datei --text-key Wort")
    test.unlink()
    assert of("val.csv", examples).startswith("to score it on the validation images: ")
    (tmp_path / "test.jsonl").write_text('{"image": "9.png", "captions": ["a", "b"]}\n')  # other formats are not checked
    assert of("", examples).endswith(f"--references {tmp_path / 'test.jsonl'}")


def test_the_command_that_evaluates_names_a_file_that_exists(tmp_path, monkeypatch):
    """The references are VAL_ANNOTATIONS, a file of `prepare`, or that of image_test. Without them, a file is to be written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lora-blip"])
    run, lines = tmp_path / "run", str(tmp_path / "train.jsonl")
    start, command = "to score it on images that training has not used", ": lora-blip evaluate --adapter run --references "
    demo = [example_of(str(tmp_path / "image_train" / "1.png"))]
    assert summary.evaluate_line("vqa", run, lines, "b.csv", demo).startswith("to score it on the validation images: ")
    write_first = " (write their images and texts to test.jsonl first)"
    write_answers = " (write their images and questions with answers to test.jsonl first)"
    assert summary.evaluate_line("vqa", run, lines, "", demo) == f"{start}{write_answers}{command}test.jsonl"
    (tmp_path / "image_test").mkdir()
    (tmp_path / "image_test/questions.jsonl").write_text('{"image": "1.png", "question": "what?", "answers": ["a"]}\n')
    assert summary.evaluate_line("caption", run, lines, "", demo) == f"{start}{write_first}{command}test.jsonl"
    found = "to score it on the images of "
    answers = summary.evaluate_line("vqa", run, lines, "", demo)
    assert answers == f"{found}questions.jsonl{command}{tmp_path}/image_test/questions.jsonl"
    inside = summary.evaluate_line("vqa", run, "image_train/questions.jsonl", "", demo)  # as the page on tasks trains
    assert inside == f"{found}image_test/questions.jsonl{command}image_test/questions.jsonl"  # not the file of the training
    own = [example_of(str(tmp_path / "my" / "1.png"))]  # image_test shows something else
    assert summary.evaluate_line("vqa", run, lines, "", own) == f"{start}{write_answers}{command}test.jsonl"
    (tmp_path / "test.jsonl").write_text('{"image": "1.png", "text": "captions cannot score answers"}\n')
    (tmp_path / "val.jsonl").write_text('{"image": "1.png", "question": "what?", "answers": ["a"]}\n')
    assert summary.evaluate_line("caption", run, lines, "", demo) == f"{found}test.jsonl{command}{tmp_path}/test.jsonl"
    assert summary.evaluate_line("vqa", run, lines, "", demo) == f"{found}val.jsonl{command}{tmp_path}/val.jsonl"
    validated = "to score it on the validation images"  # they chose the best weights
    assert summary.evaluate_line("vqa", run, lines, "a b.csv", demo) == f"{validated}{command}'a b.csv'"
    columns = ["--image-key", "Datei"]
    assert summary.evaluate_line("vqa", run, lines, "b.csv", demo, columns) == f"{validated}{command}b.csv --image-key Datei"
    assert summary.evaluate_line("vqa", run, lines, "", demo, columns).endswith("val.jsonl")  # it may have other columns
    rooted = summary.evaluate_line("vqa", run, lines, "", demo, [*columns, "--image-root", "photos"])
    assert rooted.endswith("val.jsonl --image-root photos")  # a file beside the annotations has the same images
    (tmp_path / "table").mkdir()
    for name in ("train.csv", "test.csv"):
        (tmp_path / "table" / name).write_text("Datei;Text\n1.png;a\n")
    own_keys = ["--image-key", "shot", "--text-key", "says"]
    (tmp_path / "keys").mkdir()
    trained = str(tmp_path / "keys/mine.jsonl")
    missing = summary.evaluate_line("caption", run, trained, "", own, own_keys)
    with_keys = write_first.replace(" first)", " with the keys of mine.jsonl first)")
    assert missing == f"{start}{with_keys}{command}test.jsonl {' '.join(own_keys)}"
    (tmp_path / "keys/test.jsonl").write_text('{"shot": "1.png", "says": "a"}\n')
    same = summary.evaluate_line("caption", run, trained, "", own, own_keys)
    assert same.endswith(f"keys/test.jsonl {' '.join(own_keys)}")
    (tmp_path / "keys/test.jsonl").write_text('{"image": "1.png", "text": "a"}\n')
    assert summary.evaluate_line("caption", run, trained, "", own, own_keys).endswith("keys/test.jsonl")
    assert "test.jsonl" in summary.evaluate_line("caption", run, ".", "", own)
    trained = str(tmp_path / "table/train.csv")
    table = summary.evaluate_line("caption", run, trained, "", own, columns)
    assert table.endswith(f"{command}{tmp_path}/table/test.csv --image-key Datei")
    held_out = "table/held_out.csv"  # not test.csv; beside train.csv, so that its images have the same paths
    asked = f"(write their images and questions with answers to {held_out} with the columns of train.csv first)"
    line = summary.evaluate_line("vqa", run, trained, "", own, columns)
    assert line == f"{start} {asked}{command}{held_out} --image-key Datei"
    (tmp_path / "table/test.csv").write_text("Datei;Question;Answer\n1.png;what?;a\n")
    assert "test.csv" in summary.evaluate_line("vqa", run, trained, "", own, columns)
    monkeypatch.setattr("sys.argv", ["train.py"])
    assert "the images of val.jsonl: python -m lora_blip evaluate " in summary.evaluate_line("vqa", run, lines, "", demo)


def test_the_command_that_evaluates_reads_the_file_as_the_training_did(checkpoints, tmp_path, capsys, monkeypatch):
    """Columns with other names and images in another folder: the printed command runs as it is."""
    source = tiny.write_photos(tmp_path)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    table = tmp_path / "tables" / "a.csv"
    table.parent.mkdir()
    table.write_text("Datei;Beschreibung\n" + "".join(f"{row['image']};{row['text']}\n" for row in rows))
    config = settings(checkpoints["blip"], table, val_annotations=str(table), image_root=str(tmp_path))
    config = replace(config, image_key="Datei", text_key="Beschreibung", on_bad_data="skip", max_steps=1, epochs=1)
    monkeypatch.setattr("sys.argv", ["lora-blip"])
    train(config)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("to score it on the validation"))
    words = shlex.split(line.partition(": ")[2])
    assert words[:2] == ["lora-blip", "evaluate"]
    run_command(
        "evaluate", [*words[2:], "--device", "cpu", "--train-annotations", "none", "--output-dir", str(tmp_path / "scores")]
    )
    assert (tmp_path / "scores" / "report.html").is_file()


@pytest.mark.parametrize(
    ("first", "compiled", "step", "text"),
    [
        (0, False, 1, ", about 9 s left"),
        (900, False, 910, ", about 90 s left"),
        (0, True, 1, ""),
        (900, True, 902, ", about 98 s left"),
    ],
)
def test_the_remaining_time_counts_the_steps_of_this_process(monkeypatch, first, compiled, step, text):
    """A resumed run has done only its own steps. The step that compiles is not counted."""
    run, total = object.__new__(Run), 10 if first == 0 else 1000
    run.main, run.config, run.images, run.opened, run.logged = True, TrainConfig(log_every=1, compile=compiled), 8, 0.0, 0.0
    run.started = -1e6 if first else 0.0  # it includes the seconds of earlier processes
    run.bar = SimpleNamespace(update=lambda _: None, set_postfix_str=lambda _: None, total=total, disable=False)
    run.earlier = first
    steps = step - first - compiled
    monkeypatch.setattr(run, "_write", lambda _: None)
    monkeypatch.setattr("time.perf_counter", lambda: float(max(steps, 1)))  # a second for each step
    run.log_step(step, 0, SimpleNamespace(loss=1.0, grad_norm=1.0, scale=1), 0.1, 8)
    assert run.figures.partition(" images/s")[2] == text


def test_a_stopped_run_prints_the_command_that_resumes_it(tmp_path, monkeypatch, capsys):
    run = object.__new__(Run)
    run.folder = tmp_path / "a run"
    run.config = TrainConfig(max_skipped=3)
    run.learner = SimpleNamespace(progress=Progress(total=9))
    run.bar = SimpleNamespace(close=lambda: None)
    for argv, end in (
        ([LORA_BLIP, "train", "--resume", "old", "--lr=1"], f"to resume: lora-blip train --lr=1 --resume '{run.folder}'"),
        (["service.py"], "start again with the same settings to resume"),
    ):
        monkeypatch.setattr("sys.argv", argv)
        run.save_unfinished()
        assert capsys.readouterr().out == f"\nstopped after step 0 of 9; {end}\n"
    run.learner.progress.skipped = 3
    run.save_unfinished()
    assert capsys.readouterr().out == "\nstopped after step 0 of 9; a resumed run would stop in the same way\n"


@pytest.mark.parametrize(("images", "warned"), [(0, False), (1, True), (19, True), (20, False)])
def test_few_validation_images_give_one_warning(images, warned):
    """A validation with 20 lines of few images warns too: lines of one image are not independent."""
    lines = [example_of(f"{number}.png", "") for number in range(images)] * 20
    line = few_images_warning(lines)
    assert bool(line) == warned and (not warned or f"{images} validation image{'s' * (images > 1)}: with fewer" in line)
    assert not warned or ("VAL_FRACTION" in line and "VAL_FRACTION" not in few_images_warning(lines, drawn=False))


def test_the_warning_of_few_validation_images_comes_before_the_first_step(checkpoints, tmp_path, capsys):
    train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=1, max_steps=1))
    assert capsys.readouterr().out.partition("step ")[0].count("chance mostly chooses best.safetensors") == 1


def test_patience_ends_a_run_that_does_not_improve_and_its_adapter_is_complete(checkpoints, tmp_path, monkeypatch, capsys):
    snapshots = watched(monkeypatch, [score(9), score(2, 0.5), score(3, 0.5), score(1, 0.6), score(1, 0.6), score(1, 0.2)])
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=20, validate_every=2, patience=2)
    path = train(config)
    assert list(snapshots) == [0, 2, 4, 6, 8, 10]
    summary = adapter_file.read(path).metadata["training"]
    assert (summary["steps"], summary["finished"]) == (10, True) and adapter_file.read(path).metadata["merge_drift"]
    assert all(torch.equal(adapter_file.read(path).tensors[key], value) for key, value in snapshots[10].items())
    assert adapter_file.read(path.parent / BEST_NAME).metadata["training"]["steps"] == 6
    assert "exact_match has not improved since step 6" in capsys.readouterr().out
    assert [e["step"] for e in metrics_of(path) if "loss" in e] == list(range(1, 11))


def test_a_lower_loss_is_no_improvement_of_another_score(checkpoints, tmp_path, monkeypatch):
    """Patience counts validations without a better BEST_BY. Among equal scores, the one with the lower loss is the best."""
    watched(monkeypatch, [score(9, 0.5), *[score(9 - n / 1e6, 0.5) for n in range(1, 20)]])
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=20, validate_every=2, patience=2))
    assert adapter_file.read(path).metadata["training"]["steps"] == 4
    assert adapter_file.read(path.parent / BEST_NAME).metadata["training"]["steps"] == 4


@pytest.mark.parametrize(("smallest", "stale"), [(0.0, 0), (1e-3, 4), (0.15, 0), (1.0, 4)])
def test_patience_counts_gains_above_the_smallest(smallest, stale):
    """Gains below MIN_IMPROVEMENT add up: the score is compared with that of the last improvement."""
    gains = {0.0: 1e-6, 1e-3: 1e-4, 0.15: 0.1, 1.0: 0.2}[smallest]
    best = Best("loss", min_improvement=smallest)
    for step in range(5):
        assert best.record(step, {"loss": 5 - step * gains})
    assert (best.stale, best.step) == (stale, 4)


def test_patience_continues_from_a_checkpoint_of_any_version():
    """A checkpoint contains the score of the last improvement. For an older checkpoint without it, the best score is used."""
    older = Best.restored({"by": "exact_match", "step": 4, "stale": 2, "rank": [0.5, -1.0]}, 1e-4)
    assert older == Best("exact_match", 4, 2, (0.5, -1.0), 1e-4, 4, 0.5)
    saved = Best("exact_match", 4, 2, (0.5, -1.0), 1e-4, 2, 0.49995)
    assert Best.restored(json.loads(json.dumps(vars(saved))), 1e-4) == saved


def test_an_extra_that_fails_prints_a_line_and_the_run_is_done(checkpoints, tmp_path, monkeypatch, capsys):
    """If plot, TensorBoard and drift fail, the adapter is saved, the run is finished, and its checkpoints are removed."""
    import torch.utils.tensorboard as board

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no\nsuch backend")

    for module, name in ((plots, "draw"), (session, "merge_drift"), (board.SummaryWriter, "add_scalar")):
        monkeypatch.setattr(module, name, fail)
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=1, tensorboard=True))
    printed = capsys.readouterr().out
    for what in ("loss curve", "merge drift", "TensorBoard from here on"):
        assert printed.count(f"warning: no {what} (ValueError: no such backend); nothing else is affected\n") == 1
    assert adapter_file.read(path).metadata["training"]["finished"] is True and not (path.parent / "checkpoints").exists()
    monkeypatch.setattr(board.SummaryWriter, "__init__", fail)
    monkeypatch.setattr(board.SummaryWriter, "close", fail, raising=False)
    train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=1, tensorboard=True))
    assert capsys.readouterr().out.count("warning: no TensorBoard (ValueError") == 1


@pytest.mark.parametrize(("drawn", "line"), [(Path("the curve.png"), "loss curve: the curve.png\n"), (None, session.NO_PLOT)])
def test_a_run_prints_its_plot_or_why_there_is_none(checkpoints, tmp_path, monkeypatch, capsys, drawn, line):
    monkeypatch.setattr(plots, "draw", lambda _: drawn)
    train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=1))
    printed = capsys.readouterr().out
    assert printed.count(line) == 1 and (drawn is None or session.NO_PLOT not in printed)


def test_a_plot_is_drawn_whatever_backend_a_notebook_names(tmp_path):
    """MPLBACKEND names a backend that is not installed. The plot does not need it, and the variable is not changed."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = (
        "import os, sys, pathlib; from lora_blip.reports import plots; "
        "print(plots.draw(pathlib.Path(sys.argv[1])), os.environ['MPLBACKEND'])"
    )
    backend = "module://matplotlib_inline.backend_inline"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False,
        env=os.environ | {"MPLBACKEND": backend, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.stdout.split() == [str(tmp_path / "loss.png"), backend], done.stderr


def test_without_an_improvement_on_the_base_no_adapter_is_the_best(checkpoints, tmp_path, monkeypatch, capsys):
    watched(monkeypatch, [score(1, 1), score(2), score(2)])
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=20, validate_every=2, patience=2))
    assert adapter_file.read(path).metadata["training"]["steps"] == 4 and not (path.parent / BEST_NAME).exists()
    assert "base 100.0%, and no later validation was better" in capsys.readouterr().out


def test_the_best_of_equal_scores_has_the_lower_loss():
    best = Best("cider")
    validations = [(1.0, 2.0), (1.0, 2.0), (1.0, 1.5), (0.9, 0.1), (math.nan, 0.0), (1.1, 9.0)]
    better = [best.record(n, {"cider": cider, "loss": loss}) for n, (cider, loss) in enumerate(validations)]
    assert better == [True, False, True, False, False, True] and (best.step, best.stale) == (5, 0)


def test_validation_by_cider_is_that_of_the_scorer(checkpoints, tmp_path, monkeypatch):
    from lora_blip.metrics.captions import caption_scores

    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java, which takes seconds to start

    source = tiny.write_photos(tmp_path)
    path = train(settings(checkpoints["blip"], source, best_by="cider", val_fraction=0.5))
    last = [entry for entry in metrics_of(path) if "val_cider" in entry][-1]
    backbone = setup.open_backbone(str(checkpoints["blip"]), "cpu", "fp32")[0]
    adapter_file.load(backbone, path)
    task = CaptionTask(backbone, generation=setup.Generation(5))
    held_out = examples.splits.split_by_image(examples.annotations.read(source)[0], 0.5, 0)[1]
    from lora_blip.inference.captioner import Captioner

    texts = [p.text for p in Captioner(task)([e.image for e in held_out])]
    assert last["val_cider"] == pytest.approx(caption_scores(texts, [[e.text] for e in held_out]).values["CIDEr"], abs=1e-6)
    assert adapter_file.read(path).metadata["training"]["settings"]["best_by"] == "cider"


def test_cider_of_a_single_validation_image_is_an_error(checkpoints, tmp_path):
    """It is 0 by definition, so it would choose the weights by the loss."""
    source = tiny.write_photos(tmp_path)
    one = source.with_name("one.jsonl")
    one.write_text(source.read_text().splitlines()[0] + "\n")
    config = settings(checkpoints["blip"], source, best_by="cider", val_annotations=str(one))
    with pytest.raises(ConfigError, match=r"CIDEr is always 0 if there is only one validation image; hold out more images"):
        train(config)
    best = Best("exact_match", 3, rank=(0.0, -1.0))
    (tmp_path / METRICS_NAME).write_text('{"step": 0, "val_exact_match": 0.0, "val_loss": 1.0001}\n')
    lines = [summary.score_line(tmp_path, best, images=images) for images in (1, 2)]
    assert ['BEST_BY = "cider"' in line for line in lines] == [False, True]
    hardly = "The loss has hardly changed (1.0001 → 1.0000): train longer (EPOCHS), or with another LR. "
    assert all("no step has a better" in line and hardly in line for line in lines)


def test_an_impossible_best_by_is_an_error_before_anything_is_written(checkpoints, tmp_path, monkeypatch):
    import builtins

    from lora_blip.metrics import captions

    source, blip = tiny.write_photos(tmp_path), checkpoints["blip"]
    real = builtins.__import__

    def without_tensorboard(name: str, *rest: object) -> object:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(captions, "package_folder", lambda: None)
    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    for changes, message in (
        ({"best_by": "beauty"}, "best_by = 'beauty': expected one of auto, loss, exact_match"),
        ({"best_by": "vqa_accuracy"}, "best_by = 'vqa_accuracy'"),
        ({"best_by": "loss", "val_fraction": 0.0}, "best_by = 'loss' needs validation data"),
        ({"patience": 3, "val_fraction": 0.0}, "patience = 3 needs validation data"),
        ({"best_by": "cider"}, 'pip install "lora_blip'),
        ({"tensorboard": True, "model": "nowhere"}, "TensorBoard is not installed: pip install"),  # before the model is loaded
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            train(settings(blip, source, **changes))
    assert [path.name for path in Path(settings(blip, source).output_dir).iterdir()] == [".cache"]  # of the validation images


@pytest.mark.plots
def test_without_held_out_images_a_run_trains_and_has_no_best(checkpoints, tmp_path, capsys):
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), val_fraction=0.0, epochs=1))
    assert not (path.parent / BEST_NAME).exists() and not any("val_loss" in entry for entry in metrics_of(path))
    assert (path.parent / "loss.png").exists() and "best" not in capsys.readouterr().out.split("saved ")[1]


def test_tensorboard_holds_the_scalars_of_the_metrics(checkpoints, tmp_path):
    """TensorBoard's own reader returns every number of metrics.jsonl at its step."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), tensorboard=True, epochs=3))
    events = reader.EventAccumulator(str(path.parent))
    events.Reload()
    scalars = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    numbers = ("loss", "lr", "grad_norm", "images_per_s", "val_loss", "val_exact_match")
    expected = {(key, entry["step"]): entry[key] for entry in metrics_of(path) for key in numbers if key in entry}
    assert scalars == pytest.approx(expected, rel=1e-6) and ("val_loss", 0) in scalars and ("loss", 9) in scalars


@pytest.mark.plots
def test_the_curves_show_whatever_was_validated(tmp_path, monkeypatch):
    """Each score between 0 and 1 has its own line with its points. Values that are not numbers are not drawn."""
    from matplotlib.figure import Figure

    drawn = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), real(self, *a, **k))[1])
    lines = [
        {"step": 0, "val_loss": 3.0, "val_vqa_accuracy": 0.1, "val_cider": 0.5, "val_r": None},
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 2, "val_loss": 1.0, "val_vqa_accuracy": 0.9, "val_cider": 4.5, "val_r": 0.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert plots.draw(tmp_path) == tmp_path / "loss.png"
    upper, lower = drawn[0].axes

    def shown(axes) -> dict[str, list[tuple[float, float]]]:
        return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}

    assert shown(upper) == {"training": [(1, 2.0)], "validation": [(0, 3.0), (2, 1.0)]}
    assert shown(lower) == {"VQA accuracy": [(0, 0.1), (2, 0.9)], "r": [(2, 0.25)]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]))
    plots.draw(tmp_path)
    assert not drawn[1].axes[1].get_visible()


def test_the_last_adapter_is_validated_though_a_step_was_skipped(checkpoints, tmp_path, monkeypatch):
    """A run with a skipped step makes fewer updates than its total. Its last adapter is still validated."""

    def spoil(count: int, learner: Learner) -> None:
        if count == 2:
            for parameter in learner.parameters.values():
                parameter.grad = torch.full_like(parameter, torch.inf)

    before_each_step(monkeypatch, spoil)
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=2, validate_every=100))
    entries = metrics_of(path)
    assert [entry["step"] for entry in entries if "val_loss" in entry] == [0, max(e["step"] for e in entries if "loss" in e)]
