"""Images have the size of the ViT's positions, or the size in image_size, with interpolated positions."""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BlipForConditionalGeneration
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.errors import AdapterError, CheckpointError, ConfigError, ModelError
from lora_blip.evaluation.comparison import evaluate
from lora_blip.inference.adapter_choice import chosen_adapter
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.pipeline import infer
from lora_blip.inference.setup import open_task
from lora_blip.lora import adapter_file, merging
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import caching, resume
from lora_blip.training.diagnostics import describe_error
from lora_blip.training.loop import train
from lora_blip.training.setup import loader_of
from tests.support import tiny
from tests.support.kill import killed_at
from tests.support.models import WHOLE, batch_of, inject
from tests.support.runs import metrics_of, settings

OTHERS = (16, 24, 96)  # pixels; tiny.SIDE is 32
SQUARE = {"height": tiny.SIDE, "width": tiny.SIDE}


def pixels(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5))


def with_processor(checkpoint: Path, folder: Path, processor: Any, **changed: object) -> str:
    """Copy a checkpoint and replace its image processor, with changes to preprocessor_config.json. Return the folder."""
    shutil.copytree(checkpoint, folder)
    processor.save_pretrained(folder)
    where = folder / "preprocessor_config.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | changed))
    return str(folder)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("size", OTHERS)
