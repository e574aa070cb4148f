"""A merged model is saved as a plain checkpoint. `save_pretrained` of an unmerged model raises LoRAError."""

import copy
import io
import pickle
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_blip
from lora_blip.errors import LoRAError, ModelError
from lora_blip.lora import attached, injection, merging
from lora_blip.lora.sites import Site
from lora_blip.models.loading import load_backbone
from tests.support.models import inject, logits_of

FIX = r"lora_blip\.merge\(model\)"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def adapt(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        for adapter in injection.inject(model, [Site("0", 2), Site("1", 2)], name=name).values():
            adapter.B.data.normal_()
    return model


def test_a_merged_model_has_exactly_the_keys_of_the_base(make, tmp_path):
    """Keys are equal in state_dict, torch.save and safetensors. A folder of save_pretrained loads with the merged logits."""
    backbone = make("blip")
    model, keys = backbone.model, list(backbone.model.state_dict())
    inject(backbone)
    hooked = logits_of(backbone)
    with pytest.raises(LoRAError, match=FIX):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    merging.merge(model)
    assert list(model.state_dict()) == keys and not any("lora" in key for key in model.state_dict()._metadata)
    assert not any("lora" in key for key in model.vision_model.state_dict())
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored)
    stored.seek(0)
    assert list(torch.load(stored, weights_only=True)) == keys
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= set(keys)
    model.save_pretrained(tmp_path / "merged")
    backbone.tokenizer.save_pretrained(tmp_path / "merged")
    backbone.image_processor.save_pretrained(tmp_path / "merged")
    again = load_backbone(str(tmp_path / "merged"), "cpu")
    torch.testing.assert_close(logits_of(again), hooked, rtol=1e-4, atol=1e-4)
    merging.restore(model)
    with pytest.raises(LoRAError, match=FIX):
        model.save_pretrained(tmp_path / "lost")
    for end in (merging.bake, injection.eject):
        twin = copy.deepcopy(model)
        end(twin)
        assert list(twin.state_dict()) == keys and "save_pretrained" not in vars(twin)
        twin.save_pretrained(tmp_path / end.__name__)
        with safetensors.safe_open(tmp_path / end.__name__ / "model.safetensors", "pt") as file:
            assert set(file.keys()) <= set(keys)


@pytest.mark.parametrize("how", ["a part", "the model around an adapted part", "a passed state_dict", "a copy", "a pickle"])
def test_save_pretrained_of_an_adapted_model_is_refused(make, tmp_path, how):
    """Parts, copies and pickles of an adapted model raise LoRAError too. Parts without adapters are saved."""
    model = make("blip").model
    target: Any = model.vision_model if how == "the model around an adapted part" else model
    site = "vision_model.encoder.layers.0.mlp.fc1".removeprefix("" if target is model else "vision_model.")
    injection.inject(target, [Site(site, 2)])
    saved = {"a part": model.vision_model, "a copy": copy.deepcopy(model), "a pickle": None}.get(how, model)
    saved = pickle.loads(pickle.dumps(model)) if saved is None else saved
    options = {"state_dict": model.state_dict()} if how == "a passed state_dict" else {}
    with pytest.raises(LoRAError, match=r"adapter 'default'.*" + FIX):
        saved.save_pretrained(tmp_path / "lost", **options)
    if how != "the model around an adapted part":
        model.text_decoder.save_pretrained(tmp_path / "text")  # this part has no adapter
    if how == "a copy":
        injection.eject(saved)
        saved.save_pretrained(tmp_path / "base")
        with pytest.raises(LoRAError, match=FIX):
            model.save_pretrained(tmp_path / "lost")


