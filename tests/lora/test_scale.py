"""The scale of a loaded adapter multiplies its change of the weights: 0 is the base, 1 the adapter as trained."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.errors import AdapterError, ConfigError
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.commands import CaptionConfig
from lora_blip.inference.output import identity
from lora_blip.inference.setup import describe, read_inputs, task_of
from lora_blip.lora import adapter_file, attached, merging
from lora_blip.models.precision import dtype_of
from lora_blip.runtime.agreement import changes
from lora_blip.runtime.setting_checks import VARIANTS
from tests.support.models import inject, logits_of

TARGETS = "vit.q,vit.mlp,text"


@pytest.fixture(params=VARIANTS)
def saved(request: pytest.FixtureRequest, make, tmp_path: Path) -> Path:
    backbone = make("blip")
    inject(backbone, TARGETS, variant=request.param)
    return adapter_file.save(tmp_path / "adapter.safetensors", backbone, task={"name": "caption"})


def weights_of(make, saved: Path, scale: float) -> dict[str, torch.Tensor]:
    backbone = make("blip")
    adapter_file.load(backbone, saved, scale=scale)
    merging.bake(backbone.model)
    return {path: module.weight for path, module in backbone.model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_the_change_of_each_weight_is_multiplied(make, saved):
    """W + λ (W' − W) for each variant, also for a negative λ, and the hooks give the logits of the merged weights."""
    zero, one = (weights_of(make, saved, scale) for scale in (0.0, 1.0))
    base = make("blip")
    assert all(torch.equal(weight, base.model.get_submodule(path).weight) for path, weight in zero.items())
    for scale in (0.5, -1.0, 2.0):
        scaled, changed = weights_of(make, saved, scale), 0
        for path, weight in scaled.items():
            assert torch.allclose(weight, zero[path] + scale * (one[path] - zero[path]), rtol=1e-5, atol=1e-6)
            changed += not torch.equal(weight, zero[path])
        assert changed == len({site.module for site in adapter_file.read(saved).sites})
        backbone = make("blip")
        adapter_file.load(backbone, saved, scale=scale)
        hooked = logits_of(backbone)
        merging.merge(backbone.model)
        assert torch.allclose(logits_of(backbone), hooked, rtol=1e-4, atol=1e-4)


def test_scale_0_gives_the_bits_of_the_base_and_scale_1_those_of_the_adapter(make, saved):
    logits = []
    for scale in (None, 0.0, 1.0):
        backbone = make("blip")
        adapter_file.load(backbone, saved) if scale is None else adapter_file.load(backbone, saved, scale=scale)
        logits.append(logits_of(backbone))
    assert torch.equal(logits[1], logits_of(make("blip"))) and torch.equal(logits[2], logits[0])


def test_a_scaled_adapter_is_not_saved(make, saved, tmp_path):
    """Its file would contain the adapter as trained."""
    backbone = make("blip")
    adapter_file.load(backbone, saved, scale=0.5)
    with pytest.raises(AdapterError, match="loaded with another scale, which a file cannot contain"):
        adapter_file.save(tmp_path / "again.safetensors", backbone)
    assert not (tmp_path / "again.safetensors").exists()


def test_captioners_with_two_scales_share_a_base(make, saved):
    backbone = make("blip")
    one, half, same = (Captioner.from_adapter(saved, base=backbone, scale=scale) for scale in (1.0, 0.5, 0.5))
    assert one.adapter_name != half.adapter_name == same.adapter_name
    loras = [next(iter(attached.adapters(backbone.model, each.adapter_name).values())) for each in (one, half)]
    changes = [getattr(lora, "strength", 1.0) * lora.scale for lora in loras]
    assert changes[1] == 0.5 * changes[0] and half.adapter.scale == 0.5


def test_a_run_of_infer_has_its_scale(make, saved, tmp_path):
    """Another scale gives other predictions, so it is another run. The line at the start names the scale."""
    (tmp_path / "images").mkdir()
    configs = [InferConfig(adapter=str(saved), images=str(tmp_path / "images"), model="x", scale=scale) for scale in (1.0, 0.5)]
    task = task_of(make("blip"), adapter_file.read(saved), configs[0])
    adapters = [replace(adapter_file.read(saved), scale=config.scale) for config in configs]
    identities = [identity(config, task, each, "fp32") for config, each in zip(configs, adapters, strict=True)]
    assert identities[1] == identities[0] | {"scale": 0.5}
    assert changes(*identities) == ["scale was 1.0 and is 0.5"] and changes(*identities[::-1]) == ["scale was 0.5 and is 1.0"]
    older = {name: value for name, value in identities[0].items() if name not in ("scale", "base_dtype")}
    assert changes(older, identities[0]) == []  # a run of an older version can be resumed
    assert json.loads(json.dumps(identities[1])) == identities[1]
    assert "scaled by 0.5" in describe(task, adapters[1], 1, "fp32") and "scaled" not in describe(task, adapters[0], 1, "fp32")


@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_a_run_of_infer_has_the_dtype_of_its_base(make, tmp_path, kind):
    """A base that BASE_DTYPE rounds to 16 bits gives other predictions. "auto" and its own dtype are the same run."""
    config = InferConfig(model="x", adapter="none", images=str(tmp_path))
    stored = {}
    for dtype in ("fp32", "bf16", "fp16"):
        backbone = make(kind, dtype=dtype)
        assert dtype_of(backbone.model) == dtype  # an fp16 BLIP-2 keeps its Q-Former in float32
        task = task_of(backbone, None, config)
        for precision in ("fp32", dtype):
            stored[dtype, precision] = identity(config, task, None, precision)["base_dtype"]
    own = "" if kind == "opt" else "bf16"
    assert stored["fp32", "fp32"] == "" and stored["bf16", "fp32"] == "bf16" and stored["fp16", "fp32"] == "fp16"
    assert stored["bf16", "bf16"] == own


def test_infer_reads_the_adapter_with_its_scale(saved):
    config = InferConfig(adapter=str(saved), images="image_test", scale=0.25)
    assert read_inputs(config).adapter.scale == 0.25


SCALE = r"scale = .*: expected|scale = '1' is a text; write it without quotes: 1\.0"


def test_a_scale_must_be_a_number_of_a_sensible_size(make, saved):
    for scale in (math.nan, math.inf, 1e6, "1", True):
        with pytest.raises(ConfigError, match=SCALE):
            adapter_file.load(make("blip"), saved, scale=scale)
        with pytest.raises(ConfigError, match=SCALE):
            Captioner.from_adapter(saved, base=make("blip"), scale=scale)
        with pytest.raises(ConfigError, match=SCALE):
            InferConfig(adapter=str(saved), scale=scale)


def test_a_scale_without_an_adapter_is_an_error(make):
    """It would have no effect on the base."""
    for command in (InferConfig, EvaluateConfig, partial(CaptionConfig, images=["photo.jpg"])):
        with pytest.raises(ConfigError, match=r"scale = 0\.5, but there is no adapter to scale"):
            command(adapter="none", model="x", scale=0.5)
    with pytest.raises(ConfigError, match="there is no adapter to scale"):
        Captioner.from_adapter(None, base=make("blip"), scale=0.5)
