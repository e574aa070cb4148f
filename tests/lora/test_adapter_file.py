"""The adapter file: saved tensors and settings are loaded bit for bit; a file that does not fit raises AdapterError."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from lora_blip.errors import AdapterError
from lora_blip.inference.setup import task_of
from lora_blip.lora import adapter_file, attached, merging
from lora_blip.models import weights
from lora_blip.runtime import runs
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from tests.support.models import inject, logits_of


@pytest.fixture
def saved(make, tmp_path: Path) -> Path:
    backbone = make("blip")
    inject(backbone, "vit,text[0:1]:r=2")
    return adapter_file.save(tmp_path / "adapter.safetensors", backbone)


def rewrite(path: Path, tensors=None, header=None) -> Path:
    """Replace tensors (None removes one) and parts of the header in a file."""
    with safetensors.safe_open(path, "pt") as file:
        old = {key: file.get_tensor(key) for key in file.keys()}
        metadata = json.loads(file.metadata()["lora_blip"])
    metadata.pop("header_sha256")  # as in files of earlier versions: a changed header would be an error
    new = {key: value for key, value in (old | (tensors or {})).items() if value is not None}
    safetensors.torch.save_file(new, path, {"lora_blip": json.dumps(metadata | (header or {}))})
    return path


def test_a_loaded_adapter_gives_the_logits_of_the_saved_one(backbone, make, tmp_path):
    adapters = inject(backbone, r=3)
    expected = logits_of(backbone)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    moved = shutil.copy(path, tmp_path / "moved.safetensors")  # a copy of the file is sufficient
    path.unlink()
    other = make(Path(backbone.name).name)
    adapter_file.load(other, moved)
    assert torch.equal(logits_of(other), expected)
    assert all(torch.equal(x.A, adapters[address].A) for address, x in attached.adapters(other.model).items())


def test_blocks_and_ranks_are_saved_and_loaded(make, tmp_path):
    backbone = make("blip")
    inject(backbone, "vit.q,vit.v:r=2:alpha=3,text[1:]")
    expected = logits_of(backbone)
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    other = make("blip")
    adapter_file.load(other.model, path)  # a model without Backbone
    assert torch.equal(logits_of(other), expected)


def test_the_dropout_and_the_name_of_the_base_are_saved_and_loaded(make, tmp_path):
    """The file has the name of the backbone, or `name_or_path` if a model is saved. An existing file is not overwritten."""
    backbone = make("blip")
    for x in inject(backbone, "vit").values():
        x.dropout = 0.25
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    assert adapter_file.read(path).metadata["lora"]["dropout"] == 0.25
    other = make("blip")
    adapter_file.load(other, path)
    assert {x.dropout for x in attached.adapters(other.model).values()} == {0.25}
    assert adapter_file.read(path).base == backbone.name
    backbone.model.name_or_path = "elsewhere"
    assert adapter_file.read(adapter_file.save(path, backbone, overwrite=True)).base == backbone.name
    assert adapter_file.read(adapter_file.save(tmp_path / "b.safetensors", backbone.model)).base == "elsewhere"
    with pytest.raises(AdapterError, match="exists already"):
        adapter_file.save(path, backbone)


def test_saving_while_merged_writes_the_same_bytes(make, tmp_path):
    backbone = make("blip")
    inject(backbone)
    hooked = adapter_file.save(tmp_path / "hooked.safetensors", backbone).read_bytes()
    merging.merge(backbone.model)
    assert adapter_file.save(tmp_path / "merged.safetensors", backbone).read_bytes() == hooked


def test_the_file_has_float32_tensors_the_task_and_versions(make, tmp_path):
    """The file has lora_A and lora_B in float32, the base, the task, the training record and the library versions."""
    backbone = make("opt", dtype="fp16")
    inject(backbone, "vit")
    task = CaptionTask(backbone, "a photo of", Generation(17, 3))
    path = adapter_file.save(tmp_path / "a.safetensors", backbone, task=task.metadata(), training={"steps": 9})
    with safetensors.safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    metadata = adapter_file.read(path).metadata
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"lora_A", "lora_B"} and len(tensors) == 16
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert (
        metadata["format_version"] == 1 and metadata["base"]["name"] == backbone.name and metadata["training"] == {"steps": 9}
    )
    assert set(metadata["versions"]) == {"lora_blip", "torch", "transformers"}
    again = task_of(backbone, adapter_file.read(path))
    assert (again.prompt, again.generation) == (task.prompt, task.generation)


def test_an_adapter_loads_on_its_base_in_every_dtype(make, tmp_path):
    for trained in ("fp32", "bf16", "fp16"):
        backbone = make("blip", dtype=trained)
        inject(backbone, "vit")
        path = adapter_file.save(tmp_path / f"{trained}.safetensors", backbone)
        for used in ("fp32", "bf16", "fp16"):
            adapter_file.load(make("blip", dtype=used), path)


def test_another_base_is_refused_even_with_equal_shapes(make, saved):
    """A copy of the base with one linear scaled by 2 % raises AdapterError, and so does another architecture."""
    other = make("blip")
    linear = other.model.vision_model.encoder.layers[1].mlp.fc2
    linear.weight.data *= 1.02
    with pytest.raises(
        AdapterError,
        match=r"weights of 'vision_model\.encoder\.layers\.1\.mlp\.fc2' are not those.*which has changed since; load it again",
    ):
        adapter_file.load(other, saved)
    assert not attached.names(other.model)
    with pytest.raises(AdapterError, match="this model has no linear 'text_decoder"):
        adapter_file.load(make("opt"), saved)


def test_a_base_that_differs_only_outside_the_adapted_part_is_refused(make, tmp_path):
    """Several BLIP-2 models share one ViT, so an adapter of the ViT also has a fingerprint of the language model."""
    backbone = make("opt")
    inject(backbone, "vit")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    other = make("opt")
    other.model.language_model.model.decoder.layers[1].fc2.weight.data *= 1.02
    with pytest.raises(AdapterError, match=r"weights of 'language_model\..*fc2' are not those"):
        adapter_file.load(other, path)


@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa", "itm"])
def test_a_base_with_another_adapter_merged_into_it_is_refused(make, tmp_path, kind):
    """Before, an adapter of the ViT was loaded on an export of a text adapter, whose last linear was the same."""
    backbone = make(kind)
    inject(backbone, "vit.q")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone)
    for linear in [each for each in adapter_file.read(path).metadata["base"]["samples"] if "vision_model" not in each]:
        other = make(kind)
        other.model.get_submodule(linear).weight.data *= 1.02
        with pytest.raises(AdapterError, match=f"the weights of '{re.escape(linear)}' are not those of the training"):
            adapter_file.load(other, path)
    assert not attached.names(other.model)
    part = "language_model" if kind in ("opt", "t5") else "text_"
    linears = {name for name, each in backbone.model.named_modules() if isinstance(each, torch.nn.Linear) and part in name}
    sampled = adapter_file.read(path).metadata["base"]["samples"].keys()
    assert len(linears - sampled) <= 1  # only the head, if it shares the weight of the embedding


def key_of(path: Path, half: str) -> str:
    return next(key for key in adapter_file.read(path).tensors if key.endswith(half))


def test_a_damaged_file_is_refused_with_the_reason(make, saved):
    """`load` raises AdapterError that names the defect, and injects no adapter."""
    backbone, whole = make("blip"), saved.read_bytes()
    a, b = key_of(saved, "lora_A"), key_of(saved, "lora_B")
    shape_a = tuple(adapter_file.read(saved).tensors[a].shape)
    cases = {
        rf"{re.escape(b)}' is missing \(1 of": {"tensors": {b: None}},
        "stray.lora_A' belongs to no module": {"tensors": {"stray.lora_A": torch.zeros(1, 1)}},
        rf"lora_A of '.*' is \(2, 7\), and this model needs \({shape_a[0]}, {shape_a[1]}\)": {
            "tensors": {a: torch.ones(2, 7)},
            "header": {"sha256": ""},
        },
        "its weights have changed since it was saved": {"tensors": {a: adapter_file.read(saved).tensors[a] + 1e-3}},
        "its header says r=2 in float32": {"tensors": {a: torch.ones(5, 32)}},
        "is damaged: its weights have changed": {
            "tensors": {b: torch.full_like(adapter_file.read(saved).tensors[b], torch.nan)}
        },
        "contains NaN": {
            "tensors": {b: torch.full_like(adapter_file.read(saved).tensors[b], torch.nan)},
            "header": {"sha256": ""},
        },
        "is damaged: its header has changed since it was saved; copy it again": {"header": {"header_sha256": "0" * 64}},
        "every lora_B is zero": {
            "tensors": {k: torch.zeros_like(t) for k, t in adapter_file.read(saved).tensors.items() if k.endswith("lora_B")},
            "header": {"sha256": ""},
        },
        "reads formats up to 2": {"header": {"format_version": 3}},
        "header cannot be": {"header": {"lora": {"modules": {"x": 3}}}},
        "header cannot be understood": {"header": {"lora": []}},
        "its header cannot": {"header": {"base": {"name": "x", "samples": {}}}},
        "header cannot": {"header": {"task": None}},
        "entry for 'm' cannot be understood": {
            "header": {
                "lora": {"modules": {"m": {"module": "m", "r": 2, "alpha": float("nan")}}},
                "base": {"name": "", "samples": {"m": {}}},
            }
        },
    }
    for reason, change in cases.items():
        saved.write_bytes(whole)
        rewrite(saved, **change)
        with pytest.raises(AdapterError, match=reason):
            adapter_file.load(backbone, saved)
        assert not attached.names(backbone.model)


def test_each_flipped_bit_of_the_header_is_an_error_or_changes_nothing(saved):
    """Before, a flipped bit in an alpha was loaded, and gave other results without a message."""
    whole = saved.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    expected, random = adapter_file.read(saved), np.random.default_rng(0)
    alpha = whole.index(b'alpha\\": ') + 9
    places = zip(random.integers(8, 8 + length, 400).tolist(), random.integers(0, 8, 400).tolist(), strict=True)
    refused = 0
    for place, bit in [*((alpha, bit) for bit in range(8)), *places]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        saved.write_bytes(damaged)
        try:
            found = adapter_file.read(saved)
        except AdapterError:
            refused += 1
        else:
            assert (
                all(found.metadata[key] == value for key, value in expected.metadata.items())
                and found.tensors.keys() == expected.tensors.keys()
            ), place
    assert refused > 350


def test_a_missing_incomplete_or_foreign_file_is_refused(tmp_path, saved):
    with pytest.raises(AdapterError, match="does not exist"):
        adapter_file.read(tmp_path / "none.safetensors")
    for content in (b"", b"text", saved.read_bytes()[:-10], saved.read_bytes()[:100]):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(AdapterError, match=r"not a complete \.safetensors"):
            adapter_file.read(tmp_path / "x.safetensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(AdapterError, match="not written by lora_blip"):
        adapter_file.read(tmp_path / "y.safetensors")


def test_a_file_that_is_no_safetensors_is_named_as_such(tmp_path):
    """Before, the reason was a header of 7,306,087,010,016,430,715 bytes."""
    (tmp_path / "config.json").write_text('{"model_type": "blip", "more": "and more"}')
    with pytest.raises(AdapterError, match=r"its first bytes are not those of safetensors\); give a run folder"):
        adapter_file.read(tmp_path / "config.json")


def test_an_adapter_that_was_trained_on_a_baked_model_names_the_reason(make, saved, tmp_path, capsys):
    """Before, the advice was to load the base, which is what the caller had done."""
    baked = make("blip")
    adapter_file.load(baked, saved)
    merging.bake(baked.model)
    capsys.readouterr()
    inject(baked, "vit")
    assert "The new adapter 'default' fits only a base with this merge" in capsys.readouterr().err
    second = adapter_file.save(tmp_path / "second.safetensors", baked)
    with pytest.raises(AdapterError, match=r"merged permanently into it; first merge that one with lora_blip\.bake") as e:
        adapter_file.load(make("blip"), second)
    assert "load that base" not in str(e.value) and "load_backbone" not in str(e.value)
    again = make("blip")  # the fix
    adapter_file.load(again, saved)
    merging.bake(again.model)
    adapter_file.load(again, second)
    assert torch.equal(logits_of(again), logits_of(baked))


def test_an_untrained_adapter_is_not_saved_and_no_file_is_overwritten(make, tmp_path):
    """`save` raises AdapterError for a model without adapters, for B = 0, and if the file exists."""
    backbone = make("blip")
    with pytest.raises(AdapterError, match="has no adapter"):
        adapter_file.save(tmp_path / "a.safetensors", backbone)
    inject(backbone, "vit", trained=False)
    with pytest.raises(AdapterError, match="every lora_B is zero"):
        adapter_file.save(tmp_path / "a.safetensors", backbone)
    inject(backbone, "vit")
    (tmp_path / "a.safetensors").write_text("existing")
    with pytest.raises(AdapterError, match="exists already"):
        adapter_file.save(tmp_path / "a.safetensors", backbone)
    assert (tmp_path / "a.safetensors").read_text() == "existing" and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("baked", [False, True])
def test_an_adapter_that_was_added_after_a_cast_is_saved_with_samples_of_its_own_base(make, tmp_path, baked):
    """`cast_once` samples the linears that have adapters. Other linears get one later, or `bake` changes the weights."""
    backbone = make("blip")
    for lora in inject(backbone, "vit").values():
        lora.B.data.normal_()
    weights.cast_once(backbone, "bf16")
    if baked:
        merging.bake(backbone)
    inject(backbone, "vit" if baked else "text", name="mine")
    path = adapter_file.save(tmp_path / "a.safetensors", backbone, name="mine")
    assert adapter_file.read(path).tensors
    if baked:  # the adapter belongs to the baked weights
        with pytest.raises(AdapterError, match="are not those of the training"):
            adapter_file.load(make("blip"), path)
    else:
        adapter_file.load(make("blip"), path)


def test_a_second_adapter_needs_another_name(make, saved):
    backbone = make("blip")
    adapter_file.load(backbone, saved)
    with pytest.raises(AdapterError, match="another name"):
        adapter_file.load(backbone, saved)
    adapter_file.load(backbone, saved, name="second")
    assert attached.names(backbone.model) == ["default", "second"]


def test_locate_latest_returns_the_newest_adapter(tmp_path, saved, monkeypatch):
    """`locate` also accepts the folder of a run or the path of a file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="train one"):
        runs.locate("latest")
    import os

    for age, run in enumerate(("b", "a", "c")):
        (tmp_path / "lora_blip_output" / run).mkdir(parents=True)
        path = Path(shutil.copy(saved, tmp_path / "lora_blip_output" / run))
        os.utime(path, (1000 - age, 1000 - age))
    assert runs.locate("latest").parent.name == "b" and runs.locate("lora_blip_output/c").parent.name == "c"
    assert runs.locate(saved) == saved