def test_a_folder_with_adapters_in_its_weights_file_is_refused(make, tmp_path):
    """`load_backbone` raises ModelError, because transformers would ignore the keys of the adapters."""
    backbone = make("blip")
    keys = backbone.model.state_dict()
    injection.inject(backbone.model, [Site("vision_model.encoder.layers.0.mlp.fc1", 2)])
    every = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    assert set(every) > set(keys)
    injection.eject(backbone.model)
    backbone.model.save_pretrained(tmp_path)
    safetensors.torch.save_file(every, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"vision_model\.encoder\.layers\.0\.mlp\.fc1\.lora\.default\.A.*lora_blip\.bake"):
        load_backbone(str(tmp_path), "cpu")


def test_a_state_dict_has_only_the_adapters_that_are_not_merged():
    """If one of two adapters is merged, the state_dict has only the tensors of the other. It loads into the same outputs."""
    model = adapt(net(), "a", "b")
    every = set(model.state_dict())
    assert {"0.lora.a.A", "0.lora.b.B"} <= every
    merging.merge(model, "a")
    state = model.state_dict()
    assert set(state) == {key for key in every if ".lora.a." not in key}
    assert all(key.startswith("x.") for key in model.state_dict(prefix="x."))
    assert model.state_dict(keep_vars=True)["0.lora.b.A"] is model[0].lora["b"].A and not state["0.lora.b.A"].requires_grad
    x = torch.randn(2, 4)
    expected = model(x)
    plain = adapt(net(), "b")
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x), expected)
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match=r"0\.lora\.b\.A"):
        model.load_state_dict({key: value for key, value in state.items() if key != "0.lora.b.A"})
    merging.restore(model)
    with pytest.raises(RuntimeError, match=r"0\.lora\.a\.A"):
        model.load_state_dict(state)


def test_a_state_of_unmerged_adapters_is_not_loaded_into_a_merged_model():
    """W of the state is without the update, and the hook skips merged adapters: the update would be lost without an error."""
    model = adapt(net(), "a", "b")
    x, state = torch.randn(2, 4), {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(x)
    merging.merge(model, "a")
    with pytest.raises(RuntimeError, match=r"0\.lora\.a is merged in this model only; call lora_blip\.restore\(model\)"):
        model.load_state_dict(state)
    merging.restore(model)
    model.load_state_dict(state)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.Sequential], ids=["DataParallel", "Sequential"])
def test_an_adapter_is_saved_from_a_wrapped_model(make, tmp_path, wrap):
    """Before, it was an AttributeError after the training. A module with the model as a part is an error with the fix."""
    model = make("blip").model
    for lora in lora_blip.inject(model, "vit").values():
        nn.init.normal_(lora.B)
    alone, wrapped = lora_blip.save_adapter(tmp_path / "a.safetensors", model), wrap(model)
    if isinstance(wrapped, nn.Sequential):
        with pytest.raises(LoRAError, match=r"the adapter is on a part of this Sequential; give that part: model\.0$"):
            lora_blip.save_adapter(tmp_path / "b.safetensors", wrapped)
        return
    assert lora_blip.save_adapter(tmp_path / "b.safetensors", wrapped).read_bytes() == alone.read_bytes()
    other = nn.DataParallel(make("blip").model)
    lora_blip.load_adapter(other, alone)
    assert len(lora_blip.inject(nn.DataParallel(make("blip").model), "vit")) == len(attached.adapters(other.module))


def test_a_loaded_adapter_is_kept_if_the_model_is_frozen_before_inject(make, tmp_path):
    """As the page on the API says. Without this, an optimizer of all trainable parameters changes both."""
    model = make("blip").model
    for lora in lora_blip.inject(model, "vit").values():
        nn.init.normal_(lora.B)
    path = lora_blip.save_adapter(tmp_path / "cubes.safetensors", model)
    lora_blip.eject(model)
    lora_blip.load_adapter(model, path, name="cubes")
    assert all(p.requires_grad for lora in attached.adapters(model, "cubes").values() for p in lora.parameters())
    model.requires_grad_(False)
    robots = lora_blip.inject(model, "vit", name="robots")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for lora in robots.values() for p in lora.parameters()}
