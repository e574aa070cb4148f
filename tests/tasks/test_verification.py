"""The fast and the plain path compute one batch before the first use on a machine; a difference switches the fast path off."""

import functools
import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from lora_blip.config import TrainConfig
from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch
from lora_blip.inference.batch_runner import Runner
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.predictor import Predictor
from lora_blip.kernels import switch, vit
from lora_blip.kernels import text_attention as text_attention
from lora_blip.lora import attached, fingerprint, fused, injection
from lora_blip.models.packing import PackedRows
from lora_blip.models.precision import autocasting
from lora_blip.tasks import verification, verification_record
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.tasks.vqa import VqaTask
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.models import inject
from tests.support.questions import examples, pictures

TASKS = {
    "blip": CaptionTask,
    "opt": CaptionTask,
    "t5": CaptionTask,
    "vqa": VqaTask,
    "itm": RetrievalTask,
    "itm2": RetrievalTask,
}
TEXTS = ["red", "two cubes", "nothing on it", "no", "yes"]


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def learned(kind: str, make: Any, **options: Any) -> tuple[Any, Any]:
    """Return a task with adapters on every part, and a batch of texts of different lengths that share images."""
    backbone = make(kind, **options)
    inject(backbone, trained=False)
    task = TASKS[kind](backbone)
    some = [Example(Path(f"{n}.png"), e.answers[0], f"{n}.png", n, "", e.question, e.answers) for n, e in enumerate(examples())]
    picture = None if kind.startswith("itm") else [0, 1, 1, 2]
    batch = task.batch(HostBatch(some, pictures(4 if picture is None else 3), picture))
    backbone.model.train()
    return task, batch


def check_training(task: Any, batch: Any, precision: str = "fp32") -> None:
    verification.before_training(task, batch, precision, autocasting(torch.device("cpu"), precision), {})


def kinds(model: torch.nn.Module) -> set[type]:
    return {type(module) for module in model.modules()} & set(switch.KINDS.values())


