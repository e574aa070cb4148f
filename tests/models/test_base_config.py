"""A base loads as weights only. A checkpoint with code, wrong sizes or broken files raises one ModelError."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_blip.errors import ModelError
from lora_blip.lora import attached
from lora_blip.models import base_config
from lora_blip.models.generation import OPTIONS
from lora_blip.models.loading import load_backbone
from tests.support.models import inject

PLANTED = "import pathlib; pathlib.Path({path!r}).write_text('ran')"


@pytest.fixture
def base(checkpoints, tmp_path) -> Callable[..., Path]:
    """Return a function: base("blip", change) copies a checkpoint and applies `change` to its config.json."""

    def copy(kind: str = "blip", change: Callable[[dict[str, Any]], object] = dict) -> Path:
        folder = tmp_path / kind
        shutil.copytree(checkpoints[kind], folder)
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def refused(folder: Path) -> str:
    """Assert that loading raises a short ModelError within a minute, without control characters. Return its message."""
    start = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        load_backbone(str(folder), "cpu")
    message = str(caught.value)
    assert time.perf_counter() - start < 60 and len(message) < 1000
    assert not any(ord(c) < 32 and c != "\n" for c in message) and message.count("\n") <= 1
    return message


# ---------------------------------------------------------------- code


def plant(folder: Path) -> Path:
    """Write Python code that creates a file when it runs, in every place where transformers can load code. Return that file."""
    ran = folder.parent / "ran"
    code = PLANTED.format(path=str(ran))
    for name in ("planted.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "\n\n\nclass Planted:\n    pass\n\n\ndef generate(model, **_):\n    pass\n")
    return ran


class Yes:
    """A standard input that answers "y" to every question and counts the reads."""

    asked = 0

    def readline(self, *_: object) -> str:
        self.asked += 1
        return "y\n"

    def fileno(self) -> int:
        return 0

    def isatty(self) -> bool:
        return True


MAP = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor"), "planted.Planted")


def unknown_type(config: dict[str, Any]) -> None:
    config |= {"model_type": "planted", "auto_map": MAP}


def no_type(config: dict[str, Any]) -> None:
    del config["model_type"]
    config["auto_map"] = MAP


def remote_text(config: dict[str, Any]) -> None:
    config["text_config"] |= {"model_type": "planted", "auto_map": {"AutoModelForCausalLM": "planted.Planted"}}


def remote_opt(config: dict[str, Any]) -> None:
    config["text_config"]["auto_map"] = {"AutoModelForCausalLM": "planted.Planted"}


@pytest.mark.parametrize(
    ("kind", "change"), [("blip", unknown_type), ("blip", no_type), ("opt", remote_text), ("opt", remote_opt)]
)
def test_python_in_a_checkpoint_is_neither_run_nor_asked_about(kind, change, base, monkeypatch):
    """A checkpoint that needs its own Python code raises ModelError. The code does not run, and nothing asks for consent."""
    yes = Yes()
    monkeypatch.setattr(sys, "stdin", yes)
    monkeypatch.setattr("builtins.input", lambda *_: yes.readline())
    folder = base(kind, change)
    ran = plant(folder)
    assert "planted" in refused(folder) or "model" in refused(folder)
    assert not yes.asked and not ran.exists()


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_a_known_type_is_loaded_by_transformers_own_code(kind, base, monkeypatch):
    """`auto_map` in any file of a checkpoint of a known type is ignored, also for `generate`."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder = base(kind, lambda config: config.update(auto_map=MAP))
    ran = plant(folder)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).exists():
            where = folder / name
            where.write_text(json.dumps(json.loads(where.read_text()) | {"auto_map": MAP}))
    assert load_backbone(str(folder), "cpu").family in ("blip", "blip-2")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_tokenizer_or_processor_of_its_own_is_one_error(name, base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    folder = base()
    ran = plant(folder)
    other = {"auto_map": {**MAP, "AutoTokenizer": ["planted.Planted", "planted.Planted"]}}
    (folder / name).write_text(json.dumps(other | {"tokenizer_class": "Planted", "image_processor_type": "Planted"}))
    if name.startswith("tokenizer"):
        (folder / "tokenizer.json").unlink(missing_ok=True)
    try:
        load_backbone(str(folder), "cpu")
    except ModelError as error:
        assert len(str(error)) < 2000
    assert not ran.exists()


LOADS = {
    "a quantiser": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "a quantiser of a part": {"text_config": {"quantization_config": {"quant_method": "gptq", "bits": 4}}},
    "a kernel": {"attn_implementation": "kernels-community/flash-attn"},
    "a kernel by its inner name": {"_attn_implementation": "evil/kernel:run"},
    "a kernel of the ViT": {"vision_config": {"_attn_implementation": "evil/kernel"}},
    "kernels by part": {"attn_implementation": {"vision_config": "evil/kernel"}},
    "flash attention, which comes as a kernel": {"attn_implementation": "flash_attention_2"},
    "experts": {"experts_implementation": "evil/kernel"},
    "all kernels": {"use_kernels": True},
    "other weights": {"transformers_weights": "../other.safetensors"},
    "other layers": {"per_layer_config": {"0": {"hidden_size": 64}}},
    "fused modules": {"fusion_config": {"x": "y"}},
    "another generation": {"custom_generate": "evil/repo"},
}


@pytest.mark.parametrize("what", LOADS)
def test_a_config_that_loads_more_than_weights_is_refused(what, base):
    """A config key that makes transformers load more than weights raises ModelError, which names the key."""

    def change(config: dict[str, Any]) -> None:
        for key, value in LOADS[what].items():
            config[key] = config[key] | value if key.endswith(("text_config", "vision_config")) else value

    message = refused(base("blip", change))
    key = next(iter(LOADS[what]))
    inner = LOADS[what][key]
    assert (key if not key.endswith(("text_config", "vision_config")) else next(iter(inner))) in message


@pytest.mark.parametrize(
    ("key", "value"), [("custom_generate", "evil/repo"), ("num_return_sequences", 10**6), ("penalty_alpha", 0.6),
                       ("cache_implementation", "offloaded"), ("num_beam_groups", 4), ("stop_strings", ["a"]),
                       ("max_time", 1e-9), ("sequence_bias", [[[5000], 1.0]]), ("guidance_scale", 2.0), ("token_healing", True),
                       ("prefill_chunk_size", 2)]
)  # fmt: skip
def test_a_generation_config_that_generates_in_another_way_is_refused(key, value, base):
    folder = base()
    (folder / "generation_config.json").write_text(json.dumps({key: value}))
    assert key in refused(folder)


@pytest.mark.parametrize("key", sorted(OPTIONS))
def test_an_option_of_a_user_is_read_from_a_checkpoint_or_refused_with_the_setting(key, base):
    """A checkpoint may set every option of GENERATION except the number of texts, a token bias and a watermark."""
    folder = base()
    if key in base_config.GENERATION_KEYS:
        (folder / "generation_config.json").write_text(json.dumps({key: None}))
        load_backbone(str(folder), "cpu")
    else:
        assert key in ("num_return_sequences", "sequence_bias", "watermarking_config")
        (folder / "generation_config.json").write_text(json.dumps({key: 7}))
        assert f"set it in GENERATION (--generation {key}=…)" in refused(folder)


@pytest.mark.parametrize("key", sorted(base_config.OTHER_GENERATION))
def test_another_way_to_generate_in_the_config_of_the_text_model_is_refused(key, base):
    """A generation key in text_config that is not in GENERATION_KEYS raises ModelError, because transformers would apply it."""

    def change(config: dict[str, Any]) -> None:
        config["text_config"][key] = 1e-9

    assert key in refused(base("opt", change))


LARGE_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "added_tokens.json", "vocab.txt")


