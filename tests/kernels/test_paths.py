"""The table of the fast paths: the row of a processor, invalid files, and the choice by size."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from transformers import BlipVisionConfig

from lora_blip.kernels import paths, sdpa
from lora_blip.kernels import vit as kernels_vit
from lora_blip.kernels.linear import is_faster
from lora_blip.kernels.paths import NEVER, PathLimits
from lora_blip.lora import injection
from lora_blip.lora.sites import Site
from tests.support.networks import used

ROW = PathLimits("AuthenticAMD 25", 100, 50, 1000, 2**20, NEVER, 4000)
VALID = {name: value for name, value in asdict(ROW).items() if name != "processor"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AuthenticAMD 26", "AuthenticAMD 26"),
        ("AuthenticAMD 27", "AuthenticAMD 26"),
        ("AuthenticAMD 23", "AuthenticAMD 25"),
        ("GenuineIntel 6", "GenuineIntel 6"),
        ("GenuineIntel 19", "GenuineIntel 6"),
        ("aarch64", "AuthenticAMD 26"),
        ("AuthenticAMD ", "AuthenticAMD 26"),
    ],
)
def test_an_unknown_processor_uses_the_nearest_row_of_its_vendor_or_the_first_row(name, expected):
    rows = {each: replace(ROW, processor=each) for each in ("AuthenticAMD 26", "AuthenticAMD 25", "GenuineIntel 6")}
    assert paths.nearest(rows, name).processor == expected


def test_the_table_of_the_package_is_valid_and_a_written_table_is_read_back(tmp_path):
    assert paths.nearest(paths.read(paths.TABLE), paths.processor())
    (tmp_path / "paths.json").write_bytes(paths.table(ROW, replace(ROW, processor="x")))
    assert paths.read(tmp_path / "paths.json") == {"AuthenticAMD 25": ROW, "x": replace(ROW, processor="x")}
    assert paths.from_json(json.loads(json.dumps(paths.as_json(ROW)))) == ROW


INVALID = {
    "not JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 50_000,
    "no UTF-8": b"\xff\xfe{",
    "too long": b" " * (paths.MOST_BYTES + 1),
    "another format": json.dumps({"format": 2, "rows": {}}).encode(),
    "no rows": json.dumps({"format": 1, "rows": [1]}).encode(),
    **{
        f"{name} = {value}": json.dumps({"format": 1, "rows": {paths.processor(): VALID | {name: value}}}).encode()
        for name, value in (("onednn", -1), ("onednn", 1.5), ("fused", True), ("by_heads", NEVER + 1), ("separate_16bit", 2))
    },
    "an unknown entry": json.dumps({"format": 1, "rows": {paths.processor(): VALID | {"x": 1}}}).encode(),
    "a missing entry": json.dumps({"format": 1, "rows": {paths.processor(): {"onednn": 1}}}).encode(),
}


@pytest.mark.parametrize("content", INVALID.values(), ids=INVALID)
def test_an_invalid_file_of_the_user_is_ignored(content, tmp_path, monkeypatch):
    """The table of the package is used instead. A valid file is used."""
    monkeypatch.setattr(paths, "tuned_file", lambda: tmp_path / "paths.json")
    (tmp_path / "paths.json").write_bytes(content)
    assert paths.measured.__wrapped__() == paths.nearest(paths.read(paths.TABLE), paths.processor())
    own = replace(ROW, processor=paths.processor())
    (tmp_path / "paths.json").write_bytes(paths.table(own))
    assert paths.measured.__wrapped__() == own


def test_a_path_is_used_from_its_limit_on(monkeypatch):
    """This holds for the products, the fused update, and the attention in 16 bits."""
    monkeypatch.setattr("lora_blip.kernels.linear.has_kernel", lambda: True)
    x, weight, narrow = torch.ones(2, 10, 20), torch.ones(30, 20), torch.ones(8, 20)
    fused_linears, model = used(monkeypatch), nn.Sequential(nn.Linear(20, 30))
    injection.inject(model, [Site("0")])
    for limit in (12_000, 12_001):  # 20 rows · 20 · 30 multiplications; those of 32 more rows are 19,200
        paths.use(replace(ROW, onednn=limit + 19_200, onednn_narrow=limit - 8_800, fused=limit))
        assert is_faster(x, weight) == is_faster(x, narrow) == (limit == 12_000)
        fused_linears.clear()
        model(x.clone().requires_grad_())
        assert bool(fused_linears) == (limit == 12_000)


@pytest.mark.parametrize("limit", [2 * 3 * 5 * 7, 2 * 3 * 5 * 7 + 1])
def test_an_attention_in_16_bits_uses_the_fused_kernel_from_its_limit_on(limit, monkeypatch):
    """2 · 3 · 5 · 7 scores: rows, heads, tokens and keys. In float32, the limit has no effect."""
    q, k = torch.randn(2, 3, 5, 4).bfloat16(), torch.randn(2, 3, 7, 4).bfloat16()
    paths.use(replace(ROW, fused_16bit=limit))
    seen: list[torch.dtype] = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa.F, "scaled_dot_product_attention", lambda *given: seen.append(given[0].dtype) or real(*given))
    torch.testing.assert_close(sdpa.attend(q, k, k), real(q, k, k), rtol=2e-2, atol=2e-2)
    sdpa.attend(q.float(), k.float(), k.float())
    assert seen == [torch.bfloat16] * (limit == 2 * 3 * 5 * 7) + [torch.float32]


@pytest.mark.parametrize(("fused_16bit", "tokens", "expected"), [(0, 5, "heads"), (NEVER, 5, "heads"), (NEVER, 4, "at once")])
def test_a_large_attention_of_a_vit_goes_by_heads_if_that_is_faster_than_both_other_paths(
    fused_16bit, tokens, expected, monkeypatch
):
    """The limit of `by_heads` holds for each limit of PyTorch's fused kernel."""
    attention = kernels_vit.BlipVitAttention(BlipVisionConfig(hidden_size=8, num_attention_heads=2)).bfloat16()
    seen: list[str] = []
    for name, label in (("by_heads", "heads"), ("attend_at_once", "at once")):
        real = getattr(kernels_vit, name)
        monkeypatch.setattr(kernels_vit, name, lambda *given, real=real, label=label: seen.append(label) or real(*given))
    paths.use(replace(ROW, fused_16bit=fused_16bit, by_heads=1 * 2 * 5 * 5))
    attention(torch.randn(1, tokens, 8).bfloat16())
    assert seen == [expected]


def test_a_row_of_an_older_version_keeps_its_paths():
    """It had one entry for all sizes: True for separate operations, False for the fused kernel, never by heads."""
    for separate, limit, by_heads in ((True, NEVER, ROW.by_heads), (False, 0, NEVER)):
        old = {name: value for name, value in VALID.items() if name != "fused_16bit"} | {"separate_16bit": separate}
        assert paths.from_json(old | {"processor": "x"}) == replace(ROW, processor="x", fused_16bit=limit, by_heads=by_heads)


def test_the_line_of_a_run_names_the_paths_without_their_limits():
    row = replace(ROW, processor="AuthenticAMD 26", onednn=2**20, fused=0, fused_16bit=NEVER, by_heads=NEVER)
    assert (
        row.selection()
        == "fast paths for AuthenticAMD 26 (docs/fast_paths.md): large float32 products by oneDNN, fused updates"
    )
    never = replace(row, onednn=NEVER, fused=NEVER)
    assert never.selection() == "fast paths for AuthenticAMD 26 (docs/fast_paths.md): none"
