"""`lora-blip convert`: the folder that it writes is complete, says what it is, and is read by every command."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lora_blip.cli import run_command
from lora_blip.config import TrainConfig
from lora_blip.conversion.command import CARD_NAME, ConvertConfig, check_paths, convert
from lora_blip.errors import AdapterError, ConfigError
from lora_blip.inference import output
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.setup import task_of
from lora_blip.lora import adapter_file, attached
from lora_blip.models.loading import load_backbone
from lora_blip.runtime import runs
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import initial_adapter
from tests.support.models import inject, logits_of
from tests.support.peft_cases import outputs_of, relative

IMAGE = "image_test/000.png"
TASK = {"name": "caption", "prompt": "a photo of", "generation": {"num_beams": 2}}
VLLM = re.compile(  # the names of the linears of vLLM's Blip2ForConditionalGeneration
    r"vision_model\.encoder\.layers\.\d+\.(self_attn\.(qkv|projection)|mlp\.fc[12])"
    r"|qformer\.encoder\.layer\.\d+\.((cross)?attention\.(attention\.(query|key|value)|output\.dense)|(intermediate|output)_query\.dense)"
    r"|language_projection"
    r"|language_model\.model\.decoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|fc[12])"
)
PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}  # vLLM's name → the names in a file


def saved(make, kind: str, folder: Path, targets: str = "", **options) -> Path:
    backbone = make(kind)
    inject(backbone, targets)
    training = {"steps": 10, "val_loss": 1.25, "val_cider": 0.5, "settings": {"best_by": "cider"}}
    return adapter_file.save(folder / "run" / "adapter.safetensors", backbone, training=training, **({"task": TASK} | options))


def test_the_lines_of_the_model_card_load_the_adapter(make, tmp_path, monkeypatch):
    """They are run as they are, in the folder above, and give the outputs of lora_blip."""
    pytest.importorskip("peft")
    path = saved(make, "blip", tmp_path)
    convert(ConvertConfig(adapter=str(path), output_dir=str(tmp_path / "card")))
    text = (tmp_path / "card" / CARD_NAME).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft" and front["pipeline_tag"] == "image-to-text" and "base_model" not in front
    for fact in ("| task | writes captions |", "| prompt | `a photo of` |", "CIDEr 0.5000", "| largest rank | 4 |"):
        assert fact in text
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.S)
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    ours = make("blip")
    adapter_file.load(ours, path)
    assert relative(outputs_of(names["model"].base_model.model.eval(), "blip"), outputs_of(ours.model, "blip")) <= 1e-6


def test_what_peft_does_not_store_survives_both_conversions(make, tmp_path):
    """Task, prompt, samples of the base and scores are those of the first file, and so are the logits."""
    path = saved(make, "blip", tmp_path, "vit.q,vit.v,text:r=2")
    convert(ConvertConfig(adapter=str(path), output_dir=str(tmp_path / "peft")))
    convert(ConvertConfig(adapter=str(tmp_path / "peft"), to="lora_blip", output_dir=str(tmp_path / "own")))
    first, last = adapter_file.read(path), adapter_file.read(runs.locate(tmp_path / "own"))
    for part in ("task", "base", "training", "versions"):
        assert last.metadata[part] == first.metadata[part]
    assert last.note == adapter_file.read(tmp_path / "peft" / runs.PEFT_WEIGHTS).note == ""
    logits = []
    for source in (path, tmp_path / "own"):
        backbone = make("blip")
        adapter_file.load(backbone, source)
        logits.append(logits_of(backbone))
    assert relative(*logits) <= 1e-6


def test_a_written_folder_is_refused_on_another_base(make, tmp_path):
    """Its header has samples of the weights, which peft ignores."""
    convert(ConvertConfig(adapter=str(saved(make, "blip", tmp_path)), output_dir=str(tmp_path / "peft")))
    other = make("blip")
    other.model.vision_model.encoder.layers[0].self_attn.qkv.weight.data.add_(1)
    with pytest.raises(AdapterError, match="are not those of the training"):
        adapter_file.load(other, tmp_path / "peft")


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("own", [True, False], ids=["the base is changed", "another base is given"])
def test_the_base_must_be_that_of_the_training(checkpoints, tmp_path, variant, own):
    """peft needs norms of the base for rows that no block of DoRA reaches. Those of another base would be wrong numbers."""
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(checkpoints["blip"], base)
    backbone = load_backbone(str(base), "cpu")
    backbone.name = "blip"
    inject(backbone, "vit.q", variant=variant)
    backbone.name = str(base)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone, task=TASK)
    shutil.copytree(base, other)
    weights = (base if own else other) / "model.safetensors"
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    config = ConvertConfig(adapter=str(path), output_dir=str(tmp_path / "peft"), model="" if own else str(other))
    with pytest.raises(AdapterError, match=r"the weights of .*qkv' in .* are not those of the training; give .*: --model"):
        convert(config)
    assert not (tmp_path / "peft").exists()


def test_a_base_of_another_family_is_refused(make, checkpoints, tmp_path):
    """Also for an adapter of peft, which has no samples of its base."""
    config = {"adapter": str(foreign(make, "blip", tmp_path)), "to": "lora_blip", "output_dir": str(tmp_path / "own")}
    with pytest.raises(AdapterError, match="has no linear 'text_decoder"):
        convert(ConvertConfig(**config, model=str(checkpoints["opt"])))
    convert(ConvertConfig(**config, model=str(checkpoints["blip"])))


def printed_lines(capsys: pytest.CaptureFixture) -> list[str]:
    return capsys.readouterr().out.splitlines()


def foreign(make, kind: str, folder: Path) -> Path:
    """Return a folder without our header, as peft writes it."""
    convert(ConvertConfig(adapter=str(saved(make, kind, folder)), output_dir=str(folder / "peft")))
    weights = folder / "peft" / runs.PEFT_WEIGHTS
    save_file(load_file(weights), weights, {"format": "pt"})
    return folder / "peft"


def test_a_captioner_reads_a_folder_of_peft(make, tmp_path):
    """The captions are those of the file of lora_blip. The task is that of the base."""
    folder = foreign(make, "blip", tmp_path)
    expected = Captioner.from_adapter(tmp_path / "run", generation={"num_beams": 1}, prompt="none")(IMAGE)
    captioner = Captioner.from_adapter(folder, generation={"num_beams": 1})
    assert captioner.task == "caption" and captioner(IMAGE).text == expected.text


def test_a_blip_2_without_a_task_needs_one(make, tmp_path):
    """An adapter of peft on a BLIP-2 may caption or answer questions. `convert` asks too, and stores the answer."""
    folder = foreign(make, "opt", tmp_path)
    adapter = adapter_file.read(runs.locate(folder))
    with pytest.raises(ConfigError, match=r"store one: lora-blip convert .* --task caption --output-dir .*task='caption'"):
        task_of(make("opt"), adapter)
    settings = {"adapter": str(folder), "to": "lora_blip", "output_dir": str(tmp_path / "own")}
    with pytest.raises(AdapterError, match="give it: --task caption, or --task vqa"):
        convert(ConvertConfig(**settings))
    convert(ConvertConfig(**settings, task="vqa", prompt="Q: {question} A:"))
    own = adapter_file.read(runs.locate(tmp_path / "own"))
    assert own.task == {"name": "vqa", "prompt": "Q: {question} A:"} and task_of(make("opt"), own).name == "vqa"


def test_the_short_commands_choose_the_task_of_a_foreign_adapter(make, tmp_path, capsys):
    """`caption` captions and `ask` answers with an adapter that names no task, and both print what is unknown."""
    folder = foreign(make, "opt", tmp_path)
    capsys.readouterr()
    run_command("caption", [IMAGE, "--adapter", str(folder), "--device", "cpu"])
    run_command("ask", [IMAGE, "what color is it?", "--adapter", str(folder), "--device", "cpu"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and printed.err.count("note: this adapter has the format of peft") == 2


def test_a_folder_with_files_is_not_overwritten(make, tmp_path):
    path = saved(make, "blip", tmp_path)
    for folder, message in ((str(path.parent), "it is not empty"), (str(path), "is not a folder")):
        with pytest.raises(ConfigError, match=message):
            check_paths(ConvertConfig(adapter=str(path), output_dir=folder))
    with pytest.raises(ConfigError, match="--output-dir FOLDER"):
        ConvertConfig(adapter=str(path))


def test_the_names_and_shapes_are_those_of_vllm(make, tmp_path):
    """Each linear of BLIP-2 with OPT has the name and the shapes of a linear of vLLM, so that it finds the tensors."""
    from safetensors.torch import load_file

    convert(ConvertConfig(adapter=str(saved(make, "opt", tmp_path)), output_dir=str(tmp_path / "peft")))
    tensors = load_file(tmp_path / "peft" / runs.PEFT_WEIGHTS)
    config = json.loads((tmp_path / "peft" / runs.PEFT_CONFIG).read_text())
    linears = {path: linear for path, linear in make("opt").model.named_modules() if isinstance(linear, torch.nn.Linear)}
    found = {}
    for key, tensor in tensors.items():
        module, half = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        assert VLLM.fullmatch(module), module
        width = linears[module].out_features if half == "B" else linears[module].in_features
        assert tuple(tensor.shape) == ((width, config["r"]) if half == "B" else (config["r"], width))
        found[module] = width
    assert all(sum(module.endswith(name) for module in found) == 2 for names in PACKED.values() for name in names)
    assert {module.split(".")[0] for module in found} == {"vision_model", "qformer", "language_model"}
    assert config["bias"] == "none" and not config["modules_to_save"] and isinstance(config["target_modules"], list)


def test_different_scales_are_reported_because_vllm_has_one(make, tmp_path, capsys):
    convert(ConvertConfig(adapter=str(saved(make, "opt", tmp_path, "vit:r=2:alpha=2,lm")), output_dir=str(tmp_path / "peft")))
    note, written = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and note.endswith("vLLM uses one scale for all") and written.startswith("wrote ")


def test_a_training_begins_with_a_folder_of_peft(make, tmp_path, capsys):
    """INIT_ADAPTER copies its values, and the run notes what the folder does not store."""
    folder = foreign(make, "blip", tmp_path)
    backbone = make("blip")
    config = TrainConfig(init_adapter=str(folder), targets="vit,text", r=4, alpha=8.0)
    adapter = initial_adapter.inject_adapters(config, backbone)
    assert adapter is not None
    initial_adapter.restore_task(CaptionTask(backbone), adapter, config)
    for address, lora in attached.adapters(backbone.model).items():
        assert torch.equal(lora.A, adapter.tensors[f"{address}.lora_A"]) and torch.equal(
            lora.B, adapter.tensors[f"{address}.lora_B"]
        )
    assert any(
        re.fullmatch("note: this adapter has the format of peft.*image size.*with a base", line)
        for line in printed_lines(capsys)
    )


def test_inspect_and_evaluate_read_a_folder_of_peft(make, tmp_path, capsys, monkeypatch):
    """Both print what is unknown. The texts are those of the file of lora_blip."""
    folder = foreign(make, "blip", tmp_path)
    run_command("inspect", [str(folder), str(tmp_path / "run"), "--output-dir", str(tmp_path / "page")])
    assert "no fingerprint" in capsys.readouterr().out and (tmp_path / "page" / "inspect.html").is_file()
    lines = Path("annotations.jsonl").read_text().splitlines()[:4]
    monkeypatch.setenv("PATH", "")  # no Java: its scores take 20 s
    (tmp_path / "references.jsonl").write_text("\n".join(lines) + "\n")
    texts = []
    for number, adapter in enumerate((folder, tmp_path / "run")):
        flags = ["--adapter", str(adapter), "--references", str(tmp_path / "references.jsonl"), "--device", "cpu", "--no-base"]
        flags += [
            "--train-annotations",
            "none",
            "--prompt",
            "none",
            "--num-beams",
            "1",
            "--output-dir",
            str(tmp_path / f"{number}"),
        ]
        run_command("evaluate", [*flags, "--image-root", "."])
        texts.append((tmp_path / f"{number}" / "adapted.jsonl").read_text())
        assert ("no fingerprint" in capsys.readouterr().out) == (number == 0)
    assert texts[0] == texts[1] != ""


def test_predictions_of_another_scale_are_not_continued(make, tmp_path):
    """The scale of an adapter of peft is in its settings, so they are part of the identity of a run."""
    folder = foreign(make, "blip", tmp_path)
    adapter = adapter_file.read(runs.locate(folder))
    before = output._adapter_digest(adapter)
    config = folder / runs.PEFT_CONFIG
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    assert output._adapter_digest(adapter) != before


def test_a_folder_of_peft_is_blended(make, tmp_path):
    """0.5 of an adapter plus 0.5 of the same adapter in the format of peft is the adapter."""
    folder = foreign(make, "blip", tmp_path)
    run_command("blend", [f"{folder}=0.5", f"{tmp_path / 'run'}=0.5", "--output-dir", str(tmp_path / "blend")])
    logits = []
    for source in (tmp_path / "run", tmp_path / "blend"):
        backbone = make("blip")
        adapter_file.load(backbone, source)
        logits.append(logits_of(backbone))
    assert relative(*logits) <= 1e-5
