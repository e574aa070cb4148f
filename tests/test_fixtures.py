"""Adapters, run folders and checkpoints of earlier versions load, resume and give the recorded results."""

import json
import platform
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
import transformers

from lora_blip.config import InferConfig, TrainConfig
from lora_blip.inference.pipeline import infer
from lora_blip.lora import adapter_file, attached
from lora_blip.models.loading import load_backbone
from lora_blip.runtime import runs
from lora_blip.runtime.runs import ADAPTER_NAME
from lora_blip.training.loop import train
from tests.fixtures import bases

V1 = Path(__file__).parent / "fixtures" / "v1"
ADAPTERS = sorted(path.name for path in (V1 / "adapters").iterdir())
INTERRUPTED = sorted(path.name for path in (V1 / "interrupted").iterdir())
TIMES = ("seconds", "images_per_s")
ELSEWHERE = {"fp32": 1e-5, "bf16": 2e-2}  # of each tensor's norm: AdamW's first steps amplify what is rounded otherwise


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the files were written in: bases/, photos/ and annotations by relative paths."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(V1 / "data", tmp_path, dirs_exist_ok=True)
    return tmp_path


def settings_of(run: Path) -> TrainConfig:
    """The settings of a run folder; a setting that is newer than the folder has its default."""
    recorded = json.loads((run / "config.json").read_text())
    known = {field.name for field in fields(TrainConfig)}
    assert recorded.keys() <= known, f"settings of version one are gone: {recorded.keys() - known}"
    return TrainConfig(**recorded)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def same_machine() -> bool:
    """Return whether the libraries and the CPU equal those that wrote the files."""
    recorded = json.loads((V1 / "made_with.json").read_text())
    name = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ":").split(":")[1]
    now = {
        "torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__, "cpu": name.strip(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }  # fmt: skip
    return platform.machine() == "x86_64" and all(recorded[key] == value for key, value in now.items())


@pytest.mark.parametrize("kind", bases.TOKENIZER_OF)
def test_a_base_is_rebuilt_to_the_bit(here, kind):
    """A rebuilt base has the recorded weights, bit for bit, with any version of torch and NumPy."""
    folder = bases.build(kind, here / "bases" / kind)
    loaded = load_backbone(str(folder), "cpu").model.state_dict()
    recorded = json.loads((bases.BASES / kind / "weights.json").read_text())["weights"]
    for name, arguments in recorded.items():
        assert torch.equal(loaded[name], torch.from_numpy(bases.weight(name, *arguments))), name


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_version_one_gives_the_same_texts(name):
    """An adapter of version 1 gives the recorded texts, and rankings within 1e-5."""
    (path,) = (V1 / "adapters" / name).rglob(ADAPTER_NAME)
    base = Path(adapter_file.read(path).base)
    bases.build(base.name, base)
    question = "questions.jsonl" if name.startswith("vqa") else ""
    config = InferConfig(adapter=str(path), images="photos", question=question, device="cpu", precision="fp32", batch_size=5)
    recorded = V1 / "adapters" / name / "texts.jsonl"
    if recorded.exists():  # retrieval writes none
        now = lines(infer(replace(config, merge=False, output_dir="texts")).read_text())
        then = lines(recorded.read_text())
        assert [{key: line.get(key) for key in known} for known, line in zip(then, now, strict=True)] == then
    now = lines(infer(replace(config, texts="texts.txt", output_dir="ranking")).read_text())
    for then, line in zip(lines((V1 / "adapters" / name / "ranking.jsonl").read_text()), now, strict=True):
        assert (line["image"], line.get("question")) == (then["image"], then.get("question"))
        odds = [{entry["text"]: entry["probability"] for entry in each["ranking"]} for each in (line, then)]
        assert odds[0] == pytest.approx(odds[1], abs=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_version_one_is_saved_as_it_was(here, name):
    """An adapter of version 1 that is loaded and saved has the file's tensors, ranks and samples of the base."""
    (path,) = (V1 / "adapters" / name).rglob(ADAPTER_NAME)
    base = Path(adapter_file.read(path).base)
    backbone = load_backbone(str(bases.build(base.name, base)), "cpu")
    then = adapter_file.load(backbone, path)
    again = adapter_file.read(adapter_file.save(here / "again.safetensors", backbone, task=then.task))
    assert list(then.tensors) == list(again.tensors)
    assert all(torch.equal(then.tensors[key], again.tensors[key]) for key in then.tensors)
    assert again.metadata["lora"] == then.metadata["lora"]
    before, after = then.metadata["base"]["samples"], again.metadata["base"]["samples"]
    assert before == {path: after[path] for path in before}  # later versions sample the other linears too
    assert all(x.scale == x.site.alpha / x.site.r for x in attached.adapters(backbone.model).values())


def test_a_run_folder_of_version_one_is_found_and_read(here):
    """`latest` finds a finished run of version 1. Its settings and its best adapter load."""
    (source,) = (V1 / "adapters" / "caption_blip").glob("lora_*")
    shutil.copytree(source, here / "lora_blip_output" / source.name)
    bases.build("blip", here / "bases" / "blip")
    assert runs.locate("latest").parent.name == source.name
    config = settings_of(source)
    assert (config.targets, config.dropout, config.r) == ("vit.q:r=4,vit.v,text[1:2]:r=3", 0.1, 2)
    adapter_file.load(load_backbone("bases/blip", "cpu"), source / "best.safetensors")
    assert [entry["step"] for entry in lines((source / "metrics.jsonl").read_text()) if "loss" in entry][-1] == 60


@pytest.mark.loads
@pytest.mark.parametrize("name", INTERRUPTED)
def test_a_run_that_version_one_left_in_the_middle_of_a_step_ends_in_its_adapter(here, name, capsys):
    """Law 6 across versions: a resumed run of version 1 ends in the recorded adapter.

    Bit for bit with the same libraries and CPU, else within a bound of the norm of each tensor."""
    (source,) = (V1 / "interrupted" / name).glob("lora_*")
    config = settings_of(source)
    bases.build(Path(config.model).name, Path(config.model))
    run = here / config.output_dir / source.name
    shutil.copytree(source, run)
    exact, bound = same_machine(), ELSEWHERE[config.precision]
    path = train(config if exact else replace(config, resume=str(run), allow_changed=True))
    assert path.parent.resolve() == run.resolve(), capsys.readouterr().out  # it was taken up, not begun again
    then, now = adapter_file.read(V1 / "interrupted" / name / "final.safetensors"), adapter_file.read(path)
    assert list(then.tensors) == list(now.tensors)
    for key, value in then.tensors.items():
        if exact:
            assert torch.equal(now.tensors[key], value), key
        else:
            assert (now.tensors[key] - value).norm() <= bound * value.norm(), key
    temperatures = [each.task.get("temperature", 1.0) for each in (now, then)]  # retrieval's
    assert temperatures[0] == pytest.approx(temperatures[1], rel=0 if exact else bound)
    recorded = lines((V1 / "interrupted" / name / "final_metrics.jsonl").read_text())
    resumed = lines((run / "metrics.jsonl").read_text())
    for one, other in zip(recorded, resumed, strict=True):
        assert {key: other[key] for key in one if key not in TIMES} == pytest.approx(
            {key: value for key, value in one.items() if key not in TIMES}, rel=0 if exact else bound
        )
    assert not (run / "checkpoints").exists() and [p.name for p in run.parent.glob("[!.]*")] == [source.name]