def files() -> list[Path]:
    return sorted(verification_record.path_of({}).parent.glob("*.json"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(TASKS))
def test_the_fast_path_is_equal_and_is_checked_once(make, capsys, kind, precision):
    """Logits, loss and gradients of the fast path are within the bound for every model. A second check computes nothing."""
    task, batch = learned(kind, make)
    check_training(task, batch, precision)
    printed = capsys.readouterr().out
    assert "equal up to rounding" in printed and "gradients" in printed and task.backbone.fast and len(files()) == 1
    if precision == "fp32":
        assert max(map(float, re.findall(r"\d+e[-+]\d+", printed))) < 1e-4
    check_training(task, batch, precision)
    assert capsys.readouterr().out == ""


def test_another_number_of_beams_is_compared_before_a_training(make, capsys):
    """Validation generates with these beams, and the attention of beams has its own path."""
    task, batch = learned("blip", make)
    for beams, compares in ((1, True), (1, False), (3, True), (3, False)):
        task.generation = replace(task.generation, num_beams=beams)
        check_training(task, batch)
        assert ("equal up to rounding" in capsys.readouterr().out) is compares


def test_the_gradients_of_magnitudes_are_compared_too(make, monkeypatch):
    """DoRA has a third parameter for each linear."""
    backbone = make("blip")
    loras = injection.inject(backbone, "vit.mlp", variant="dora")
    task, compared = CaptionTask(backbone), list[int]()
    batch = task.batch(HostBatch([Example(Path("0.png"), "a red cube", "0.png", 0)], pictures(1), None))
    difference = verification.gradient_difference
    monkeypatch.setattr(verification, "gradient_difference", lambda a, b: (compared.append(len(a)), difference(a, b))[1])
    check_training(task, batch)
    assert compared == [3 * len(loras)]


def test_the_check_leaves_no_trace(make):
    """The check does not change adapters, gradients, modes, settings or random generators."""
    task, batch = learned("blip", make)
    adapters = attached.adapters(task.backbone.model)
    for number, x in enumerate(adapters.values()):
        x.B.data.normal_()
        x.dropout = 0.1
        x.A.grad = torch.full_like(x.A, number)
    before = [(x.A.clone(), x.B.clone(), x.A.grad) for x in adapters.values()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    check_training(task, batch)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    for x, (a, b, gradient) in zip(adapters.values(), before, strict=True):
        assert torch.equal(x.A, a) and torch.equal(x.B, b) and x.A.grad is gradient and x.B.grad is None and x.dropout == 0.1
    assert task.backbone.model.training and task.generation == Generation() and kinds(task.backbone.model)


def wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let packed texts attend to the texts before them in their row."""
    real = PackedRows.mask

    def mask(self: PackedRows, dtype: torch.dtype) -> torch.Tensor:
        count = self.text.shape[1]
        return real(self, dtype).masked_fill(torch.ones(count, count, dtype=torch.bool).tril(), 0)

    monkeypatch.setattr(PackedRows, "mask", mask)


def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let text attention ignore its mask."""
    real = text_attention.attend
    monkeypatch.setattr(
        text_attention, "attend", lambda q, k, v, mask=None: real(q, k, v, mask and None if mask is None else None)
    )


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the attention scores of the ViT by 1.1."""
    real = vit.attend
    monkeypatch.setattr(vit, "attend", lambda q, k, v: real(1.1 * q, k, v))


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve one gradient of the fused update."""
    real = fused.FrozenLinear.gradients

    def gradients(ctx: Any, dy: torch.Tensor) -> Any:
        results = list(real(ctx, dy))
        results[6] = results[6] / 2
        return tuple(results)

    monkeypatch.setattr(fused.FrozenLinear, "gradients", staticmethod(gradients))


@pytest.mark.parametrize(("kind", "fault"), [
    ("blip", wrong_mask), ("blip", no_mask), ("blip", wrong_scale), ("blip", wrong_gradient), ("vqa", no_mask),
    ("vqa", wrong_scale), ("opt", wrong_scale), ("t5", wrong_gradient), ("itm", no_mask), ("itm2", wrong_scale),
])  # fmt: skip
def test_a_wrong_fast_path_is_off_in_training(make, monkeypatch, capsys, kind, fault):
    """A fault in one part of the fast path switches all of it off for the run, with one warning and no stored record."""
    fault(monkeypatch)
    task, batch = learned(kind, make)
    check_training(task, batch)
    assert capsys.readouterr().out.count("WARNING: they differ") == 1 and not files()
    assert not task.backbone.fast and not kinds(task.backbone.model) and not attached.share_routing(task.backbone.model).fast
    loss = task.loss(again(task, batch))
    monkeypatch.undo()
    plain = TASKS[kind](make(kind, fast=False))
    inject(plain.backbone, trained=False)
    expected = plain.loss(again(plain, batch))
    assert torch.equal(loss, expected) or kind.startswith("itm")  # whose negatives are drawn


def again(task: Any, batch: Any) -> Any:
    return task.batch(
        HostBatch(batch.examples, batch.pixel_values, None if batch.image_index is None else batch.image_index.tolist())
    )


def ignored_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let text attention ignore the keys of earlier tokens, as with an unsupported cache of transformers."""
    real = text_attention.TextAttention._keys_and_values
    monkeypatch.setattr(
        text_attention.TextAttention, "_keys_and_values", lambda self, own, encoder, _cache: real(self, own, encoder, None)
    )


def mixed_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every row attend to the states of the first image."""
    real = text_attention.ImageStates.__init__
    monkeypatch.setattr(
        text_attention.ImageStates, "__init__", lambda self, states, mask: real(self, states[:1].expand_as(states), mask)
    )


def predict(kind: str, make: Any, tmp_path: Path, **generation: Any) -> tuple[Runner, list[Any]]:
    task = TASKS[kind](make(kind), "", Generation(**{"max_new_tokens": 6, **generation}))
    inject(task.backbone)
    for n in range(3):
        noise = np.random.default_rng(n).integers(0, 255, (tiny.SIDE, tiny.SIDE, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.png")
    questions = [
        Example(tmp_path / f"{n}.png", "", f"{n}.png", n, "", q) for n, q in enumerate(("what is it?", "why?", "is it red?"))
    ]
    runner = Runner(task, 2)
    rank = kind.startswith("itm") or bool(generation.get("ranked"))
    return runner, [prediction for _, prediction in runner.run(questions, Predictor(TEXTS if rank else []))]


@pytest.mark.parametrize("kind", list(TASKS))
def test_predictions_are_checked_before_the_first_one(make, tmp_path, capsys, kind):
    """The first run of captions, answers or rankings checks the fast path. A second run does not check it again."""
    _, predictions = predict(kind, make, tmp_path)
    assert capsys.readouterr().out.count("equal up to rounding") == 1 and len(files()) == 1
    assert predict(kind, make, tmp_path)[1] == predictions and capsys.readouterr().out == ""


@pytest.mark.parametrize(("kind", "fault"), [
    ("blip", ignored_cache), ("blip", mixed_images), ("blip", wrong_scale), ("vqa", ignored_cache), ("vqa", no_mask),
    ("vqa", mixed_images), ("opt", wrong_scale), ("t5", wrong_scale), ("itm", wrong_scale), ("itm", no_mask),
    ("itm2", wrong_scale),
])  # fmt: skip
@pytest.mark.parametrize("beams", [1, 3])
def test_a_wrong_fast_path_is_off_in_inference(make, monkeypatch, tmp_path, capsys, kind, fault, beams):
    """A fault in the fast path is found before the first prediction. All predictions equal those of the plain path."""
    fault(monkeypatch)
    runner, predictions = predict(kind, make, tmp_path, num_beams=beams)
    assert "WARNING: they differ" in capsys.readouterr().out and not runner.task.backbone.fast and not files()
    monkeypatch.undo()
    slow = TASKS[kind](make(kind, fast=False), "", runner.task.generation)
    inject(slow.backbone)
    texts = TEXTS if kind.startswith("itm") else []
    examples_again = [Example(p.image, "", p.image.name, 1, "", p.question) for p in predictions]
    for (_, expected), p in zip(Runner(slow, 2).run(examples_again, Predictor(texts)), predictions, strict=True):
        assert p.text == expected.text and dict(p.ranking) == pytest.approx(dict(expected.ranking), rel=1e-5)


@pytest.mark.parametrize("kind", ["blip", "vqa"])
def test_a_ranking_of_texts_by_a_wrong_path_is_the_plain_one(make, monkeypatch, capsys, kind):
    """A fault in the attention to the image is found before a ranking, which then equals that of the plain path."""
    mixed = text_attention.ImageStates.attend_to_image
    monkeypatch.setattr(text_attention.ImageStates, "attend_to_image", lambda *args: 1.1 * mixed(*args))
    task = TASKS[kind](make(kind))
    runner, images = Runner(task, 2), pictures(2)
    work = Predictor(TEXTS)
    runner.check(images, examples()[:2], work)
    assert "WARNING: they differ" in capsys.readouterr().out and not task.backbone.fast
    predictions = work(task, images, examples()[:2])
    slow = TASKS[kind](make(kind, fast=False))
    assert Predictor(TEXTS)(slow, images, examples()[:2]) == predictions


def test_an_error_of_the_fast_path_is_no_error_of_the_run(make, monkeypatch, tmp_path, capsys):
    def broken(*_: Any) -> None:
        raise TypeError("forward() got an unexpected keyword")

    monkeypatch.setattr(text_attention.TextAttention, "_keys_and_values", broken)
    _, predictions = predict("blip", make, tmp_path)
    assert len(predictions) == 3 and "TypeError: forward() got an unexpected keyword" in capsys.readouterr().out


def test_a_change_of_the_computation_gives_another_key(make):
    """A change of base, precision, task, target, setting or library version gives another key. A path on the disk does not."""
    task, _ = learned("blip", make)

    def key(precision: str = "fp32", **settings: Any) -> str:
        return fingerprint.digest_of(
            verification_record.key_of(task, verification_record.base_of(task.backbone), precision, settings)
        )

    same = key()
    others = [key("bf16"), key(compile=True)]
    task.backbone.model.vision_model.encoder.layers[-1].mlp.fc2.weight.data.mul_(2)
    others.append(key())
    injection.eject(task.backbone.model)
    others.append(key())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification_record.transformers, "__version__", "9.9.9")
        others.append(key())
        patch.setattr(verification_record, "digest_of_code", lambda: "edited")
        others.append(key())
    task.backbone.model.config.text_config.num_attention_heads += 1
    others.append(key())
    assert len({same, *others}) == len(others) + 1
    before = key()
    task.backbone.model.config._name_or_path = "elsewhere"
    assert key() == before


def test_an_edit_of_the_code_gives_another_digest(tmp_path):
    """Before, an edit of `LoRA.forward` had no effect on a training, because the fast path had been checked before the edit."""
    source = Path(verification_record.__file__).parents[1]
    shutil.copytree(source, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    digest = verification_record.digest_of_code.__wrapped__
    assert digest(tmp_path / "package") == verification_record.digest_of_code()
    for name in ("lora/layer.py", "kernels/vit.py"):
        before = digest(tmp_path / "package")
        with (tmp_path / "package" / name).open("a") as file:
            file.write("# edited\n")
        assert digest(tmp_path / "package") != before


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": {}}', '"x"', "null"])
def test_a_damaged_record_is_no_record(content):
    key = {"base": "b"}
    verification_record.remember(key, [])
    assert verification_record.is_verified(key)
    files()[0].write_text(content)
    assert not verification_record.is_verified(key)
    verification_record.remember(key, [])
    assert json.loads(files()[0].read_text())["key"] == key


def test_without_a_place_to_remember_it_is_checked_each_time(make, monkeypatch, tmp_path, capsys):
    """An unwritable cache folder is no error. The fast path is checked in each run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        task, batch = learned("blip", make)
        check_training(task, batch)
        assert "equal up to rounding" in capsys.readouterr().out and task.backbone.fast


def test_too_little_memory_for_the_plain_path_is_reported(make, monkeypatch, capsys):
    """If the plain path runs out of memory, the fast path stays on and one line reports that they were not compared."""

    @functools.wraps(BlipTextSelfAttention.forward)
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(BlipTextSelfAttention, "forward", full)
    task, batch = learned("blip", make)
    check_training(task, batch)
    printed = capsys.readouterr().out
    assert "could not be compared (CUDA out of memory" in printed and task.backbone.fast and not files()


def test_one_process_that_differs_decides_for_all(make, capsys):
    """A difference on one rank switches the fast path off on all ranks."""

    class Two(verification.Ranks):
        def sum(self, *values: float) -> list[float]:
            return [value + (number == 0) for number, value in enumerate(values)]  # the other one found a difference

    task, _ = learned("blip", make)
    verification.check(task, {"base": "b"}, lambda: [], Two())
    assert "on another process" in capsys.readouterr().out and not task.backbone.fast and not files()


def test_fast_off_is_not_checked(make, capsys):
    task, batch = learned("blip", make, fast=False)
    check_training(task, batch)
    assert capsys.readouterr().out == "" and not files()


@pytest.mark.parametrize("fault", [None, wrong_scale])
def test_a_training_run_is_checked_before_its_first_step(checkpoints, tmp_path, monkeypatch, capsys, fault):
    """A run with a wrong fast path has the losses of FAST = False.

    A run with a correct one has the losses of an unchecked run.
    """
    data = tiny.write_photos(tmp_path, 8)

    def run(name: str, **more: Any) -> list[str]:
        config = TrainConfig(
            model=str(checkpoints["blip"]), annotations=str(data), output_dir=str(tmp_path / name), max_steps=2, batch_size=4,
            device="cpu", cache_gb=0, log_every=1, **more,
        )  # fmt: skip
        folder = train(config).parent
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    if fault:
        fault(monkeypatch)
    losses = run("checked")
    printed = capsys.readouterr().out
    assert ("WARNING: they differ" in printed) is bool(fault) and printed.index("comparing the fast path") < printed.index(
        "saved "
    )
    monkeypatch.setattr(verification_record, "is_verified", lambda _: True)
    assert losses == run("other", fast=not fault)


def test_captions_from_python_are_checked_too(make, tmp_path, capsys):
    tiny.write_photos(tmp_path, 2)
    task = CaptionTask(make("blip"))
    assert len(Captioner(task)(sorted((tmp_path / "photos").iterdir()))) == 2
    assert "equal up to rounding" in capsys.readouterr().err
