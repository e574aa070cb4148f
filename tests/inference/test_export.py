"""An exported folder predicts in transformers alone what the adapter predicts here, and it exists only if it does."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora_blip
from lora_blip import InferConfig, cli
from lora_blip.errors import AdapterError, ConfigError, ModelError, OutputError
from lora_blip.inference import export_check, exported_folder
from lora_blip.inference.export import ExportConfig, check_paths, export
from lora_blip.models.loading import load_backbone
from tests.support import tiny
from tests.support.models import WHOLE, inject

ROOT = Path(__file__).resolve().parents[2]
IMAGES = sorted((ROOT / "image_test").glob("*.png"))
ASSETS = {"blip": "tiny-blip", "opt": "tiny-blip2", "vqa": "tiny-blip-vqa", "itm": "tiny-blip-itm"}
TASKS = {"vqa": "vqa", "itm": "retrieval", "itm2": "retrieval"}
QUESTION, TEXTS = "what color is it?", list(export_check.TEXTS)

# What a user writes: it knows only the folder. `lora_blip` and `peft` cannot be imported.
ALONE = """
import json, sys
sys.modules |= {"lora_blip": None, "peft": None}
import torch, transformers
from PIL import Image
from transformers.utils import logging
logging.disable_progress_bar()
images = [Image.open(path).convert("RGB") for path in json.loads(sys.argv[2])]
results = {"version": transformers.__version__}
for folder, kind, prompt in json.loads(sys.argv[1]):
    model = getattr(transformers, kind).from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    inputs = processor(images=images, text=[prompt] * len(images), return_tensors="pt").to(model.dtype)
    ids = model.generate(**inputs)
    results[folder] = [" ".join(text.split()) for text in processor.batch_decode(ids, skip_special_tokens=True)]
    if folder.endswith("opt"):
        pipe = transformers.pipeline("image-text-to-text", model=folder)
        results["pipeline"] = [pipe(image, text="")[0]["generated_text"] for image in images[:2]]