def test_locate_prefers_the_best_adapter_of_a_run(tmp_path, saved):
    """`locate` returns best.safetensors of a run, or the last adapter if there is none, and the path of a file unchanged."""
    import os

    folder = tmp_path / "runs"
    for age, run in enumerate(("2026-11-28_1231_caption_tiny-blip_vit", "lora_bs8_ep30_20251128_011018")):
        (folder / run).mkdir(parents=True)
        for name in (runs.ADAPTER_NAME, runs.BEST_NAME)[: 2 - age]:
            os.utime(shutil.copy(saved, folder / run / name), (1000 - age, 1000 - age))
    new, old = sorted(folder.iterdir())
    assert runs.locate("latest", folder) == runs.locate(new) == new / runs.BEST_NAME
    assert runs.locate(old) == old / runs.ADAPTER_NAME and runs.locate(new / runs.ADAPTER_NAME) == new / runs.ADAPTER_NAME
    os.utime(old / runs.ADAPTER_NAME, (2000, 2000))
    assert runs.locate("latest", folder) == old / runs.ADAPTER_NAME


def test_a_printed_adapter_is_its_path_without_its_tensors(saved):
    adapter = adapter_file.read(saved)
    assert repr(adapter) == f"Adapter(path={saved!r})" and adapter.tensors
