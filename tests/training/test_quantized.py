"""A training on a base in 8 or 4 bits: it ends as finished, resumes exactly, and its adapter is used, scored and exported."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lora_blip
from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.errors import CheckpointError, ConfigError, OutputError
from lora_blip.inference.export import ExportConfig, export
from lora_blip.lora import adapter_file
from lora_blip.lora.sites import quantization
from lora_blip.models.loading import load_backbone
from lora_blip.models.quantized import quantized_linears
from lora_blip.training import checkpoint, preflight, setup
from lora_blip.training.early_checks import refuse_contradictions
from lora_blip.training.loop import train
from tests.support.kill import killed_at
from tests.support.runs import assert_same, config_of, elsewhere, lines, settings

pytest.importorskip("bitsandbytes", reason='bitsandbytes is not installed: pip install "lora_blip[quantized]"')
DTYPES = ("int8", "nf4")


@pytest.mark.parametrize(
    ("base", "dtype", "precision"),
    [
        ("tiny-blip2", "nf4", "fp32"),
        ("tiny-blip", "int8", "fp32"),
        pytest.param("tiny-blip2", "int8", "fp32", marks=pytest.mark.slow),
        pytest.param("tiny-blip", "nf4", "fp32", marks=pytest.mark.slow),
        pytest.param("tiny-blip2", "nf4", "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_equals_an_uninterrupted_one(checkpoints, tmp_path, base, dtype, precision):
    """Law 6 holds for the embedded bases in 8 and 4 bits: the adapters have equal bytes after a kill at any micro-batch."""
    targets = "vit,qformer" if base == "tiny-blip2" else "vit"
    config = config_of(
        checkpoints, tmp_path, model=f"assets/{base}", base_dtype=dtype, precision=precision, targets=targets, epochs=1
    )
    uninterrupted = train(config)
    again = elsewhere(config)
    for death in (2, 4):
        with killed_at(death):
            train(again)
    path = train(again)
    assert_same(uninterrupted, path)
    adapter = adapter_file.read(path)
    assert adapter.metadata["training"]["finished"] is True and adapter.base_dtype == dtype
    assert not (path.parent / checkpoint.FOLDER).exists()


def test_a_run_ends_as_finished_without_a_merge(checkpoints, tmp_path, capsys):
    """The file has no merge drift, no line says that it is missing, and the loss falls."""
    config = config_of(checkpoints, tmp_path, "opt", base_dtype="nf4", targets="vit,qformer,lm", epochs=3, dropout=0.0)
    path = train(config)
    printed = capsys.readouterr()
    assert "no merge drift" not in printed.out + printed.err and "linears are in nf4" in printed.out
    assert adapter_file.read(path).metadata["merge_drift"] == {}
    losses = [line["val_loss"] for line in lines(path) if "val_loss" in line]
    assert losses[-1] < losses[0]


def test_another_base_dtype_does_not_resume_a_run(checkpoints, tmp_path, capsys):
    """With RESUME = "auto" a new run starts, and its message names the setting. With a path, the start is refused."""
    config = config_of(checkpoints, tmp_path, base_dtype="nf4", epochs=1)
    with killed_at(3):
        train(config)
    (run,) = Path(config.output_dir).glob("20*")
    with pytest.raises(CheckpointError, match="base_dtype was 'nf4' and is 'int8'"):
        train(replace(config, base_dtype="int8", resume=str(run)))
    capsys.readouterr()
    path = train(replace(config, base_dtype="fp32"))
    assert path.parent != run and "base_dtype was 'nf4' and is 'fp32'" in capsys.readouterr().out


@pytest.mark.parametrize(("setting", "value"), [("compile", True), ("shard", True), ("variant", "dora")])
def test_a_setting_that_needs_full_weights_is_refused(checkpoints, tmp_path, monkeypatch, setting, value):
    """BASE_DTYPE is checked before the model is loaded. A base whose files are quantized is checked after it is loaded."""
    monkeypatch.setenv("CXX", "c++")
    config = config_of(checkpoints, tmp_path, base_dtype="int8", **{setting: value})
    with pytest.raises(ConfigError, match=f"{setting} = .* cannot be used with a base in int8; set {setting.upper()} = "):
        refuse_contradictions(config)
    with pytest.raises(ConfigError, match="cannot be used with a base in nf4"):
        setup.refuse_quantized(replace(config, base_dtype="auto"), "nf4")
    refuse_contradictions(replace(config, base_dtype="auto"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Return {dtype: adapter} of short trainings on the embedded BLIP-2."""
    folder = tmp_path_factory.mktemp("quantized")
    images = [{"image": str(path), "text": "a red cube"} for path in sorted(Path("image_train").resolve().glob("*.png"))[:12]]
    (folder / "annotations.jsonl").write_text("\n".join(map(json.dumps, images)))
    config = settings(Path("assets/tiny-blip2"), folder / "annotations.jsonl", targets="vit,qformer", lr=1e-3, epochs=3)
    return {dtype: train(replace(config, base_dtype=dtype, output_dir=str(folder / dtype))) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
def test_predictions_use_the_base_of_the_training_unless_another_one_is_chosen(runs, dtype):
    """`merge` keeps the hooks of a quantized base. Captions do not depend on the batch."""
    images = sorted(Path("image_test").glob("*.png"))[:4]
    captioner = lora_blip.Captioner.from_adapter(runs[dtype], device="cpu")
    assert quantization(captioner.backbone.model) == dtype and captioner.sites
    single = lora_blip.Captioner.from_adapter(runs[dtype], device="cpu", batch_size=1, fast=False)
    assert [each.text for each in captioner(images)] == [each.text for each in single(images)]
    full = lora_blip.Captioner.from_adapter(runs[dtype], device="cpu", base_dtype="fp32")
    assert not quantization(full.backbone.model) and not full.sites
    loaded = lora_blip.Captioner.from_adapter(runs[dtype], base=load_backbone("assets/tiny-blip2", "cpu", dtype))
    assert [each.text for each in loaded(images)] == [each.text for each in captioner(images)]


def test_infer_and_evaluate_use_a_quantized_base(runs, tmp_path, monkeypatch, capsys):
    """A later run in the same folder with another base is refused, because its texts may differ."""
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java, which takes seconds to start
    config = InferConfig(
        adapter=str(runs["nf4"]), images="image_test/00[0-3].png", device="cpu", output_dir=str(tmp_path / "out"), explain=True
    )
    lora_blip.infer(config)
    assert "linears are in nf4" in capsys.readouterr().out and (tmp_path / "out" / "explain.html").exists()
    with pytest.raises(OutputError, match="base_dtype was 'nf4' and is not set"):
        lora_blip.infer(replace(config, base_dtype="fp32"))
    references = tmp_path / "references.jsonl"
    references.write_text(json.dumps({"image": str(Path("image_test/000.png").resolve()), "text": "a red cube"}) + "\n")
    evaluation = EvaluateConfig(
        adapter=str(runs["int8"]), references=str(references), device="cpu", output_dir=str(tmp_path / "scores"),
        train_annotations="none",
    )  # fmt: skip
    lora_blip.evaluate(evaluation)
    assert "linears are in int8" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_dequantizes_the_base(runs, tmp_path, capsys, dtype):
    """The folder has float32 weights, its logits equal those of the quantized base, and no config names a quantization."""
    folder = tmp_path / "exported"
    export(ExportConfig(adapter=str(runs[dtype]), output_dir=str(folder), device="cpu"))
    printed = capsys.readouterr().out
    assert f"the weights of the base in {dtype} are dequantized" in printed and "4 of 4 texts are equal" in printed
    assert "quanti" not in (folder / "config.json").read_text()
    assert f"assets/tiny-blip2, dequantized from {dtype}" in (folder / "README.md").read_text()
    exported = load_backbone(str(folder), "cpu")
    assert not quantized_linears(exported.model) and next(exported.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_base_that_is_stored_in_this_dtype_trains_and_exports(checkpoints, tmp_path, dtype):
    """With BASE_DTYPE = "auto", the folder is used as it is. The exported folder loads without bitsandbytes."""
    folder = tmp_path / "stored"
    backbone = load_backbone(str(checkpoints["opt"]), "cpu", dtype)
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(folder)
    path = train(config_of(checkpoints, tmp_path, "opt", model=str(folder), targets="vit,qformer", epochs=1))
    assert adapter_file.read(path).base_dtype == dtype
    export(ExportConfig(adapter=str(path), output_dir=str(tmp_path / "exported"), device="cpu"))
    assert not quantization(load_backbone(str(tmp_path / "exported"), "cpu").model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_counts_codes_and_scales(dtype):
    """The frozen bytes are those of all tensors of the model: parameters, and the scales of quantized weights."""
    model = load_backbone("assets/tiny-blip", "cpu", dtype).model
    tensors = [*model.parameters()]
    for linear in quantized_linears(model).values():
        state = linear.weight.quant_state if dtype == "nf4" else None
        tensors += [state.absmax, state.code] if state else [linear.weight.SCB]
    assert preflight.frozen_bytes(model) == sum(tensor.nbytes for tensor in tensors)
    full = preflight.frozen_bytes(load_backbone("assets/tiny-blip", "cpu").model)
    assert preflight.frozen_bytes(model) < (0.45 if dtype == "int8" else 0.35) * full
