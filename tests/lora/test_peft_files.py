"""Files in the format of peft: what is read, what is refused and why, and what untrusted files can do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lora_blip.errors import AdapterError
from lora_blip.lora import adapter_file
from lora_blip.lora.header import HeaderError
from lora_blip.lora.peft_config import parse_config
from lora_blip.lora.peft_names import Budget, Targets, Values, canonical, parse_key
from lora_blip.lora.peft_writer import updates_of
from lora_blip.lora.sites import Site
from lora_blip.runtime import runs

QKV = "vision_model.encoder.layers.0.self_attn.qkv"
WIDTH = 32


def write(folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """Write an adapter as peft does. `config` and `tensors` replace parts of a valid one."""
    folder.mkdir(parents=True, exist_ok=True)
    A, B = (torch.randn(4, WIDTH), torch.randn(3 * WIDTH, 4))
    own = {f"base_model.model.{QKV}.lora_A.weight": A, f"base_model.model.{QKV}.lora_B.weight": B}
    save_file(own if tensors is None else tensors, folder / runs.PEFT_WEIGHTS, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv"], "base_model_name_or_path": "some/base"}
    (folder / runs.PEFT_CONFIG).write_text(json.dumps(settings | (config or {})))
    return folder


def read(folder: Path) -> adapter_file.Adapter:
    return adapter_file.read(runs.locate(folder))


def test_a_folder_of_peft_is_read(tmp_path):
    adapter = read(write(tmp_path, {"lora_dropout": 0.1, "auto_mapping": {"base_model_class": "BlipForQuestionAnswering"}}))
    assert adapter.sites == [Site(QKV, 4, 8.0)]
    assert adapter.base == "some/base" and adapter.task == {"name": "vqa"} and adapter.metadata["lora"]["dropout"] == 0.1
    assert "no fingerprint" in adapter.note


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_of_16_bits_become_float32(tmp_path, dtype):
    tensors = {key: value.to(dtype) for key, value in load_file(write(tmp_path) / runs.PEFT_WEIGHTS).items()}
    adapter = read(write(tmp_path, {}, tensors))
    for name, value in adapter.tensors.items():
        assert value.dtype == torch.float32 and torch.equal(value, tensors[f"base_model.model.{name}.weight"].float())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["cls"]}, r"uses modules_to_save.*merge_and_unload"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"trainable_token_indices": [1]}, r"uses trainable_token_indices .*train the adapter again without the embed"),
        ({"modules_to_save": ["post_layernorm"]}, r"uses modules_to_save .*merge it into its base in peft"),
        ({"target_parameters": ["experts"]}, "uses target_parameters"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"from_the_future": {"a": 1}}, r"uses 'from_the_future'.*effect is unknown"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3', and lora_blip reads LORA"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, r"changed base.*path_initial_model_for_weight_conversion.*otherwise merge it"),
        ({"init_lora_weights": "olora"}, "changed base"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "changed base"),
        ({"init_lora_weights": "a_new_one"}, "unknown here"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"rank_pattern": {"qkv": 0}}, "rank_pattern has 'qkv': 0"),
        ({"rank_pattern": {"qkv": 2}}, r"are \(4, 32\) and \(96, 4\), but r is 2"),
        ({"alpha_pattern": {"(": 2}}, "is not a regex"),
        ({"target_modules": "("}, "is not a regex"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"target_modules": ["fc1"]}, "is not in target_modules"),
        ({"exclude_modules": ["self_attn.qkv"]}, "is not in target_modules"),
        ({"layers_to_transform": [1]}, "is not in target_modules"),
        ({"base_model_name_or_path": "a\x1bb"}, "base_model_name_or_path is"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_is_refused_by_name(tmp_path, settings, message):
    with pytest.raises(AdapterError, match=message) as error:
        read(write(tmp_path, settings))
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_keep_the_base_are_read(tmp_path, start):
    assert read(write(tmp_path, {"init_lora_weights": start})).sites


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"base_model.model.{QKV}.bias", "a trained bias"),
        (
            "base_model.model.embed.lora_embedding_A",
            "an embedding.*no way out for BLIP and OPT: it would change the output",
        ),
        (f"base_model.model.{QKV}.lora_magnitude_vector", "use_dora is false"),
        ("base_model.model.classifier.weight", "no part of LoRA"),
        (f"base_model.model.{QKV}.lora_A.other.weight", "two tensors"),
        (f"base_model.model.module.{QKV}.lora_A.weight", "has no B"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, name, message):
    tensors = load_file(write(tmp_path) / runs.PEFT_WEIGHTS) | {name: torch.zeros(4, WIDTH)}
    with pytest.raises(AdapterError, match=message):
        read(write(tmp_path, {}, tensors))


@pytest.mark.parametrize(
    ("module", "shapes", "message"),
    [
        (
            "vision_model.embeddings.patch_embedding",
            ((4, 3, 8, 8), (32, 4, 1, 1)),
            "is a convolution.*merge it into its base",
        ),
        ("text_decoder.cls.predictions.decoder", ((4, 32), (90, 4)), "is the output layer of BLIP; train the adapter again"),
    ],
)
def test_modules_that_are_not_adapted_here_are_refused_with_the_way_out(tmp_path, module, shapes, message):
    """Before, the advice about a convolution was to copy the files again, and an output layer failed when it was loaded."""
    names = [f"base_model.model.{module}.lora_{half}.weight" for half in "AB"]
    tensors = dict(zip(names, map(torch.zeros, shapes), strict=True))
    with pytest.raises(AdapterError, match=message):
        read(write(tmp_path, {"target_modules": [module.rpartition(".")[2]]}, tensors))


@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_a_merge_in_peft_of_adapted_embeddings_changes_the_output_layer_too(make, kind):
    """That is why the advice is not to merge: the merged model computes other logits. A merge of a linear is exact."""
    ids = torch.tensor([[3, 5, 7, 9]])
    differences = []
    for target in ("word_embeddings" if kind == "blip" else "embed_tokens", "query" if kind == "blip" else "q_proj"):
        backbone = make(kind)
        text = backbone.model.text_decoder if kind == "blip" else backbone.model.language_model
        model = get_peft_model(text, LoraConfig(r=4, target_modules=[target], init_lora_weights=False)).eval()
        with torch.no_grad():
            before = model(input_ids=ids).logits
            after = model.merge_and_unload()(input_ids=ids).logits
        differences.append(float((after - before).abs().max() / before.abs().max()))
    assert differences[0] > 1e-2 and differences[1] < 1e-5


def test_a_folder_with_only_a_bin_file_is_refused_with_the_reason(tmp_path):
    (write(tmp_path) / runs.PEFT_WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"only adapter_model.bin, which can run code.*save_pretrained"):
        runs.locate(tmp_path)


def test_an_adapter_of_another_model_names_the_linear_and_its_base(tmp_path, make):
    tensors = {f"base_model.model.model.layers.0.q_proj.lora_{half}.weight": torch.ones(4, 4) for half in "AB"}
    write(tmp_path, {"target_modules": ["q_proj"], "base_model_name_or_path": "org/llama"}, tensors)
    with pytest.raises(AdapterError, match=r"no linear 'model.layers.0.q_proj'.*trained on 'org/llama'"):
        adapter_file.load(make("blip"), tmp_path)


def test_an_adapter_of_another_size_names_the_shapes(tmp_path, make):
    tensors = {
        f"base_model.model.{QKV}.lora_A.weight": torch.ones(4, 8), f"base_model.model.{QKV}.lora_B.weight": torch.ones(24, 4)
    }  # fmt: skip
    with pytest.raises(AdapterError, match=r"is \(4, 8\), and this model needs \(4, 32\)"):
        adapter_file.load(make("blip"), write(tmp_path, {}, tensors))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.a.b.lora_A.weight", ("a.b", "A")),
        ("base_model.model.a.b.lora_B.default.weight", ("a.b", "B")),
        ("a.b.lora_A.weight", ("a.b", "A")),
        ("base_model.model.a.lora_magnitude_vector", ("a", "magnitude")),
        ("base_model.model.a.lora_magnitude_vector.default.weight", ("a", "magnitude")),
        ("base_model.model.a.weight", None),
        ("base_model.model.a.lora_embedding_A", None),
        ("lora_A.weight", None),
    ],
)
def test_names_of_tensors(name, expected):
    assert parse_key(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (QKV, QKV),
        (f"module.{QKV}", QKV),
        (f"base_model.model.module.{QKV}", QKV),
        ("language_model.decoder.layers.0.fc1", "language_model.model.decoder.layers.0.fc1"),
        ("language_model.model.decoder.layers.0.fc1", "language_model.model.decoder.layers.0.fc1"),
        ("language_model.model.encoder.block.0.layer.0.q", "language_model.encoder.block.0.layer.0.q"),
        ("language_model.decoder.block.0.layer.0.q", "language_model.decoder.block.0.layer.0.q"),
        ("model.layers.0.q_proj", "model.layers.0.q_proj"),
    ],
)  # fmt: skip
def test_names_of_linears_become_those_of_transformers_5(name, expected):
    assert canonical(name) == expected


RULES = [
    {"target_modules": ["q"]}, {"target_modules": ["self_attn.q", "fc1"]}, {"target_modules": r".*\.(q|fc1)"},
    {"target_modules": ["q", "fc1"], "exclude_modules": ["layers.1.fc1"]},
    {"target_modules": r".*fc\d", "exclude_modules": r".*1\..*"},
    {"target_modules": ["q", "fc1"], "layers_to_transform": [0]}, {"target_modules": ["q"], "layers_to_transform": 1},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["block", "layers"]},
    {"target_modules": "all-linear"},
]  # fmt: skip
NAMES = [
    f"{part}.encoder.layers.{n}.{leaf}" for part in ("a", "b") for n in (0, 1) for leaf in ("self_attn.q", "self_attn.k", "fc1")
]


@pytest.mark.parametrize("rule", RULES)
def test_the_same_linears_are_targeted_as_in_peft(rule):
    """Lists, regexes, exclusions and layers choose what peft's own function chooses."""
    tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
    config = pytest.importorskip("peft").LoraConfig(**rule)
    targets = parse_config(json.dumps({"peft_type": "LORA"} | rule)).targets
    everything = rule["target_modules"] == "all-linear"  # peft replaces this word by the names before it compares them
    for name in NAMES:
        assert (name in targets) == (everything or bool(tuners_utils.check_target_module_exists(config, name))), name


