"""`lora-blip blend`: the update of the new adapter is the weighted sum, exactly or in a chosen rank with the printed error."""

import sys
from pathlib import Path

import pytest
import torch

from lora_blip import cli
from lora_blip.config import InferConfig
from lora_blip.errors import AdapterError, ConfigError
from lora_blip.inference.setup import describe, task_of
from lora_blip.inspection import description
from lora_blip.lora import adapter_file, blending, injection
from lora_blip.lora.adapter_file import Adapter
from lora_blip.lora.blend_command import BlendConfig, parsed
from lora_blip.tasks.caption import CaptionTask
from tests.lora.test_adapter_file import rewrite
from tests.support.models import inject, logits_of


def saved(make, folder: Path, what: str, seed: int = 0, **options) -> Adapter:
    """Save an adapter with random values on the targets `what`, and return it."""
    backbone = make("blip")
    generator = torch.Generator().manual_seed(seed)
    for lora in inject(backbone, what, **options).values():
        for half in (lora.A, lora.B):
            half.data.copy_(0.1 * torch.randn(half.shape, generator=generator))
    task = CaptionTask(backbone).metadata()
    return adapter_file.read(adapter_file.save(folder / f"{seed}.safetensors", backbone, task=task))


def changes_of(make, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Return {module: ΔW} of an adapter, in float64."""
    backbone, sums = make("blip"), dict[str, torch.Tensor]()
    loras = injection.inject(backbone.model, adapter.sites)
    injection.copy_values(loras, adapter.tensors)
    for lora in loras.values():
        sums[lora.site.module] = sums.get(lora.site.module, 0) + lora.double().delta_weight()
    return sums


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lora-blip", "blend", *arguments])
    cli.main()


def test_a_blend_is_the_weighted_sum_with_added_ranks(make, tmp_path):
    """Whole linears, blocks of one that another adapter has as a whole, modules of one adapter alone, and rsLoRA."""
    first = saved(make, tmp_path, "vit.q,vit.v,text[0:1]:r=3", 1)
    second = saved(make, tmp_path, "vit.qkv,text[0:1]", 2, r=5, variant="rslora")
    third = saved(make, tmp_path, "vit.mlp", 3)
    weights = [0.7, -0.4, 2.0]
    adapters = [first, second, third]
    blended = blending.blend(adapters, weights)
    result = adapter_file.read(blending.save(tmp_path / "blend.safetensors", blended))
    assert result.variant == "lora" and result.metadata["format_version"] == 1 and blended.relative_error == 0
    actual, parts = changes_of(make, result), [changes_of(make, adapter) for adapter in adapters]
    assert actual.keys() == set().union(*parts)
    for module, change in actual.items():
        expected = sum(weight * part[module] for weight, part in zip(weights, parts, strict=True) if module in part)
        assert torch.allclose(change, expected, rtol=0, atol=1e-7 * float(expected.abs().max())) and change.any(), module
    ranks = {site.address: site.r for site in result.sites}
    assert ranks["vision_model.encoder.layers.0.self_attn.qkv"] == 4 + 4 + 5
    assert ranks["vision_model.encoder.layers.0.mlp.fc1"] == 4
    backbone = make("blip")
    adapter_file.load(backbone, result)  # it fits the base
    assert logits_of(backbone).isfinite().all()


def test_a_truncated_blend_is_the_best_of_its_rank_and_reports_its_error(make, tmp_path):
    """ΔWᵣ has the largest r singular values of the sum, and the error is the norm of the others."""
    adapters = [saved(make, tmp_path, "vit", 1), saved(make, tmp_path, "vit", 2)]
    exact, cut = (blending.blend(adapters, [0.5, 0.5], r) for r in (0, 3))
    lost = norm = 0.0
    for whole, part in zip(exact.updates, cut.updates, strict=True):
        U, S, Vh = torch.linalg.svd(whole.B @ whole.A, full_matrices=False)
        assert part.site.r == 3 and torch.allclose(part.B @ part.A, U[:, :3] * S[:3] @ Vh[:3], atol=1e-12)
        lost, norm = lost + S[3:].square().sum(), norm + S.square().sum()
    assert cut.relative_error == pytest.approx((lost / norm).sqrt().item(), rel=1e-5) and cut.relative_error > 0.1
    assert blending.blend(adapters, [0.5, 0.5], 64).relative_error < 1e-12  # a rank above the sum loses nothing


def test_the_command_writes_an_adapter_and_prints_the_error(make, tmp_path, monkeypatch, capsys):
    first, second = (saved(make, tmp_path, "vit", seed) for seed in (1, 2))
    arguments = [f"{first.path}=0.7", f"{second.path}=0.3", "--output-dir", str(tmp_path / "new")]
    run(monkeypatch, *arguments, "--r", "2")
    out = capsys.readouterr().out
    assert f"0.7 · {first.path} + 0.3 · {second.path}" in out and "8 modules, r = 2; the truncation loses" in out
    result = adapter_file.read(tmp_path / "new" / "adapter.safetensors")
    assert result.metadata["training"]["blend"]["sources"][1]["weight"] == 0.3 and result.task == first.task
    assert description.describe(result)["blend of"] == f"0.7 · {first.path} + 0.3 · {second.path}"
    task = task_of(make("blip"), result, InferConfig(model="x"))
    assert "caption, a blend" in describe(task, result, 1, "fp32")
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert "exists already; give a new folder: --output-dir" in capsys.readouterr().err
    run(monkeypatch, *arguments[:2], "--output-dir", str(tmp_path / "exact"))
    assert "r = 8; exact: the ranks are added" in capsys.readouterr().out


def test_adapters_that_do_not_fit_together_are_refused(make, tmp_path):
    first = saved(make, tmp_path, "vit", 1)
    with pytest.raises(AdapterError, match="is DoRA, which also scales the rows"):
        blending.blend([first, saved(make, tmp_path, "vit", 2, variant="dora")], [1, 1])
    other = saved(make, tmp_path, "vit", 3)
    base = dict(other.metadata["base"])
    module, sample = next(iter(base["samples"].items()))
    changed = sample | {"values": [2 * value for value in sample["values"]]}
    for header, reason in (
        ({"base": base | {"samples": base["samples"] | {module: changed}}}, "trained on different bases"),
        ({"base": base | {"image_size": 7}}, "has the image size 32, and .* has 7"),
        ({"task": other.task | {"name": "vqa"}}, "has the task 'caption', and .* has 'vqa'"),
    ):
        path = tmp_path / "changed.safetensors"
        path.write_bytes(other.path.read_bytes())
        with pytest.raises(AdapterError, match=reason):
            blending.blend([first, adapter_file.read(rewrite(path, header=header))], [1, 1])
    for r in (0, 2):
        with pytest.raises(AdapterError, match="the weighted sum of the adapters is zero"):
            blending.blend([first, first], [1, -1], r)


def test_a_term_needs_a_weight():
    assert parsed("runs/a=b=0.5") == ("runs/a=b", 0.5) and parsed("latest=-1e-1") == ("latest", -0.1)
    for text in ("latest", "latest=", "=0.5", "a=nan", "a=inf", "a=0", "a=1e9", "a=half"):
        with pytest.raises(ConfigError, match=r"is not ADAPTER=WEIGHT .*; for example: '?\S*=0\.5"):
            BlendConfig(adapters=[text], output_dir="new")
    with pytest.raises(ConfigError, match=r"output_dir is empty; .*--output-dir blended"):
        BlendConfig(adapters=["latest=1"])
