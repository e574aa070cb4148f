"""INIT_ADAPTER: a training that begins with the values of an adapter, with a new schedule and a new optimizer."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora_blip.config import EvaluateConfig, InferConfig, TrainConfig
from lora_blip.errors import AdapterError, CheckpointError
from lora_blip.evaluation.comparison import evaluate
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.pipeline import infer
from lora_blip.lora import adapter_file, injection
from lora_blip.lora.sites import Site
from lora_blip.lora.targets import parse
from lora_blip.runtime.agreement import changes
from lora_blip.runtime.distributed import ALONE
from lora_blip.runtime.runs import ADAPTER_NAME, CHECKPOINTS_NAME, locate_initial, run_to_resume
from lora_blip.training import initial_adapter
from lora_blip.training.loop import train
from lora_blip.training.session import Session, start_session
from lora_blip.training.validation import validate
from tests.support import tiny
from tests.support.runs import assert_same, before_each_step, config_of, lines, metrics_of


@pytest.fixture(scope="module")
def first(checkpoints, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """Return a finished run on the ViT and the text model, with its settings."""
    config = config_of(checkpoints, tmp_path_factory.mktemp("first"), targets="vit,text", epochs=1, dropout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_blip.reports.plots.draw", lambda _: None)
        return config, train(config)


def further(first: tuple[TrainConfig, Path], tmp_path: Path, **changes: object) -> TrainConfig:
    config, path = first
    return replace(config, **({"init_adapter": str(path), "output_dir": str(tmp_path / "runs"), "seed": 5} | changes))


def held(path: Path) -> dict[str, torch.Tensor]:
    return adapter_file.read(path).tensors


@pytest.mark.parametrize("targets", [pytest.param("vit,text", marks=pytest.mark.slow), "vit"])
def test_the_loss_at_step_0_is_that_of_the_loaded_adapter(first, tmp_path, make, targets):
    """The loss is that of all validation lines, also if only a part of the adapter is trained further."""
    config = further(first, tmp_path, targets=targets)
    path = train(config)
    with started(config) as session:
        backbone = make("blip")
        adapter_file.load(backbone, config.init_adapter)
        loaded = type(session.task)(backbone, session.task.prompt, session.task.generation)
        scores = validate(loaded, session.held_out, session.autocast, "loss", session.learner.ranks)
    assert lines(path)[0]["step"] == 0 and lines(path)[0]["val_loss"] == pytest.approx(scores["loss"], abs=1e-6)


@contextmanager
def started(config: TrainConfig) -> Iterator[Session]:
    """Yield the session of a run that makes no step."""
    with ExitStack() as closing:
        session = start_session(ALONE, replace(config, output_dir=f"{config.output_dir}_2"), closing)
        closing.callback(session.run.close)
        yield session


def test_a_part_of_the_adapter_is_trained_and_the_rest_is_saved_unchanged(first, tmp_path, capsys):
    """A target that is not in the initial adapter gets a new adapter, whose update is zero at the start."""
    before = held(first[1])
    assert {key.split(".")[0] for key in before} == {"vision_model", "text_decoder"}
    after = held(train(further(first, tmp_path, targets="vit")))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) is not key.startswith("vision_model"), key
    count = sum(key.endswith("lora_A") and not key.startswith("vision_model") for key in before)
    printed = capsys.readouterr().out
    assert f"; {count} modules of it, such as 'text_decoder" in printed and "unchanged in this training" in printed
    small = train(replace(first[0], targets="vit", output_dir=str(tmp_path / "small")))
    initial = {}

    def note(count, learner):
        if count == 1:
            initial.update({name: p.detach().clone() for name, p in learner.parameters.items()})

    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, note)
        train(further(first, tmp_path, init_adapter=str(small.parent), output_dir=str(tmp_path / "larger")))
    best = held(small.with_name("best.safetensors")) if small.with_name("best.safetensors").exists() else held(small)
    assert all(torch.equal(initial[key], value) for key, value in best.items())
    assert not any(value.any() for key, value in initial.items() if key.endswith("lora_B") and key not in best)
    assert "not in it: new adapters" in capsys.readouterr().out


def test_training_continues_as_a_new_run_whose_adapters_have_these_values(first, tmp_path, monkeypatch):
    """The adapters, best adapters and metrics are equal bit for bit. The metadata names the source, the settings the path."""
    path = train(further(first, tmp_path))
    config = further(first, tmp_path, init_adapter="", output_dir=str(tmp_path / "oracle"))
    tensors = held(first[1])
    real = injection.inject

    def inject(model, sites, dropout):
        loras = real(model, sites, dropout)
        for address, lora in loras.items():
            lora.A.data.copy_(tensors[f"{address}.lora_A"])
            lora.B.data.copy_(tensors[f"{address}.lora_B"])
        return loras

    with monkeypatch.context() as patch:
        patch.setattr(initial_adapter.injection, "inject", inject)
        oracle = train(config)
    assert_same(path, oracle)
    assert [entry["lr"] for entry in metrics_of(path) if "lr" in entry] == [
        entry["lr"] for entry in metrics_of(oracle) if "lr" in entry
    ]
    training, plain = (adapter_file.read(each).metadata["training"] for each in (path, oracle))
    source = {"path": str(first[1]), "sha256": adapter_file.digest(tensors)[:16]}
    assert training["init_adapter"] == source and training["settings"]["init_adapter"] == str(first[1])
    assert "init_adapter" not in plain and "init_adapter" not in plain["settings"]  # the metadata of earlier versions


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_its_initial_adapter(first, tmp_path):
    """The result is equal bit for bit, also with "latest", which is never the interrupted run. Without it, a new run starts."""
    uninterrupted = train(further(first, tmp_path, output_dir=str(tmp_path / "whole")))
    config = further(first, tmp_path, init_adapter="latest")
    finished = tmp_path / "runs" / "finished" / ADAPTER_NAME
    finished.parent.mkdir(parents=True)
    finished.write_bytes(first[1].read_bytes())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        before_each_step(patch, lambda count, _: 1 // (2 - count))
        train(config)
    (run,) = (path.parent for path in (tmp_path / "runs").glob(f"*/{CHECKPOINTS_NAME}"))
    other = train(replace(config, init_adapter="", max_steps=1, epochs=1))
    other.unlink()
    assert other.parent != run
    path = train(config)
    assert path.parent == run
    assert_same(path, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"has r = 2 and alpha = 4 at .*this training has r = 4 .*use those of the adapter: --r 2 --alpha 4$"),
        ({"alpha": 8.0}, r"this training has r = 2 and alpha = 8; use those of the adapter: --r 2 --alpha 4$"),
        ({"targets": "vit.q"}, r"do not agree on .*the targets of the adapter: --targets vit,text --r 2 --alpha 4.0$"),
        ({"model": "other"}, r"are not those of the training; the adapter was trained on .*: --model \S*blip$"),
        ({"model": "opt", "targets": "vit"}, r"this model has no linear .*: --model \S*blip$"),
        ({"init_adapter": "nowhere"}, r"init_adapter = 'nowhere' \(--init-adapter\): no adapter at 'nowhere'"),
        ({"init_adapter": "latest"}, "has no finished run; give the path of an adapter"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_error_with_the_fix(first, checkpoints, tmp_path, changes, message):
    """The error is raised before the first step and before the run folder is created."""
    if changes.get("model") == "other":
        from transformers import BlipForConditionalGeneration

        tiny.save_blip(tmp_path / "base")
        model = BlipForConditionalGeneration.from_pretrained(tmp_path / "base")
        model.vision_model.encoder.layers[0].mlp.fc1.weight.data.mul_(1.5)
        model.save_pretrained(tmp_path / "base")
        changes = {"model": str(tmp_path / "base")}
    elif "model" in changes:
        changes = changes | {"model": str(checkpoints[changes["model"]])}
    with pytest.raises(AdapterError, match=message):
        train(further(first, tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


def test_another_base_at_inference_gives_the_setting_that_uses_the_base_of_the_adapter(first, checkpoints):
    with pytest.raises(AdapterError, match=r'load that base by MODEL = "" \(--model ""; in Python: without base or model\)$'):
        Captioner.from_adapter(first[1], base=str(checkpoints["opt"]), device="cpu")


def test_another_base_is_an_error_before_any_prediction(first, checkpoints, tmp_path, monkeypatch):
    """`evaluate` scored the whole base first. No output folder is created."""
    monkeypatch.setattr("lora_blip.evaluation.comparison.measure", None)
    same = {"model": str(checkpoints["opt"]), "adapter": str(first[1]), "device": "cpu", "output_dir": str(tmp_path / "out")}
    with pytest.raises(AdapterError, match="load that base by MODEL = "):
        evaluate(EvaluateConfig(references=first[0].annotations, train_annotations="none", **same))
    with pytest.raises(AdapterError, match="load that base by MODEL = "):
        infer(InferConfig(images=str(Path(first[0].annotations).parent / "photos"), **same))
    assert not (tmp_path / "out").exists()


def test_an_initial_adapter_of_another_task_is_named(first, checkpoints, tmp_path):
    """Its base cannot be used for this training."""
    source = Path(first[0].annotations).with_name("questions.jsonl")
    rows = [json.loads(line) for line in Path(first[0].annotations).read_text().splitlines()]
    asked = [{"image": row["image"], "question": "what is it?", "answers": [row["text"]]} for row in rows]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in asked))
    config = further(first, tmp_path, model=str(checkpoints["vqa"]), task="vqa", annotations=str(source))
    with pytest.raises(
        AdapterError, match=r"It is for the task caption, and this training is for vqa: give the path of an adapter of this"
    ):
        train(config)


def test_a_changed_initial_adapter_is_described_without_its_digest():
    some = [{"init_adapter": value} for value in ("", "a1b2", "c3d4")]
    expected = ["init_adapter was not set and is set", "init_adapter has other weights", "init_adapter was set and is not set"]
    assert [changes(*pair) for pair in zip(some, [*some[1:], some[0]], strict=True)] == [[each] for each in expected]


@pytest.mark.parametrize("alpha", [4 * 2**0.5, 1e-5, 12, 0.1 + 0.2])
def test_the_printed_alpha_is_that_of_the_adapter(alpha):
    """An adapter of peft with rsLoRA and DoRA has alpha · √r. The flag with a rounded value would be refused again."""
    adapter = SimpleNamespace(path="a", variant="lora", metadata={}, sites=[Site("fc1", 8, alpha), Site("fc2", 4, alpha)])
    with pytest.raises(AdapterError, match=r"use those of the adapter: --targets \S+$") as raised:
        initial_adapter.check_sites(adapter, [Site("fc1", 8, 33.0)])
    first, second = str(raised.value).split("--targets ")[1].split(",")
    assert [parse(target, 1, 1.0).alpha for target in (first, second)] == [alpha, alpha]
    adapter.sites.pop()
    assert float(initial_adapter.fitting_flags(adapter).split("--alpha ")[1]) == alpha


@pytest.mark.slow
def test_another_image_size_is_an_error_unless_it_is_chosen(first, tmp_path):
    config = further(first, tmp_path, image_size=48)
    with pytest.raises(AdapterError, match=r"trained on images of 48×48.*uses 32×32; set IMAGE_SIZE = 48 \(--image-size 48\)"):
        train(replace(config, init_adapter=str(train(config)), image_size=0, max_steps=1))


def test_the_temperature_of_a_retrieval_adapter_continues(checkpoints, tmp_path):
    config = config_of(checkpoints, tmp_path, "itm", dropout=0.0, accumulation=1, batch_size=4, max_steps=3, lr=0.5)
    path = train(config)
    temperature = adapter_file.read(path).task["temperature"]
    started = []
    with pytest.MonkeyPatch.context() as patch:
        before_each_step(patch, lambda _, learner: started.append(learner.task.temperature.item()))
        train(replace(config, init_adapter=str(path), output_dir=str(tmp_path / "second")))
    assert started[0] == pytest.approx(temperature) and temperature != pytest.approx(0.07)


def test_the_resume_of_a_finished_run_prints_the_command_that_continues(first, monkeypatch):
    """The message has the user's command with INIT_ADAPTER instead of RESUME. In Python, it has the settings."""
    run = first[1].parent
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(run), "--epochs", "3"])
    with pytest.raises(CheckpointError) as caught:
        run_to_resume(run)
    command = f"python train.py --epochs 3 --resume off --init-adapter {run}"
    assert (
        str(caught.value)
        == f"resume = {str(run)!r}: the run is finished; to train its adapter further, in a new run: {command}"
    )
    monkeypatch.setattr(sys, "argv", ["service.py"])
    with pytest.raises(CheckpointError, match='RESUME = "off" and INIT_ADAPTER = '):
        train(replace(first[0], resume=str(run)))


