"""The table of the fast paths: the row of a processor, invalid files, and the choice by size."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from lora_blip.kernels import paths, sdpa
from lora_blip.kernels.linear import is_faster
from lora_blip.kernels.paths import NEVER, PathLimits
from lora_blip.lora import injection
from lora_blip.lora.sites import Site
from tests.support.networks import used

ROW = PathLimits("AuthenticAMD 25", 100, 50, 1000, 2**20, True, 4000)
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
        for name, value in (("onednn", -1), ("onednn", 1.5), ("fused", True), ("by_heads", NEVER + 1), ("separate_16bit", 1))
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
    for separate in (True, False):
        paths.use(replace(ROW, separate_16bit=separate))
        assert sdpa.prefers_separate(x.bfloat16()) is separate and not sdpa.prefers_separate(x)