@pytest.mark.parametrize("name", LARGE_FILES)
def test_a_tokenizer_file_that_is_too_large_is_refused_before_it_is_read(name, base):
    folder = base()
    with (folder / name).open("ab") as file:
        file.truncate(5 * 2**30)
    assert f"{name}: it has 5,368,709,120 bytes" in refused(folder)


@pytest.mark.parametrize("name", LARGE_FILES)
def test_a_tokenizer_file_that_is_a_pipe_is_refused(name, base):
    """A tokenizer file that is a pipe raises ModelError. Reading it would block forever."""
    folder = base()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: it is a pipe" in refused(folder)


def test_a_generation_config_with_its_defaults_written_out_is_read(base):
    folder = base()
    options = {"num_return_sequences": 1, "num_beam_groups": 1, "penalty_alpha": None, "constraints": None, "num_beams": 3}
    (folder / "generation_config.json").write_text(json.dumps(options))
    load_backbone(str(folder), "cpu")


def test_a_peft_adapter_s_folder_is_not_a_base(base):
    folder = base()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}))
    assert "PEFT adapter" in refused(folder)


# ---------------------------------------------------------------- sizes

BILLION = 10**9
SIZES = [
    ("vision_config", "num_hidden_layers", BILLION), ("text_config", "num_hidden_layers", BILLION),
    ("vision_config", "num_hidden_layers", 2000), ("text_config", "num_hidden_layers", -1),
    ("vision_config", "num_hidden_layers", 1), ("text_config", "num_hidden_layers", 3),
    ("vision_config", "hidden_size", BILLION), ("vision_config", "hidden_size", 2**20), ("vision_config", "hidden_size", -32),
    ("vision_config", "hidden_size", 0), ("vision_config", "hidden_size", "32"), ("vision_config", "hidden_size", 33),
    ("text_config", "vocab_size", BILLION), ("text_config", "vocab_size", 2**20), ("text_config", "vocab_size", 10),
    ("text_config", "intermediate_size", BILLION), ("text_config", "max_position_embeddings", BILLION),
    ("text_config", "max_position_embeddings", 2**20), ("vision_config", "num_attention_heads", 0),
    ("vision_config", "num_attention_heads", BILLION), ("vision_config", "num_attention_heads", 7),
    ("text_config", "hidden_act", "os.system"), ("vision_config", "hidden_act", None), ("text_config", "num_labels", BILLION),
    ("vision_config", "image_size", 2**12), ("vision_config", "patch_size", 4),
    ("vision_config", "layer_norm_eps", float("nan")),
    ("text_config", "dtype", "os"), ("text_config", "torch_dtype", "nonsense"), ("text_config", "hidden_size", [32]),
    ("text_config", "model_type", ["\x1b[2J"]), ("vision_config", "hidden_act", "\x1b[2Jgelu"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "key", "value"), SIZES)
