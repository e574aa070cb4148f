"""GENERATION from a setting to an adapter, its predictions, and the files of a run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_blip
from lora_blip.config import EvaluateConfig, InferConfig, TrainConfig
from lora_blip.errors import AdapterError, ConfigError, InputError
from lora_blip.evaluation.comparison import evaluate
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.mixed_batches import mixed
from lora_blip.inference.pipeline import infer
from lora_blip.inference.prediction import format_prediction
from lora_blip.inference.setup import task_of
from lora_blip.lora import adapter_file
from lora_blip.lora.adapter_file import Adapter
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training.loop import train
from lora_blip.training.setup import task_for
from tests.support import tiny
from tests.support.models import carry
from tests.support.runs import settings

OPTIONS = {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 1.5, "top_p": 0.9}


@pytest.fixture(scope="module")
def adapter(checkpoints, tmp_path_factory) -> Path:
    """Return the file of an adapter that was trained with OPTIONS."""
    folder = tmp_path_factory.mktemp("trained")
    config = settings(checkpoints["blip"], tiny.write_photos(folder), generation=OPTIONS, epochs=1)
    return train(config)


def test_an_adapter_contains_its_options_and_one_without_has_none(adapter, checkpoints, tmp_path, capsys):
    """Without GENERATION, the file is that of earlier versions, which have no such setting."""
    loaded = adapter_file.read(adapter)
    stored = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    assert loaded.task["generation"] == stored | {k: v for k, v in OPTIONS.items() if k != "num_beams"}
    assert loaded.metadata["training"]["settings"]["generation"] == {k: v for k, v in OPTIONS.items() if k != "num_beams"}
    capsys.readouterr()
    plain = adapter_file.read(train(settings(checkpoints["blip"], tiny.write_photos(tmp_path), num_beams=3, epochs=1)))
    assert plain.task["generation"] == stored and "generation" not in plain.metadata["training"]["settings"]
    assert "has no effect" not in capsys.readouterr().out


def test_inference_uses_the_options_of_the_adapter_or_those_that_are_set(adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 3)
    config = InferConfig(adapter=str(adapter), images="photos", device="cpu", output_dir="own")
    lines = [json.loads(line) for line in infer(config).read_text().splitlines()]
    assert "generation: top_p has no effect: `do_sample` is not set" in capsys.readouterr().out
    for line in lines:
        assert set(line) == {"image", "text", "alternatives"} and len(line["alternatives"]) == 2
        assert line["text"] == line["alternatives"][0]["text"] and 0 < line["alternatives"][0]["score"] < 1
    page = (tmp_path / "own" / "gallery.html").read_text()
    assert '"alternatives": [[' in page.replace('"alternatives":[[', '"alternatives": [[')
    photos = sorted((tmp_path / "photos").iterdir())
    named = {"generation": {"num_return_sequences": None, "num_beams": 2}}
    for options, several in (({}, 2), (named, 0), ({"generation": {"num_return_sequences": 3}}, 3)):
        captioner = Captioner.from_adapter(adapter, device="cpu", **options)
        generation: Any = captioner.runner.task.generation
        assert generation.num_beams == (2 if options is named else 3)
        assert generation.options.get("num_return_sequences") == (several or None)
        predictions = captioner(photos)
        assert all(len(prediction.alternatives) == several for prediction in predictions)
        if not options:
            assert [p.text for p in predictions] == [line["text"] for line in lines]
            assert predictions[0].alternatives[0] == (predictions[0].text, predictions[0].score)
    with pytest.raises(ConfigError, match="num_return_sequences"):
        Captioner.from_adapter(adapter, num_beams=1)
    infer(replace(config, output_dir="one", generation={"num_return_sequences": None}))
    line = json.loads((tmp_path / "one" / "predictions.jsonl").read_text().splitlines()[0])
    assert set(line) == {"image", "text"}
    identity = json.loads((tmp_path / "own" / "run.json").read_text())["run"]
    assert identity["repetition_penalty"] == 1.5 and identity["num_return_sequences"] == 2


def test_evaluation_scores_the_first_text(adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no Java
    references = tiny.write_photos(tmp_path, 4)
    config = EvaluateConfig(references=str(references), adapter=str(adapter), base=False, device="cpu", output_dir="scores")
    evaluate(config)
    lines = [json.loads(line) for line in (tmp_path / "scores" / "adapted.jsonl").read_text().splitlines()]
    firsts = {p.image.name: p.text for p in Captioner.from_adapter(adapter, device="cpu")(sorted(Path("photos").iterdir()))}
    assert {Path(line["image"]).name: line["text"] for line in lines} == firsts


def test_hostile_and_unknown_options_of_an_adapter(adapter, make, capsys):
    """An unknown option is reported and ignored. A wrong value is an error that names the flag that replaces it."""
    backbone, loaded = make("blip"), adapter_file.read(adapter)

    def opened(options: dict[str, Any], **named: Any) -> Generation:
        metadata = loaded.metadata | {"task": loaded.task | {"generation": options}}
        config = InferConfig(adapter=str(adapter), **named)
        return task_of(backbone, Adapter(loaded.path, loaded.tensors, metadata), config).generation

    assert opened({"top_k": 5, "cache_implementation": "static", "brilliance": 9}) == Generation.of({"top_k": 5})
    printed = capsys.readouterr().out
    assert "ignored generation options of the adapter, unknown here: brilliance, cache_implementation\n" in printed
    for wrong in ({"top_p": 7}, {"suppress_tokens": "x"}, {"num_return_sequences": 2}, {"temperature": -1}):
        (name,) = wrong
        with pytest.raises(AdapterError, match=rf"adapter.safetensors: generation.*{name}.*--generation {name}=null"):
            opened(wrong)
        assert opened(wrong, generation={name: None}) == Generation()


def test_sampling_in_the_api_depends_on_the_seed_and_the_image(adapter, tmp_path):
    """An image has the same text in a list, alone, as a path and as bytes. Another seed gives other texts."""
    photos = sorted((tiny.write_photos(tmp_path, 3).parent / "photos").iterdir())
    options = {"do_sample": True, "num_beams": 1, "num_return_sequences": None, "temperature": 3.0}
    seeded = {seed: Captioner.from_adapter(adapter, generation=options, seed=seed, device="cpu") for seed in (0, 1)}
    together = [prediction.text for prediction in seeded[0](photos)]
    assert [seeded[0](photo).text for photo in photos] == together
    assert [prediction.text for prediction in seeded[0]([photos[2].read_bytes(), photos[0]])] == [together[2], together[0]]
    assert [prediction.text for prediction in seeded[1](photos)] != together


def test_sampled_texts_of_a_run_do_not_depend_on_the_batches(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_photos(tmp_path, 5)
    config = InferConfig(
        model=str(checkpoints["blip"]), adapter="none", images="photos", device="cpu", generation={"do_sample": True},
        max_new_tokens=5, output_dir="a",
    )  # fmt: skip
    one = infer(replace(config, batch_size=2)).read_bytes()
    assert infer(replace(config, batch_size=5, output_dir="b")).read_bytes() == one
    assert infer(replace(config, seed=1, output_dir="c")).read_bytes() != one
    assert json.loads((tmp_path / "a" / "run.json").read_text())["run"]["seed"] == 0


def test_validation_uses_the_options(checkpoints, tmp_path, monkeypatch):
    """The sampling options, the seed of the run and the names of the images are passed to every generation."""
    calls: list[dict[str, Any]] = []
    real = lora_blip.models.language.Language.generate_from_features  # type: ignore[attr-defined]
    monkeypatch.setattr(
        "lora_blip.models.language.Language.generate_from_features",
        lambda self, *rows, **named: (calls.append(named), real(self, *rows, **named))[1],
    )
    options = {"do_sample": True, "top_k": 7, "num_return_sequences": 2, "min_new_tokens": 3}
    train(settings(checkpoints["opt"], tiny.write_photos(tmp_path), generation=options, max_new_tokens=0, epochs=1, seed=3))
    assert calls and all(call.items() >= (options | {"seed": 3}).items() for call in calls)
    assert all(name.endswith(".png") for call in calls for name in call["images"])


def test_options_of_generation_are_reported_if_texts_are_ranked(checkpoints, make, tmp_path, capsys):
    """The warning is printed for a ranking, for retrieval and for training of retrieval, but not if no option is set."""
    line = "generation: {} no effect: texts are ranked, and none is generated\n"
    task_of(make("blip"), None, InferConfig(model="x", adapter="none", texts="a|b", sample=True, generation={"top_p": 0.5}))
    assert line.format("sample, top_p have") in capsys.readouterr().out
    task_of(make("itm"), None, InferConfig(model="x", adapter="none", num_beams=3))
    assert line.format("num_beams has") in capsys.readouterr().out
    task_of(make("itm"), None, InferConfig(model="x", adapter="none"))
    assert "no effect" not in capsys.readouterr().out
    source = tiny.write_photos(tmp_path)
    config = settings(checkpoints["itm"], source, generation={"do_sample": True, "top_k": 5}, task="retrieval")
    task_for(replace(config, max_new_tokens=0, best_by="auto"), make("itm"))
    assert line.format("do_sample, top_k have") in capsys.readouterr().out


def test_wrong_options_are_an_error_before_the_model_is_loaded(checkpoints, tmp_path):
    source = tiny.write_photos(tmp_path)
    for kind, named in ((train, settings(checkpoints["blip"], source)), (infer, InferConfig(model="nowhere", adapter="none"))):
        with pytest.raises(ConfigError, match="did you mean num_beams"):
            kind(replace(named, model="nowhere", generation={"num_beam": 3}))  # type: ignore[operator]


def test_several_texts_are_printed_and_written_to_json(make, tmp_path):
    tiny.write_photos(tmp_path, 1)
    task = CaptionTask(make("blip"), "", Generation.of({"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 4}))
    prediction = Captioner(task)(tmp_path / "photos" / "0.png")
    (first, second) = prediction.alternatives
    printed = format_prediction(prediction).splitlines()
    assert printed[1] == f"Caption:  {first[1]:6.1%}  {first[0]}" and printed[2].endswith(f"{second[1]:6.1%}  {second[0]}")
    assert prediction.to_dict()["alternatives"] == [{"text": text, "score": score} for text, score in (first, second)]


def test_several_texts_in_a_mixed_call(make, tmp_path):
    """Each request has the texts that its adapter generates for this request alone."""
    backbone = carry(make("opt"))
    generation = Generation.of({"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6})
    tasks = {"vqa": CaptionTask(backbone, "", generation), "third": CaptionTask(backbone, "a photo of", generation)}
    tiny.write_photos(tmp_path, 3)
    photos = sorted((tmp_path / "photos").iterdir())
    requests = [(photo, name, "") for photo in photos for name in tasks]
    predictions = list(mixed(tasks, requests, batch_size=4))
    for prediction, (photo, name, _) in zip(predictions, requests, strict=True):
        with lora_blip.use_adapters(backbone, name), torch.no_grad():
            alone = Captioner(tasks[name])(photo)
        assert [text for text, _ in prediction.alternatives] == [text for text, _ in alone.alternatives]
        assert len(prediction.alternatives) == 3


def test_options_are_a_part_of_a_run_to_resume() -> None:
    """A config with other options belongs to another run. A config with options is hashable."""
    assert TrainConfig(generation={"top_k": 3}) != TrainConfig() and hash(TrainConfig(generation={"top_k": 3}))


def test_options_in_python_that_are_no_dict_are_an_error_with_an_example():
    with pytest.raises(InputError, match=r"generation is 'num_beams=3'; give a dict, such as generation=\{"):
        Captioner.from_adapter("latest", generation="num_beams=3")  # type: ignore[arg-type]