@pytest.mark.parametrize("kind", WHOLE)
def test_another_size_is_transformers_with_interpolated_positions(kind, size, checkpoints):
    """image_size gives the bits of transformers with `interpolate_pos_encoding=True`. The flag has no further effect."""
    backbone = load_backbone(str(checkpoints[kind]), "cpu", fast=False, image_size=size)
    theirs = type(backbone.model).from_pretrained(checkpoints[kind], dtype=torch.float32).eval()
    expected = theirs.vision_model(pixel_values=pixels(size), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(backbone.model.vision_model(pixel_values=pixels(size)).last_hidden_state, expected)
    with_flag = backbone.model.vision_model(pixel_values=pixels(size), interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(with_flag, expected)
    assert backbone.image_size == size and backbone.own_image_size == tiny.SIDE
    assert not backbone.model.vision_model.embeddings.position_embedding.requires_grad


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_positions_keep_the_dtype_of_the_weights(dtype, checkpoints):
    backbone = load_backbone(str(checkpoints["blip"]), "cpu", dtype, image_size=64)
    theirs = BlipForConditionalGeneration.from_pretrained(
        checkpoints["blip"], dtype=backbone.model.vision_model.embeddings.class_embedding.dtype
    )
    embeddings = theirs.vision_model.embeddings
    expected = embeddings.interpolate_pos_encoding(torch.empty(1, 65, tiny.WIDTH), 64, 64)
    assert torch.equal(backbone.model.vision_model.embeddings.position_embedding, expected)


def test_the_checkpoint_s_own_size_changes_nothing(checkpoints, capsys):
    backbone = load_backbone(str(checkpoints["blip"]), "cpu", image_size=tiny.SIDE)
    weights = load_file(checkpoints["blip"] / "model.safetensors")
    assert torch.equal(
        backbone.model.vision_model.embeddings.position_embedding, weights["vision_model.embeddings.position_embedding"]
    )
    assert not capsys.readouterr().out


@pytest.mark.parametrize("size", [30, 4, 5000, -8])
def test_a_size_that_is_no_multiple_of_the_patch_size_is_refused(size, checkpoints):
    with pytest.raises(ConfigError, match=r"image_size = .* multiple of the model's patch size 8.* set IMAGE_SIZE to \d+"):
        load_backbone(str(checkpoints["blip"]), "cpu", image_size=size)


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", [32, 32]), ("image_size", [32, 64]), ("image_size", 36), ("image_size", 0), ("image_size", -32),
     ("image_size", 10**9), ("patch_size", 0), ("patch_size", [8, 8]), ("image_size", None), ("image_size", "32")],
)  # fmt: skip
def test_a_base_whose_own_size_is_no_square_of_patches_is_one_error(key, value, checkpoints, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(checkpoints["blip"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=key):
        load_backbone(str(folder), "cpu")


# ---------------------------------------------------------------- the image processor


PROCESSORS = {  # that do not make images of the model's size, and what is printed of it
    "smaller": (BlipImageProcessorPil(), {"size": {"height": 16, "width": 16}}, "makes 16×16"),
    "larger": (BlipImageProcessorPil(), {"size": {"height": 48, "width": 48}}, "makes 48×48"),
    "a number": (BlipImageProcessorPil(), {"size": 24}, "makes 24×24"),
    "the shortest edge": (BlipImageProcessorPil(), {"size": {"shortest_edge": 32}}, "resizes to shortest_edge 32"),
    "the longest edge": (BlipImageProcessorPil(), {"size": {"longest_edge": 32}}, "resizes to longest_edge 32"),
    "no resizing": (BlipImageProcessorPil(size=SQUARE), {"do_resize": False}, "does not resize images"),
    "CLIP's": (CLIPImageProcessorPil(), {}, "makes 224×224"),
    "CLIP's without its crop": (CLIPImageProcessorPil(), {"do_center_crop": False}, "resizes to shortest_edge 224"),
    "padding": (
        BlipImageProcessorPil(size=SQUARE), {"do_pad": True, "pad_size": {"height": 40, "width": 40}}, "makes 40×40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_resized_to_the_model_s_size_and_one_line_names_both(name, checkpoints, tmp_path, capsys):
    """Images get the model's size, whatever the processor's file says. One printed line names both sizes."""
    processor, changed, before = PROCESSORS[name]
    backbone = load_backbone(with_processor(checkpoints["blip"], tmp_path / "base", processor, **changed), "cpu")
    (line,) = capsys.readouterr().out.splitlines()
    assert "32×32" in line and before in line
    examples = _examples(tmp_path)
    loaded = loader_of(examples, CaptionTask(backbone), settings(Path(backbone.name), tmp_path, augment=True), shuffle=True)
    assert all(host_batch.pixel_values.shape[1:] == (3, tiny.SIDE, tiny.SIDE) for host_batch in loaded)
    Captioner(CaptionTask(backbone))([e.image for e in examples])


def test_a_resized_processor_gives_the_pixels_of_a_fitting_one(checkpoints, tmp_path):
    """A 48×48 processor on a 32×32 model gives the pixels of a 32×32 processor."""
    other = with_processor(checkpoints["blip"], tmp_path / "base", BlipImageProcessorPil(size={"height": 48, "width": 48}))
    image = Image.effect_noise((70, 50), 60).convert("RGB")
    pixel_values = [
        load_backbone(name, "cpu").image_processor(image, return_tensors="pt")["pixel_values"]
        for name in (other, str(checkpoints["blip"]))
    ]
    assert torch.equal(*pixel_values)


def test_a_crop_stays_a_crop_of_the_same_part(checkpoints, tmp_path, capsys):
    """A centre crop is scaled with the model: resize to 256 and crop to 224 becomes resize to 37 and crop to 32."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    scaled = load_backbone(with_processor(checkpoints["blip"], tmp_path / "base", processor), "cpu").image_processor
    assert (scaled.size.shortest_edge, scaled.crop_size.height, scaled.crop_size.width) == (37, 32, 32)
    right = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    capsys.readouterr()
    load_backbone(with_processor(checkpoints["blip"], tmp_path / "right", right), "cpu")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "changed",
    [{"size": {"height": 32, "width": 64}}, {"size": {"height": 10**9, "width": 10**9}}, {"size": -3}, {"size": 0},
     {"do_center_crop": True, "crop_size": {"height": 16, "width": 32}}, {"image_mean": "x"}, {"resample": 77}],
)  # fmt: skip
def test_a_processor_that_makes_no_square_is_one_error(changed, checkpoints, tmp_path):
    name = with_processor(checkpoints["blip"], tmp_path / "base", BlipImageProcessorPil(size=SQUARE), **changed)
    with pytest.raises(ModelError, match=r"BlipImageProcessorPil|of its image processor"):
        load_backbone(name, "cpu")


# ---------------------------------------------------------------- training and inference


def _examples(folder: Path) -> list[Any]:
    from lora_blip.data import annotations

    return annotations.read(tiny.write_photos(folder, 6))[0]


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory):
    """Train an adapter on every part of BLIP with 16×16 images. Return its path."""
    folder = tmp_path_factory.mktemp("trained")
    return train(settings(checkpoints["blip"], tiny.write_photos(folder), image_size=16, targets=WHOLE["blip"], epochs=4))


def test_an_adapter_keeps_the_size_it_was_trained_at_and_inference_takes_it(trained):
    """The metadata contain the image size of the training. Inference uses it if image_size is 0, else the setting."""
    with safe_open(trained, "pt") as file:
        assert json.loads(file.metadata()["lora_blip"])["base"]["image_size"] == 16
    adapter = chosen_adapter(str(trained))
    sizes = {size: open_task(InferConfig(image_size=size, device="cpu"), adapter)[0].backbone.image_size for size in (0, 48)}
    assert sizes == {0: 16, 48: 48}


def test_inference_equals_a_forward_at_that_size(trained, tmp_path):
    """The captions of `infer` equal those of the adapted model at 16×16."""
    images = sorted((trained.parents[2] / "photos").glob("*.png"))
    predictions_file = infer(
        InferConfig(adapter=str(trained), images=str(images[0].parent), output_dir=str(tmp_path / "out"), device="cpu")
    )
    texts = {Path(line["image"]): line["text"] for line in map(json.loads, predictions_file.read_text().splitlines())}
    adapter = adapter_file.read(trained)
    backbone = load_backbone(adapter.base, "cpu", fast=False, image_size=16)
    adapter_file.load(backbone, adapter)
    task = CaptionTask(backbone, generation=replace(CaptionTask(backbone).generation, max_new_tokens=5))
    assert texts == {p.image: p.text for p in Captioner(task)(images)}


def test_an_evaluation_reports_the_image_size(trained, tmp_path, monkeypatch):
    """metrics.json and the report of an evaluation contain the image size."""
    monkeypatch.setattr("shutil.which", lambda _: None)  # no Java, which takes seconds to start
    source = trained.parents[2] / "annotations.jsonl"
    folder = evaluate(
        EvaluateConfig(references=str(source), adapter=str(trained), output_dir=str(tmp_path / "out"), device="cpu")
    )
    assert json.loads((folder / "metrics.json").read_text())["facts"]["images"].startswith("16×16")
    assert "16×16 pixels" in (folder / "report.html").read_text()


def test_an_adapter_on_a_backbone_of_another_size_is_refused_unless_that_was_chosen(trained):
    adapter = adapter_file.read(trained)
    with pytest.raises(AdapterError, match=r"trained on images of 16×16.* has 32×32.*image_size=16"):
        adapter_file.load(load_backbone(adapter.base, "cpu"), adapter)
    adapter_file.load(load_backbone(adapter.base, "cpu", image_size=tiny.SIDE), adapter)
    with pytest.warns(UserWarning, match="16×16"):
        adapter_file.load(load_backbone(adapter.base, "cpu").model, adapter)
    with warnings.catch_warnings(action="error"):
        adapter_file.load(load_backbone(adapter.base, "cpu", image_size=16).model, adapter)


def test_an_adapter_of_a_file_that_names_no_size_is_for_the_base_s_own(trained, tmp_path):
    """An older adapter file without an image size uses the base's size."""
    with safe_open(trained, "pt") as file:
        metadata = json.loads(file.metadata()["lora_blip"])
    del metadata["base"]["image_size"], metadata["header_sha256"]
    save_file(load_file(trained), tmp_path / "old.safetensors", {"lora_blip": json.dumps(metadata)})
    adapter = chosen_adapter(str(tmp_path / "old.safetensors"))
    assert open_task(InferConfig(device="cpu"), adapter, adapted=True)[0].backbone.image_size == tiny.SIDE


@pytest.mark.parametrize("size", [0, -16, 10**9, "16", 16.5, None, [16, 16]])
def test_an_invalid_image_size_in_a_header_is_refused(size, trained, tmp_path):
    with safe_open(trained, "pt") as file:
        metadata = json.loads(file.metadata()["lora_blip"])
    metadata["base"]["image_size"] = size
    del metadata["header_sha256"]  # of the header without this change
    save_file(load_file(trained), tmp_path / "odd.safetensors", {"lora_blip": json.dumps(metadata)})
    with pytest.raises(AdapterError, match=r"base\.image_size"):
        adapter_file.read(tmp_path / "odd.safetensors")


def test_a_merged_model_that_is_saved_is_a_checkpoint_of_that_size(trained, tmp_path):
    """transformers loads the saved merged model with equal logits, and load_backbone reads its image size."""
    adapter = adapter_file.read(trained)
    backbone = load_backbone(adapter.base, "cpu", fast=False, image_size=16)
    adapter_file.load(backbone, adapter)
    merging.bake(backbone.model)
    for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
        part.save_pretrained(tmp_path / "merged")
    theirs = BlipForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    batch = {"pixel_values": pixels(16), "input_ids": torch.tensor([[5, 6, 7]] * 2)}
    assert torch.equal(theirs(**batch).logits, backbone.model(**batch).logits)
    assert load_backbone(str(tmp_path / "merged"), "cpu").image_size == 16


def test_runs_of_two_image_sizes_share_no_cache_entries(checkpoints, tmp_path):
    """Two runs with different image sizes and one cache folder have the losses of runs without a cache."""
    source = tiny.write_photos(tmp_path, 6)
    common = {"targets": "text", "max_steps": 3, "batch_size": 2, "val_fraction": 0.0, "resume": "off"}

    def losses(size: int, gigabytes: float) -> list[float]:
        path = train(settings(checkpoints["blip"], source, **common, image_size=size, cache_gb=gigabytes))
        return [line["loss"] for line in metrics_of(path)]

    cached = {size: losses(size, 1.0) for size in (16, 32)}
    assert (tmp_path / "runs" / caching.FOLDER).exists()
    for size in cached:
        assert cached[size] == pytest.approx(losses(size, 0.0), rel=1e-3)
    assert cached[16] != cached[32] and cached[16] == losses(16, 1.0)


def test_a_run_is_not_resumed_at_another_size(checkpoints, tmp_path):
    """Resuming at another image size raises CheckpointError. 0, the base's size and a missing key are equal."""
    source = tiny.write_photos(tmp_path, 8)
    config = settings(checkpoints["blip"], source, checkpoint_seconds=0, max_steps=3, batch_size=2)
    with killed_at(3):
        train(config)
    (run,) = (tmp_path / "runs").glob("20*")
    with pytest.raises(CheckpointError, match="image_size was 0 and is 16"):
        train(replace(config, image_size=16, resume=str(run)))
    assert train(replace(config, image_size=tiny.SIDE, resume=str(run))).parent == run
    assert not resume.differences({}, {"image_size": 0}) and resume.differences({}, {"image_size": 16})


@pytest.mark.parametrize(
    "message", ["CUDA out of memory", "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …"]
)
def test_out_of_memory_names_the_size_of_the_images(message, checkpoints, tmp_path):
    """The message for a lack of memory names the image size, also for CLIP's processor, which has no height."""
    name = with_processor(checkpoints["blip"], tmp_path / "base", CLIPImageProcessorPil())
    task = CaptionTask(load_backbone(name, "cpu"))
    advice = describe_error(RuntimeError(message), settings(tmp_path, tmp_path / "a.jsonl"), task)
    assert "images of 32×32" in str(advice)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_image_size_does_not_change_the_shape_of_the_logits(kind, checkpoints):
    """The logits of BLIP-2 have the same shape at every image size, because the Q-Former has a fixed number of queries."""
    backbone = load_backbone(str(checkpoints[kind]), "cpu", image_size=64)
    inject(backbone)
    task = CaptionTask(backbone)
    batch = batch_of(task)
    large = replace(batch, pixel_values=pixels(64)[:1].expand(3, -1, -1, -1))
    assert task.logits(large).shape == CaptionTask(load_backbone(str(checkpoints[kind]), "cpu")).logits(batch).shape