def test_latest_is_the_newest_finished_run(tmp_path):
    for name in ("older", "newer", "interrupted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ADAPTER_NAME).touch()
    (tmp_path / "interrupted" / CHECKPOINTS_NAME).mkdir()
    os.utime(tmp_path / "older" / ADAPTER_NAME, (1, 1))
    assert locate_initial("latest", tmp_path) == tmp_path / "newer" / ADAPTER_NAME
    assert locate_initial(str(tmp_path / "older")) == tmp_path / "older" / ADAPTER_NAME


def test_the_end_compares_with_the_initial_adapter(first, tmp_path, capsys):
    train(further(first, tmp_path, max_steps=1))
    assert ": initial adapter " in capsys.readouterr().out


def test_settings_of_the_initial_adapter_that_are_replaced_are_named(first, tmp_path, capsys):
    """Its options of generation, and other held-out lines. The same settings give no note."""
    config = further(first, tmp_path, seed=first[0].seed, output_dir=str(tmp_path / "same"), max_steps=1)
    path = train(replace(config, init_adapter="", generation={"num_beams": 2, "no_repeat_ngram_size": 2}))
    capsys.readouterr()
    train(replace(config, init_adapter=str(path), num_beams=2, generation={"no_repeat_ngram_size": 2}))
    assert "note:" not in capsys.readouterr().out
    train(replace(config, init_adapter=str(path), seed=7))
    printed = capsys.readouterr().out
    assert "validated with GENERATION = {'no_repeat_ngram_size': 2, 'num_beams': 2}, and this training has" in printed
    assert f"note: the initial adapter was trained on other lines (SEED was {config.seed} and is 7). If it has" in printed