def test_the_same_values_are_chosen_as_in_peft():
    """The first pattern that matches the end of a name gives the rank, as in peft."""
    other = pytest.importorskip("peft.utils.other")
    pattern = {"layers.1.fc1": 2, r"layers\.\d\.self_attn.q": 3, "^a.encoder.layers.0.self_attn.k": 5, "fc1": 7, "self_attn": 9}
    values = Values("rank_pattern", pattern, 4, Budget())
    for name in NAMES:
        assert values.of(name) == pattern.get(other.get_pattern_key(pattern, name), 4), name


def test_a_regex_of_a_file_has_a_time_limit():
    """A regex that would take years raises HeaderError, and all regexes of a file share their time."""
    with pytest.raises(HeaderError, match="takes too long"):
        "a" * 60 in Targets("(a+)+b", None, None, None, Budget(0.1))  # noqa: B015


# ---------------------------------------------------------------- written files


def test_blocks_become_one_update_with_zero_rows():
    """q and v of a fused qkv: the ranks add up, B is zero outside of the blocks, and ΔW is that of both."""
    sites = [Site(QKV, 2, 4.0, "q", (0, 8)), Site(QKV, 3, 12.0, "v", (16, 24))]
    tensors = {}
    for site in sites:
        tensors |= {f"{site.address}.lora_A": torch.randn(site.r, 8), f"{site.address}.lora_B": torch.randn(8, site.r)}
    (update,) = updates_of(sites, tensors)
    assert update.r == 5 and update.B.shape == (24, 5) and not update.B[8:16].any()
    expected = torch.zeros(24, 8)
    for site in sites:
        start, stop = site.rows or (0, 0)
        expected[start:stop] = site.scale * tensors[f"{site.address}.lora_B"] @ tensors[f"{site.address}.lora_A"]
    assert torch.allclose(update.scale * update.B @ update.A, expected, rtol=1e-6, atol=1e-6)