assert sys.modules["lora_blip"] is sys.modules["peft"] is None
print(json.dumps(results))
"""


def adapter_of(base: str, path: Path, kind: str, **task: Any) -> Path:
    """Save an adapter on every part of a base, with updates that change its predictions, and return its path."""
    backbone = load_backbone(base, "cpu", image_size=task.pop("image_size", 0))
    backbone.name = base
    for lora in inject(SimpleNamespace(model=backbone.model, name=kind), WHOLE[kind], trained=False).values():
        lora.B.data.normal_(std=0.02)
    entry = {"name": TASKS.get(kind, "caption"), "prompt": "", "generation": {"max_new_tokens": 24}} | task
    return lora_blip.save_adapter(path, backbone, task=entry)


def base_of(kind: str, checkpoints: dict[str, Path]) -> str:
    return str(ROOT / "assets" / ASSETS[kind]) if kind in ASSETS else str(checkpoints[kind])


def exported(adapter: Path, folder: Path, **settings: Any) -> Path:
    export(ExportConfig(adapter=str(adapter), output_dir=str(folder), device="cpu", **settings))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> dict[str, tuple[Path, Path]]:
    """Return {kind: (adapter, exported folder)}."""
    root, result = tmp_path_factory.mktemp("export"), {}
    for kind in WHOLE:
        adapter = adapter_of(base_of(kind, checkpoints), root / f"{kind}.safetensors", kind)
        result[kind] = adapter, exported(adapter, root / kind)
    return result


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return {key: value for path in Path(folder).glob("*.safetensors") for key, value in load_file(path).items()}


def without_files(folder: Path) -> bool:
    """Return True if neither a folder nor a temporary one remains beside the adapters."""
    return all(path.suffix == ".safetensors" for path in folder.iterdir())


# ---------------------------------------------------------------- predictions


@pytest.mark.slow
def test_a_process_without_lora_blip_writes_the_same_texts_without_a_warning(folders, tmp_path):
    """All of image_test/ with BLIP, OPT, T5 and a VQA model. Plain `generate` stops where the adapter does."""
    kinds = {kind: load_backbone(str(folders[kind][1]), "cpu").architecture for kind in ("blip", "opt", "t5", "vqa")}
    jobs = [[str(folders[kind][1]), name, QUESTION if kind == "vqa" else ""] for kind, name in kinds.items()]
    images = list(map(str, IMAGES))
    process = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(jobs), json.dumps(images)],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == "", "no warning"
    texts = json.loads(process.stdout)
    assert texts["version"] == transformers.__version__
    for kind in kinds:
        adapter, folder = folders[kind]
        captioner = lora_blip.Captioner.from_adapter(adapter, device="cpu", merge=False)
        predictions = captioner.answer(images, QUESTION) if kind == "vqa" else captioner(images)
        assert texts[str(folder)] == [prediction.text for prediction in predictions]
        assert len(set(texts[str(folder)])) > 1 or kind == "vqa", "the images have different texts"
    assert texts["pipeline"] == texts[str(folders["opt"][1])][:2]


@pytest.mark.parametrize("kind", ["blip", "t5", "vqa", "itm", "itm2"])
def test_the_code_of_the_card_runs_and_predicts_the_same(folders, kind, capsys):
    adapter, folder = folders[kind]
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert len(blocks) == (2 if kind in ("blip", "t5") else 1)
    capsys.readouterr()
    for block in blocks:
        exec(block.replace("FOLDER", str(folder)).replace("photo.jpg", str(IMAGES[0])), {})
    output = capsys.readouterr().out
    captioner = lora_blip.Captioner.from_adapter(adapter, device="cpu", merge=False)
    if kind in ("itm", "itm2"):
        ranking = dict(captioner.rank(str(IMAGES[0]), ["a red cube", "a blue cube"]).ranking)
        expected = torch.tensor([ranking[text] for text in ("a red cube", "a blue cube")])
        numbers = torch.tensor([float(number) for number in re.findall(r"\d\.\d+", output)[:2]])
        assert torch.allclose(numbers, expected, atol=1e-4)
    else:
        text = (captioner.answer(str(IMAGES[0]), QUESTION) if kind == "vqa" else captioner(str(IMAGES[0]))).text
        assert output.count(text) == len(blocks)


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_the_adapters_prompt_and_generation_are_in_the_folder(checkpoints, tmp_path, kind):
    """`export` compares the texts itself, with these options."""
    options = {"max_new_tokens": 9, "num_beams": 3, "repetition_penalty": 1.2, "num_return_sequences": 2}
    prompt = "" if kind == "t5" else "a picture of"  # the tokenizer of this T5 is one of OPT, without </s> at the end
    adapter = adapter_of(base_of(kind, checkpoints), tmp_path / "a.safetensors", kind, prompt=prompt, generation=options)
    folder = exported(adapter, tmp_path / "out")
    stored = json.loads((folder / "generation_config.json").read_text())
    assert {name: stored[name] for name in options} == options
    assert kind == "t5" or "`a picture of`" in (folder / "README.md").read_text("utf-8")


def test_an_adapter_that_samples_is_compared_greedily(checkpoints, tmp_path):
    options = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.7}
    adapter = adapter_of(base_of("opt", checkpoints), tmp_path / "a.safetensors", "opt", generation=options)
    stored = json.loads((exported(adapter, tmp_path / "out") / "generation_config.json").read_text())
    assert (stored["do_sample"], stored["temperature"]) == (True, 0.7)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", WHOLE)
def test_the_folder_has_the_keys_and_the_config_of_the_base(folders, checkpoints, kind):
    """Weights without an adapter are equal to the base's; every adapted weight is W + ΔW."""
    base, (adapter, folder) = base_of(kind, checkpoints), folders[kind]
    own, merged = weights_of(base), weights_of(folder)
    assert own.keys() == merged.keys()
    loaded = lora_blip.load_backbone(base, "cpu")
    changed = {site.module for site in lora_blip.load_adapter(loaded, adapter).sites}
    for key, value in own.items():
        equal = torch.equal(value.float(), merged[key])
        assert equal or any(f"{path}.weight".endswith(key) for path in changed), key
    assert sum(not torch.equal(value.float(), merged[key]) for key, value in own.items()) == len(changed)
    configs = [json.loads((Path(place) / "config.json").read_text()) for place in (base, folder)]
    for config in configs:
        for part in (config, *(config.get(key, {}) for key in exported_folder.PARTS)):
            part.pop("dtype", None)
            part.pop("transformers_version", None)
        for name in ("max_new_tokens", "decoder_start_token_id"):
            config["text_config"].pop(name, None)
    assert configs[0] == configs[1]


