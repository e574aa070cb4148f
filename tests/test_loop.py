"""The loop: accumulation is a batch, frozen is frozen, fp16 scales and skips, a run leaves what it should."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lora_blip import adapter, loop, lora
from lora_blip.config import TrainConfig
from lora_blip.data.annotations import DataError
from lora_blip.data.images import ImageError
from lora_blip.loop import TrainingError, apply_update, learning_rate, train
from lora_blip.run import run_name
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.task import Batch
from tests import tiny
from tests.conftest import WHOLE, batch_of, inject

UNEVEN = ["a", "a red cube", "nothing", "a blue cube on top of a green cube", "two cubes"]


def settings(checkpoint: Path, annotations: Path, **changes: object) -> TrainConfig:
    defaults = TrainConfig(
        model=str(checkpoint), annotations=str(annotations), output_dir=str(annotations.parent / "runs"),
        epochs=2, batch_size=4, warmup_steps=1, num_workers=0, augment=False, device="cpu", r=2, alpha=4, lr=1e-2,
        log_every=1, val_fraction=0.25, max_new_tokens=5,
    )  # fmt: skip
    return replace(defaults, **changes)


def metrics_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]


def rows(batch: Batch, first: int, last: int, task: CaptionTask) -> Batch:
    """Some rows of a batch as a micro-batch of its own, padded anew."""
    texts = [example.text for example in batch.examples[first:last]]
    new = task.language.rows([task.prompt] * len(texts), texts)
    return Batch(batch.examples[first:last], batch.pixel_values[first:last], new, new.label_tokens)


def plain_sgd(task: CaptionTask) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    parameters = [p for p in task.backbone.model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=1.0), parameters


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_accumulation_is_a_batch(make, kind):
    """Law 7: micro-batches of 2, 2 and a tail of 1, captions of 1 to 10 tokens, equal one batch of 5."""
    gradients = []
    for cuts in ((0, 5), (0, 2, 4, 5)):
        task = CaptionTask(make(kind))
        inject(task.backbone)
        whole = batch_of(task, UNEVEN)
        micro = [rows(whole, a, b, task) for a, b in pairwise(cuts)]
        optimizer, parameters = plain_sgd(task)
        before = [p.detach().clone() for p in parameters]
        update = apply_update(task, micro, optimizer, torch.amp.GradScaler("cpu", enabled=False), 0.0, nullcontext)
        gradients.append((update.loss, [b - p.detach() for b, p in zip(before, parameters, strict=True)]))
    (one_loss, one), (many_loss, many) = gradients
    assert many_loss == pytest.approx(one_loss, rel=1e-5)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_unscaled(make):
    """With a loss scale of 1024, the step taken still has the norm asked for."""
    task = CaptionTask(make("blip"))
    inject(task.backbone)
    optimizer, parameters = plain_sgd(task)
    before = [p.detach().clone() for p in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    update = apply_update(task, [batch_of(task)], optimizer, scaler, 0.01, nullcontext)
    step = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, parameters, strict=True)])
    assert update.grad_norm > 0.01 and float(step.norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_rate_warms_up_linearly_and_falls_as_a_cosine():
    rates = [learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (n + 1) for n in range(10)])
    assert rates[10:] == pytest.approx([1 + math.cos(math.pi * n / 90) for n in range(90)])
    assert learning_rate(0, 1, 0, 2.0) == 2.0 and learning_rate(3, 4, 50, 2.0) > 0


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_frozen_is_frozen_and_every_b_moves(checkpoints, make, tmp_path, kind, monkeypatch):
    """Law 2: after training, the base is `torch.equal` to what was loaded, under the same names."""
    kept = {}
    real = loop.open_backbone
    monkeypatch.setattr(loop, "open_backbone", lambda *a, **k: kept.setdefault("opened", real(*a, **k)))
    path = train(settings(checkpoints[kind], tiny.write_photos(tmp_path), targets=WHOLE[kind], prompt="a photo of"))
    fresh = make(kind).model.state_dict()
    after = {key: value for key, value in kept["opened"][0].model.state_dict().items() if ".lora." not in key}
    assert list(after) == list(fresh) and all(torch.equal(after[key], fresh[key]) for key in fresh)
    saved = adapter.read(path)
    assert all(saved.tensors[key].any() for key in saved.tensors)
    assert saved.task["prompt"] == "a photo of" and saved.about["training"]["finished"] is True
    drift = saved.about["merge_drift"]
    assert 0 < drift["largest_difference"] < 1e-4 * drift["largest_logit"]


def test_a_run_leaves_its_settings_its_metrics_and_falls(checkpoints, tmp_path):
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
    first, second = (adapter.read(path).tensors for path in runs)
    assert runs[0].parent != runs[1].parent and all(torch.equal(first[key], second[key]) for key in first)
    other = adapter.read(train(settings(checkpoints["blip"], source, augment=True, dropout=0.1, seed=1))).tensors
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_fp16_amp_runs_on_the_cpu_and_skips_an_overflow(checkpoints, tmp_path, kind, capsys):
    """A real GradScaler: its first scale of 65,536 overflows, the step is skipped, the scale halves, training goes on."""
    source = tiny.write_photos(tmp_path)
    config = settings(checkpoints[kind], source, precision="fp16", epochs=8, targets=WHOLE[kind], max_skipped=40)
    real = torch.amp.GradScaler
    try:
        torch.amp.GradScaler = lambda device, enabled: real(device, enabled=enabled, init_scale=2.0**24)
        path = train(config)
    finally:
        torch.amp.GradScaler = real
    entries = metrics_of(path)
    skipped, steps = ([e for e in entries if key in e] for key in ("skipped", "loss"))
    assert skipped and "overflowed at loss scale 1.67772e+07" in skipped[0]["skipped"]
    assert steps[0]["step"] == 1 and steps[0]["lr"] == pytest.approx(config.lr)  # the schedule waited for the scaler
    scores = [e["val_loss"] for e in entries if "val_loss" in e]
    assert scores[-1] < 0.9 * scores[0] and steps[-1]["loss_scale"] < 2.0**24
    assert "one was skipped" in capsys.readouterr().out


def test_bf16_trains(checkpoints, tmp_path):
    entries = metrics_of(
        train(settings(checkpoints["t5"], tiny.write_photos(tmp_path), precision="bf16", targets=WHOLE["t5"], epochs=4))
    )
    scores = [entry["val_loss"] for entry in entries if "val_loss" in entry]
    assert scores[-1] < 0.9 * scores[0]


def test_a_loss_that_is_not_finite_names_the_module_and_stops(checkpoints, tmp_path, monkeypatch):
    """A weight that overflows after some steps: the module is named, nothing is updated with NaN, what was learned is kept."""
    real, count = loop.apply_update, 0

    def poisoned(task, *rest):
        nonlocal count
        count += 1
        if count == 3:
            task.backbone.model.vision_model.encoder.layers[1].mlp.fc1.weight.data.fill_(torch.inf)
        return real(task, *rest)

    monkeypatch.setattr(loop, "apply_update", poisoned)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9, max_skipped=2)
    with pytest.raises(TrainingError, match=r"2 steps in a row.*'vision_model\.encoder\.layers\.1\.mlp\.fc1'"):
        train(config)
    (path,) = Path(config.output_dir).rglob(adapter.FILE_NAME)
    validated = [entry for entry in metrics_of(path) if "val_loss" in entry]
    assert adapter.read(path).about["training"] | {"settings": 0} == {
        "steps": 2, "finished": False, "settings": 0,
        **{key: pytest.approx(value, abs=1e-6) for key, value in validated[-1].items() if key.startswith("val")},
    }  # fmt: skip


def test_ctrl_c_saves_what_there_is(checkpoints, tmp_path, monkeypatch):
    real, count = loop.apply_update, 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "apply_update", interrupted)
    config = settings(checkpoints["blip"], tiny.write_photos(tmp_path), epochs=9)
    with pytest.raises(SystemExit) as stopped:
        train(config)
    (path,) = Path(config.output_dir).rglob(adapter.FILE_NAME)
    assert stopped.value.code == 130 and adapter.read(path).about["training"]["steps"] == 3


def test_an_image_with_several_texts_is_right_if_it_says_one_of_them(make, tmp_path, monkeypatch):
    """Exact match is over images: a model that always says one of three right captions scores 1, not a third."""
    source = tiny.write_photos(tmp_path, 4, ["one"] * 4)
    source.write_text(
        source.read_text() + source.read_text().replace("one", "two") + source.read_text().replace("one", "three")
    )
    task = CaptionTask(make("blip"))
    asked = []
    monkeypatch.setattr(task, "predict", lambda pixels, _: asked.append(len(pixels)) or ["two"] * len(pixels))
    held_out = loop.loader_of(loop.annotations.read(source)[0], task, TrainConfig(batch_size=3, num_workers=0), shuffle=False)
    assert loop.validate(task, held_out, nullcontext)["exact_match"] == 1 and sum(asked) == 4


def test_the_rate_fits_the_size_of_the_base_and_warm_up_the_run(checkpoints, tmp_path):
    path = train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), lr=0.0, warmup_steps=500, epochs=5))
    rates = [entry["lr"] for entry in metrics_of(path) if "loss" in entry]
    assert rates[:4] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3]) and rates[-1] < 3e-4 and "_lr0.003_" in path.parent.name
    assert loop.default_rate(torch.nn.Linear(5000, 5000)) == 1e-4


def test_a_crash_keeps_what_was_learned(checkpoints, tmp_path):
    """An image that vanishes during training: its error is raised, and the adapter of the steps before is there."""
    source = tiny.write_photos(tmp_path)
    real, count = loop.apply_update, 0

    def vanishing(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            for photo in (tmp_path / "photos").iterdir():
                photo.unlink()
        return real(*arguments)

    config = settings(checkpoints["blip"], source, epochs=9)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ImageError, match="does not exist"):
        patch.setattr(loop, "apply_update", vanishing)
        train(config)
    (path,) = Path(config.output_dir).rglob(adapter.FILE_NAME)
    assert adapter.read(path).about["training"]["steps"] >= 3


def test_max_steps_ends_in_the_middle_of_an_epoch(checkpoints, tmp_path):
    entries = metrics_of(train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), max_steps=4, epochs=9)))
    assert (
        [e["step"] for e in entries if "loss" in e] == [1, 2, 3, 4] and entries[-1]["step"] == 4 and "val_loss" in entries[-1]
    )


def test_a_run_is_named_by_its_settings():
    config = TrainConfig(batch_size=2, epochs=4, lr=1e-4, r=16, alpha=32)
    assert run_name(config, datetime(2026, 6, 7, 16, 15, 36)) == "lora_bs2_ep4_lr0.0001_r16_a32_20260607_161536"


def test_bad_data_stops_before_anything_is_written_or_is_left_out(checkpoints, tmp_path, capsys):
    source = tiny.write_photos(tmp_path)
    source.write_text(source.read_text() + '{"image": "photos/gone.png", "text": "a"}\n')
    config = settings(checkpoints["blip"], source, epochs=1)
    with pytest.raises(DataError, match=r"annotations\.jsonl:13: .*gone\.png does not exist"):
        train(config)
    assert not Path(config.output_dir).exists()
    train(replace(config, on_bad_data="skip"))
    assert "left out 1 line(s)" in capsys.readouterr().out


def test_checkpointing_trains_to_the_same_adapter(checkpoints, tmp_path):
    source = tiny.write_photos(tmp_path)
    plain, frugal = (
        adapter.read(train(settings(checkpoints["opt"], source, targets="vit,qformer,lm", checkpointing=c))).tensors
        for c in (False, True)
    )
    for key, value in plain.items():
        torch.testing.assert_close(frugal[key], value, rtol=1e-3, atol=1e-5)


def test_dropout_of_the_adapter_is_for_training_alone(make):
    backbone = make("blip")
    for x in inject(backbone, "vit").values():
        x.dropout = 0.5
    task = CaptionTask(backbone)
    batch = batch_of(task)
    backbone.model.train()
    assert not torch.equal(task.logits(batch), task.logits(batch))
    backbone.model.eval()
    assert torch.equal(task.logits(batch), task.logits(batch))
    with lora.disabled(backbone.model):
        backbone.model.train()
        assert torch.equal(task.logits(batch), task.logits(batch))  # the backbone's own dropout is off