def test_a_block_that_is_no_third_needs_the_base():
    site = Site("fc", 2, 4.0, "first", (0, 5))
    tensors = {"fc.first.lora_A": torch.ones(2, 8), "fc.first.lora_B": torch.ones(5, 2)}
    with pytest.raises(HeaderError, match="give the base: --model"):
        updates_of([site], tensors)
    (update,) = updates_of([site], tensors, lambda _: torch.zeros(7, 8))
    assert update.B.shape == (7, 2)


@pytest.mark.parametrize("order", [1, -1])
def test_overlapping_updates_become_one_and_those_of_dora_are_refused(order):
    """All rows and a block in one adapter, in each order: ΔW is the sum. DoRA has one magnitude for each row."""
    sites = [Site(QKV, 2, 4.0), Site(QKV, 3, 12.0, "q", (0, 8))][::order]
    tensors, expected = {}, torch.zeros(24, 8)
    for site in sites:
        start, stop = site.rows or (0, 24)
        A, B = torch.randn(site.r, 8), torch.randn(stop - start, site.r)
        tensors |= {f"{site.address}.lora_A": A, f"{site.address}.lora_B": B, f"{site.address}.magnitude": torch.ones(len(B))}
        expected[start:stop] += site.scale * B @ A
    (update,) = updates_of(sites, tensors)
    assert torch.allclose(update.scale * update.B @ update.A, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(HeaderError, match=r"two updates of DoRA for the same rows .* lora-blip export"):
        updates_of([replace(site, variant="dora") for site in sites], tensors, lambda _: torch.ones(24, 8))