def test_the_weights_are_merged_in_float32_and_then_cast(folders, tmp_path):
    adapter, whole = folders["opt"]
    half, wide = weights_of(exported(adapter, tmp_path / "half", dtype="bfloat16")), weights_of(whole)
    assert all(torch.equal(half[key], value.bfloat16()) for key, value in wide.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_weights_are_split_into_files(folders, tmp_path):
    adapter, whole = folders["blip"]
    folder = exported(adapter, tmp_path / "out", shard_gb=0.002)
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and (folder / "model.safetensors.index.json").is_file()
    parts, one = weights_of(folder), weights_of(whole)
    assert parts.keys() == one.keys() and all(torch.equal(parts[key], one[key]) for key in one)


def test_another_image_size_is_in_the_folder(checkpoints, tmp_path):
    adapter = adapter_of(base_of("blip", checkpoints), tmp_path / "a.safetensors", "blip", image_size=64)
    folder = exported(adapter, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["vision_config"]["image_size"] == 64
    assert load_backbone(str(folder), "cpu").image_size == 64


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", ["blip", "opt", "vqa", "itm"])
def test_a_base_with_nan_is_not_exported(folders, checkpoints, tmp_path, kind):
    """Before, "4 of 4 texts are equal, the largest logit difference is 0" was printed: NaN was left out."""
    base = shutil.copytree(base_of(kind, checkpoints), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.startswith("vision_model") and name.endswith("norm2.weight"))
    weights[name][0] = torch.nan
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match=r"not written: .*base are not finite: the weight 'vision_model.* contains NaN"):
        exported(folders[kind][0], tmp_path / "out", model=str(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["weights", "generation"])
def test_a_folder_that_computes_something_else_is_not_published(folders, tmp_path, monkeypatch, broken):
    if broken == "weights":
        write = exported_folder.write

        def write_other(place: Path, task: Any, *others: Any) -> None:
            task.backbone.model.vision_model.post_layernorm.weight.data.mul_(1.1)
            write(place, task, *others)

        monkeypatch.setattr(exported_folder, "write", write_other)
    else:
        config_of = exported_folder.generation_config

        def short(task: Any) -> Any:
            config = config_of(task)
            config.max_new_tokens = 2
            return config

        monkeypatch.setattr(exported_folder, "generation_config", short)
    with pytest.raises(OutputError, match=r"the folder was not written: compared on 4 images: .* the bound for float32"):
        exported(folders["blip"][0], tmp_path / "out")
    assert without_files(tmp_path)


def test_a_tokenizer_that_reads_the_prompt_otherwise_is_refused(checkpoints, tmp_path):
    adapter = adapter_of(base_of("t5", checkpoints), tmp_path / "a.safetensors", "t5", prompt="a picture of")
    with pytest.raises(OutputError, match=r"reads the prompt as the tokens \[.*, and lora_blip reads \[.*tokenizer.json"):
        exported(adapter, tmp_path / "out")
    assert without_files(tmp_path)


def test_a_base_whose_files_have_changed_is_not_advised_again(checkpoints, tmp_path, monkeypatch):
    """Before, the fix was to load the base that was already loaded."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_of("blip", checkpoints), "mybase")
    adapter = adapter_of("mybase", tmp_path / "a.safetensors", "blip")
    (file,) = Path("mybase").glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("attention.self.query.weight"))
    save_file(tensors | {name: tensors[name] * 1.5}, file, metadata={"format": "pt"})
    reason = (
        r"trained on 'mybase', which has changed since; load it again\. If this does not help, its files have changed: give a"
    )
    for load in (
        lambda: lora_blip.load_adapter(load_backbone("mybase", "cpu"), adapter),
        lambda: lora_blip.Captioner.from_adapter(adapter, device="cpu"),
        lambda: exported(adapter, tmp_path / "out"),
    ):
        with pytest.raises(AdapterError, match=reason) as error:
            load()
        assert "load that base" not in str(error.value)


def test_a_moved_base_is_an_error_that_names_the_flag(checkpoints, tmp_path, monkeypatch):
    """Before, `export` only asked to download the folder from the hub."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base_of("blip", checkpoints), "mybase")
    adapter = adapter_of("mybase", tmp_path / "a.safetensors", "blip")
    Path("mybase").rename("moved")
    with pytest.raises(ModelError, match=r"trained on 'mybase'; if this base was moved, give its new path: --model PATH"):
        exported(adapter, tmp_path / "out")
    assert exported(adapter, tmp_path / "out", model="moved").is_dir()
    (photo,) = (tiny.write_photos(tmp_path, 1).parent / "photos").iterdir()
    config = InferConfig(adapter=str(adapter), images=str(photo), device="cpu")  # before, only `base` was named, which it lacks
    with pytest.raises(ModelError, match=r"base=PATH, or model=PATH in a config"):
        lora_blip.infer(config)
    assert lora_blip.infer(replace(config, model="moved")).is_file()
    assert lora_blip.Captioner.from_adapter(adapter, base="moved", device="cpu")(photo).text is not None


def test_nothing_is_overwritten(folders, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, problem in (("out", "is not empty"), ("file", "is not a folder")):
        config = ExportConfig(adapter=str(folders["blip"][0]), output_dir=str(tmp_path / name))
        with pytest.raises(OutputError, match=problem):
            check_paths(config)
        with pytest.raises(OutputError, match=problem):
            export(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    assert (folder / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_disk_without_room_is_refused_before_the_base_is_loaded(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(OutputError, match=r"the folder needs .* GB; free some space, .* --dtype bfloat16"):
        exported(folders["blip"][0], tmp_path / "out")
    assert without_files(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_export_leaves_nothing(folders, tmp_path, monkeypatch, error):
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(exported_folder, "write_processor", fail)
    with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else OutputError):
        exported(folders["blip"][0], tmp_path / "out")
    assert without_files(tmp_path)


def test_a_t5_in_float16_is_refused(folders, tmp_path):
    with pytest.raises(ModelError, match=r"T5 .*; give --dtype bfloat16$"):
        exported(folders["t5"][0], tmp_path / "out", dtype="float16")


def test_the_command_prints_what_it_does_and_the_difference(folders, tmp_path, monkeypatch, capsys):
    """An empty folder is accepted, and images of the user are compared."""
    (tmp_path / "out").mkdir()
    arguments = [str(folders["blip"][0]), "--output-dir", str(tmp_path / "out"), "--images", str(ROOT / "image_test")]
    monkeypatch.setattr(sys, "argv", ["lora-blip", "export", *arguments, "--device", "cpu"])
    cli.main()
    first, second, last = capsys.readouterr().out.splitlines()
    assert re.match(r"export: merges .* into .*tiny-blip and writes .* GB of memory, about \d+ s", first)
    assert "compared on 8 images: 8 of 8 texts are equal" in second and last.startswith("exported")
    with pytest.raises(ConfigError, match="output_dir is empty"):
        ExportConfig(adapter="latest")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_the_files_have_the_permissions_of_the_umask(folders, tmp_path):
    """safetensors makes files that only their owner can read. A service often runs as another user."""
    before = os.umask(0o027)
    try:
        folder = exported(folders["blip"][0], tmp_path / "out", shard_gb=0.0001)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
