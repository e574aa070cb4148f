"""A checkpoint that lora_blip does not support is one error that says what it is, and what to give instead."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_blip.errors import LoraBlipError, ModelError
from lora_blip.models.loading import load_backbone

KINDS = {
    "instructblip": "Q-Former also reads the question.*Salesforce/blip2-flan-t5-xl",
    "instructblipvideo": "Q-Former also reads the question",
    "xgenmm": "BLIP-3.*its own Python code",
    "blip_2_qformer": "only the Q-Former of BLIP-2; give the whole checkpoint",
    "git": "lora_blip supports BLIP and BLIP-2; give",
    "llava": "lora_blip supports BLIP and BLIP-2; give",
    "vit": "Salesforce/blip-image-captioning-base or Salesforce/blip2-opt-2.7b",
    "paligemma": "lora_blip supports BLIP and BLIP-2",
    None: "None model.*lora_blip supports",
    7: "7 model.*lora_blip supports",
}


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load_backbone(str(folder), "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_type_is_one_error_with_the_reason(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": ["X"]}))
    with pytest.raises(ModelError, match=KINDS[kind]):
        load_backbone(str(tmp_path), "cpu")
    assert repr(kind) in refused(tmp_path)


@pytest.mark.parametrize(
    "architecture", ["BlipModel", "BlipTextModel", "InstructBlipForConditionalGeneration", "Blip2Model", "Blip2QFormerModel"]
)
def test_another_architecture_is_one_error_that_names_those_with_a_task(architecture, tmp_path):
    kind = "blip-2" if "2" in architecture else "blip"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
    message = refused(tmp_path)
    assert f"{architecture!r}, which has no task here; give one of" in message and "ForImageTextRetrieval" in message


def peft_folder(folder: Path, **config: Any) -> Path:
    """Return a folder as peft's `save_pretrained` writes it."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    key = "base_model.model.vision_model.encoder.layers.0.self_attn.qkv.lora_A.weight"
    save_file({key: torch.ones(4, 32)}, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_an_adapter_of_peft_is_not_a_base(tmp_path):
    """The error names the base of the adapter, and the flags for both."""
    message = refused(peft_folder(tmp_path, base_model_name_or_path="Salesforce/blip-image-captioning-base"))
    assert "is a PEFT adapter" in message and "its base is 'Salesforce/blip-image-captioning-base'" in message
    assert f"(--adapter {tmp_path})" in message


@pytest.mark.parametrize("content", ["", "[]", "{", '{"base_model_name_or_path": "\\u001b[2J"}', "7"])
def test_a_broken_config_of_peft_is_the_same_error(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    message = refused(tmp_path)
    assert "is a PEFT adapter" in message and message.isprintable()


@pytest.mark.parametrize("name", ["model_base_caption_capfilt_large.pth", "blip2_pretrained_opt2.7b.pth", "last.ckpt", "a.pt"])
def test_a_file_of_lavis_is_one_error_that_names_the_conversion(name, tmp_path):
    """It is not opened: neither alone, nor in a folder without config.json."""
    (tmp_path / name).write_bytes(b"never opened")
    for path in (tmp_path, tmp_path / name):
        message = refused(path)
        assert name in message and "convert_blip_original_pytorch_to_hf.py" in message and "is not opened" in message


def test_a_file_that_is_no_folder_is_one_error(checkpoints):
    assert "give the folder of a checkpoint" in refused(checkpoints["blip"] / "model.safetensors")


def test_a_pipeline_of_diffusers_and_an_empty_folder_are_one_error(tmp_path):
    with pytest.raises(LoraBlipError, match=r"it has no config\.json"):
        load_backbone(str(tmp_path), "cpu")
    (tmp_path / "model_index.json").write_text("{}")
    assert "a pipeline of diffusers" in refused(tmp_path)
