"""The laws of LoRA for its variants: no-op start, merged is hooked, exact restore, the adapter file, several adapters, rows."""

import json

import pytest
import safetensors
import torch

from lora_blip.config import TrainConfig
from lora_blip.errors import AdapterError, ConfigError, LoRAError
from lora_blip.lora import adapter_file, attached, header, injection, merging, targets
from lora_blip.lora.sites import Site
from lora_blip.lora.variants import CLASSES
from lora_blip.runtime.setting_checks import VARIANTS
from tests.lora.test_adapter_file import rewrite
from tests.support.models import inject, logits_of

OTHERS = [variant for variant in VARIANTS if variant != "lora"]
variants = pytest.mark.parametrize("variant", OTHERS)


def test_each_variant_of_the_settings_has_a_class():
    assert tuple(CLASSES) == VARIANTS


def test_rslora_divides_alpha_by_the_square_root_of_r():
    """ΔW = (alpha / √r) · B A, so with r = 16 it is 4 times that of LoRA. The fused update computes the same."""
    for r, factor in ((1, 1.0), (16, 4.0)):
        linear, x = torch.nn.Linear(20, 10), torch.randn(3, 20)
        outputs = []
        for variant in ("lora", "rslora"):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(20, 10))
            model.load_state_dict({f"0.{name}": value for name, value in linear.state_dict().items()})
            (lora,) = injection.inject(model, "0", r=r, alpha=8.0, variant=variant).values()
            torch.nn.init.normal_(lora.B)
            assert torch.equal(lora.delta_weight(), lora.B @ lora.A * (8.0 / (r if variant == "lora" else r**0.5)))
            outputs.append(model(x) - linear(x))
        assert torch.allclose(outputs[1], factor * outputs[0], rtol=1e-4, atol=1e-5) and outputs[0].any()


@variants
def test_a_new_adapter_changes_no_bit_of_the_logits(make, variant):
    backbone = make("blip")
    expected = logits_of(backbone)
    inject(backbone, variant=variant, trained=False)
    assert torch.equal(logits_of(backbone), expected)


@variants
def test_merged_logits_are_those_of_the_hooks_and_restore_is_exact(backbone, variant):
    weights = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    base = logits_of(backbone)
    inject(backbone, variant=variant)
    hooked = logits_of(backbone)
    merging.merge(backbone.model)
    merged = logits_of(backbone)
    assert torch.allclose(merged, hooked, rtol=1e-4, atol=1e-4) and not torch.allclose(merged, base, rtol=1e-2, atol=1e-2)
    merging.restore(backbone.model)
    assert torch.equal(logits_of(backbone), hooked)
    injection.eject(backbone.model)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.model.state_dict().items())


@variants
def test_a_file_has_the_variant_and_loads_bit_for_bit(make, tmp_path, variant):
    """The header has the variant and format 2: an older lora_blip would compute something else from the same tensors."""
    backbone = make("blip")
    inject(backbone, "vit.q,text[1:]:r=2", variant=variant)
    expected = logits_of(backbone)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    adapter = adapter_file.read(path)
    assert adapter.metadata["format_version"] == 2 and adapter.metadata["lora"]["variant"] == adapter.variant == variant
    assert {site.variant for site in adapter.sites} == {variant}
    other = make("blip")
    adapter_file.load(other, path)
    assert torch.equal(logits_of(other), expected)


@variants
def test_an_older_reader_refuses_the_file(make, tmp_path, monkeypatch, variant):
    backbone = make("blip")
    inject(backbone, "vit", variant=variant)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    monkeypatch.setattr(header, "FORMAT_VERSION", 1)
    with pytest.raises(AdapterError, match="format 2, and this lora_blip reads formats up to 1; upgrade it"):
        adapter_file.read(path)


def test_a_file_of_plain_lora_has_no_variant_and_format_1(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit")
    with safetensors.safe_open(adapter_file.save(tmp_path / "a.safetensors", backbone), "pt") as file:
        metadata = json.loads(file.metadata()["lora_blip"])
    assert metadata["format_version"] == 1 and list(metadata["lora"]) == ["dropout", "modules"]


def test_a_wrong_variant_in_a_header_is_refused(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit", variant="rslora")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    lora, whole = adapter_file.read(path).metadata["lora"], path.read_bytes()
    for value in ("vera", 3, None, ["lora"], "RSLORA"):
        path.write_bytes(whole)
        with pytest.raises(AdapterError, match=r"lora\.variant is .*, expected one of lora, rslora"):
            adapter_file.read(rewrite(path, header={"lora": lora | {"variant": value}}))
    path.write_bytes(whole)
    with pytest.raises(AdapterError, match="has format 1, in which an adapter has no variant"):
        adapter_file.read(rewrite(path, header={"format_version": 1}))


def test_an_adapter_has_one_known_variant(make):
    backbone = make("blip")
    first, second = targets.find(backbone.model, "vit", variant="rslora")[:1], targets.find(backbone.model, "text")[:1]
    with pytest.raises(LoRAError, match="one variant, and the sites have rslora and lora"):
        injection.inject(backbone.model, [*first, *second])
    with pytest.raises(LoRAError, match="variant='vera': expected one of lora, rslora"):
        injection.inject(backbone.model, "vit", variant="vera")
    injection.inject(backbone.model, first)
    with pytest.raises(LoRAError, match="with another r, alpha or variant"):
        injection.inject(backbone.model, [Site(first[0].module, first[0].r, first[0].alpha)])
    assert len(attached.adapters(backbone.model)) == 1


def test_a_wrong_variant_in_the_settings_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"variant = 'rs-lora': expected one of lora, rslora.*did you mean 'rslora'"):
        TrainConfig(variant="rs-lora")
