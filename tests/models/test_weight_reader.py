"""Single weights are read from each form of a checkpoint, with the values that transformers loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_blip.errors import ModelError
from lora_blip.models import weight_reader
from lora_blip.models.loading import load_backbone
from lora_blip.models.weight_reader import WeightReader, open_any, open_local

NAME = "vision_model.encoder.layers.1.self_attn.qkv"
BASE = Path(__file__).resolve().parents[2] / "assets" / "tiny-blip"


def weights() -> dict[str, torch.Tensor]:
    return load_file(BASE / "model.safetensors")


@pytest.mark.parametrize("name", ["tiny-blip", "tiny-blip2", "tiny-blip-vqa", "tiny-blip-itm"])
def test_every_linear_has_the_weight_of_the_model(name: str) -> None:
    model, reader = load_backbone(f"assets/{name}", "cpu").model, open_any(f"assets/{name}")
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    read = {path: reader.read(path) for path in linears}
    assert all(torch.equal(weight, linears[path].weight) for path, weight in read.items() if weight is not None)
    assert all("decoder" in path or "lm_head" in path for path, weight in read.items() if weight is None)  # tied heads


def test_prefixes_and_several_files(tmp_path: Path) -> None:
    """A checkpoint in two files, whose names begin with "module."."""
    items = [(f"module.{name}", weight) for name, weight in weights().items()]
    for number, part in enumerate((items[::2], items[1::2]), 1):
        save_file(dict(part), tmp_path / f"model-0000{number}-of-00002.safetensors")
    read = WeightReader(tmp_path, "a base").read(NAME)
    assert read is not None and torch.equal(read, weights()[f"{NAME}.weight"])


def test_what_is_no_float_matrix_is_not_read(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3, 4, dtype=torch.int8), "b.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    reader = WeightReader(tmp_path, "a base")
    assert [reader.read(name) for name in ("a", "b", "c")] == [None, None, None]


def test_errors_name_the_base_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'a base' has no model\.safetensors; give a folder"):
        WeightReader(tmp_path, "a base")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"weights of 'a base' cannot be loaded: 'model\.safetensors'"):
        WeightReader(tmp_path, "a base")
    with pytest.raises(ModelError, match="does not exist"):
        open_any(str(tmp_path / "gone"))


def test_a_hub_name_is_not_downloaded_without_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`open_local` reads a complete copy in the cache, and returns None if there is none."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert open_local("someone/some-blip") is None
    copy = tmp_path / "models--someone--some-blip" / "snapshots" / "0123"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    assert open_local("someone/some-blip") is None  # the download was interrupted
    (copy / "model.safetensors").symlink_to(BASE / "model.safetensors")
    reader = open_local("someone/some-blip")
    assert reader is not None and reader.read(NAME) is not None


def test_bin_weights_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    reader = open_any(str(tmp_path))
    read = reader.read(NAME)
    assert read is not None and torch.equal(read, weights()[f"{NAME}.weight"])
    assert weight_reader._converted(str(tmp_path), "a base") != str(tmp_path)
