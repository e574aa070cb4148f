"""Every token id that a checkpoint can produce has a row in the model's text embeddings."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_blip.errors import ModelError
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.registry import TASKS
from tests.support import tiny
from tests.support.models import WHOLE


@pytest.mark.parametrize("kind", WHOLE)
def test_a_tokenizer_with_more_tokens_than_embeddings_is_one_error(checkpoints, make, kind, tmp_path):
    """The message names the first token without a row; a tokenizer with fewer tokens loads (the fixtures are equal)."""
    folder = tmp_path / kind
    shutil.copytree(checkpoints[kind], folder)
    tokenizer = make(kind).tokenizer.__class__.from_pretrained(folder)
    tokenizer.add_tokens(["zebra\x1b"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"1 token without an embedding in the model .*zebra") as caught:
        load_backbone(str(folder), "cpu")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("field", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa", "itm"])
def test_a_token_id_without_an_embedding_is_one_error(checkpoints, kind, field, tmp_path):
    folder = tmp_path / kind
    shutil.copytree(checkpoints[kind], folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][field] = 5000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"{field}.*5000|Padding_idx must be within"):
        load_backbone(str(folder), "cpu")


@pytest.mark.parametrize("kind", ["opt", "t5", "itm2"])
@pytest.mark.parametrize("value", [-1, 5000])
def test_an_image_token_id_without_an_embedding_is_one_error(checkpoints, kind, value, tmp_path):
    """A model that matches images with texts does not embed the image token: only a negative id is an error there."""
    folder = edited(checkpoints[kind], tmp_path, lambda config: config.update(image_token_index=value))
    if kind == "itm2" and value > 0:
        load_backbone(str(folder), "cpu")
        return
    with pytest.raises(ModelError, match=rf"image_token_index.*{value}"):
        load_backbone(str(folder), "cpu")


def edited(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Return a copy of a checkpoint whose config.json was changed."""
    shutil.copytree(checkpoint, folder / "copy")
    config = json.loads((folder / "copy/config.json").read_text())
    change(config)
    (folder / "copy/config.json").write_text(json.dumps(config))
    return folder / "copy"


def test_an_image_token_that_is_never_embedded_needs_no_embedding(tmp_path):
    """BLIP-2 for retrieval lists an image token after the last row of its Q-Former."""
    tiny.save_itm2(tmp_path)
    backbone = load_backbone(str(tmp_path), "cpu")
    rows = len(backbone.tokenizer)
    backbone.tokenizer.add_tokens(["<image>"])
    backbone.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_index": rows}))
    assert len(load_backbone(str(tmp_path), "cpu").tokenizer) == rows + 1


@pytest.mark.parametrize("kind", ["opt", "t5"])
@pytest.mark.parametrize("with_row", [True, False])
def test_a_blip2_from_before_the_image_token_generates_as_the_newer_one(checkpoints, make, kind, with_row, tmp_path, capsys):
    """Its embeddings may have an unused row for the token, as blip2-opt-2.7b has, or none."""
    newer = make(kind)
    rows = newer.model.config.image_token_index + 1

    def older(config: dict[str, Any]) -> None:
        del config["image_token_index"]
        config["text_config"]["vocab_size"] = rows if with_row else rows - 1

    folder = edited(checkpoints[kind], tmp_path, older)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if not with_row:
        weights = load_file(folder / "model.safetensors")
        cut = {key: value[:-1].clone() if len(value) == rows else value for key, value in weights.items()}
        save_file(cut, folder / "model.safetensors", {"format": "pt"})
    backbone = load_backbone(str(folder), "cpu")
    assert f"added the token with the id {rows - 1}" in capsys.readouterr().out
    assert backbone.model.config.image_token_index == rows - 1 and not any(p.requires_grad for p in backbone.model.parameters())
    images = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
    ids = torch.tensor([[rows - 1] * tiny.QUERIES + [2, 5]] * 2)
    more = {"decoder_input_ids": ids[:, -2:]} if kind == "t5" else {}
    logits = [x.model(pixel_values=images, input_ids=ids, **more).logits[..., : rows - 1] for x in (backbone, newer)]
    assert torch.equal(*logits) and (logits[0][0] - logits[0][1]).abs().max() > 1e-4, "the model sees the images"
    texts = [TASKS["caption"](x).language.generate(images, ["a", "the"], max_new_tokens=6) for x in (backbone, newer)]
    assert texts[0] == texts[1]