def test_sizes_that_do_not_fit_the_weights_are_one_error_in_bounded_time(part, key, value, base):
    """A size in config.json that differs from the weights raises ModelError before a module of that size is built."""
    if (part, key) in (("text_config", "model_type"),):
        folder = base("opt", lambda config: config[part].update({key: value}))
    else:
        folder = base("blip", lambda config: config[part].update({key: value}))
    refused(folder)


@pytest.mark.parametrize(
    ("key", "value"), [("num_query_tokens", BILLION), ("num_query_tokens", 2**20), ("num_query_tokens", 5),
                       ("qformer_config", 7),
                       ("text_config", "opt"), ("vision_config", [])]
)  # fmt: skip
def test_a_blip2_size_that_does_not_fit_the_weights_is_one_error(key, value, base):
    """A BLIP-2 size or sub-config that does not fit the weights raises ModelError."""
    refused(base("opt", lambda config: config.update({key: value})))


def test_loading_draws_no_random_numbers(base):
    """Loading a base does not change the state of the random generator."""
    folder = base()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_backbone(str(folder), "cpu")
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- broken files

BROKEN = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a text": '"blip"',
    "null": "null",
    "a key twice": '{"model_type": "blip", "model_type": "blip-2"}',
    "nested deeply": '{"a":' * 5000 + "1" + "}" * 5000,
    "no text": "\udcff",
    "huge": '{"model_type": "blip", "x": "' + "a" * 2**22 + '"}',
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_config_is_one_error(what, base):
    folder = base()
    (folder / "config.json").write_bytes(BROKEN[what].encode("utf-8", "surrogateescape"))
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_one_error(name, base):
    folder = base()
    (folder / name).unlink()
    if name == "tokenizer.json":
        for path in folder.glob("*token*"):
            path.unlink()
        for path in folder.glob("vocab*"):
            path.unlink()
    refused(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"size": {}, "image_mean": []}', b"\xff\xfe"])
def test_a_broken_image_processor_is_one_error(content, base):
    folder = base()
    (folder / "preprocessor_config.json").write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("keep", [0, 4, 9, 500, 20_000])
def test_weights_that_are_cut_are_one_error(keep, base):
    folder = base()
    where = folder / "model.safetensors"
    where.write_bytes(where.read_bytes()[:keep])
    refused(folder)


@pytest.mark.parametrize("files", [{"a": "../../elsewhere.safetensors"}, {"a": "model.bin"}, {"a": 3}, {}, [], "x"])
def test_an_index_that_names_files_elsewhere_is_refused(files, base):
    folder = base()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files, "metadata": {}}))
    assert "index.json" in refused(folder)


def test_weights_in_several_files_are_compared_and_loaded(base):
    folder = base()
    backbone = load_backbone(str(folder), "cpu")
    (folder / "model.safetensors").unlink()
    backbone.model.save_pretrained(folder, max_shard_size="60KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    again = load_backbone(str(folder), "cpu").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in backbone.model.state_dict().items())
    next(folder.glob("model-*.safetensors")).unlink()
    refused(folder)


def test_weights_with_adapters_among_them_are_refused_with_the_fix(base):
    """A saved model with unmerged adapters raises ModelError. As a base, it would ignore the adapters."""
    folder = base()
    backbone = load_backbone(str(folder), "cpu")
    tensors = load_file(folder / "model.safetensors")
    inject(backbone, "vit")
    (path,) = list(attached.adapters(backbone.model))[:1]
    save_file(tensors | {f"{path}.lora.default.A": torch.ones(4, 32)}, folder / "model.safetensors", {"format": "pt"})
    assert "lora_blip.bake" in refused(folder)
