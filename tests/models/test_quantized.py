"""A base in 8 or 4 bits: what is quantized, how adapters act on it, and which checkpoints and adapters are refused."""

import json
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_blip
from lora_blip.errors import AdapterError, ConfigError, LoRAError, ModelError
from lora_blip.lora import adapter_file, attached, fused, merging
from lora_blip.lora.fingerprint import samples
from lora_blip.lora.sites import base_size, is_linear, quantization
from lora_blip.models import quantization_config, quantized
from lora_blip.models.identity import weights_digest
from lora_blip.models.loading import Backbone, load_backbone, open_backbone
from lora_blip.tasks.caption import CaptionTask
from tests.support import tiny
from tests.support.models import WHOLE, batch_of, inject, logits_of

REASON = 'bitsandbytes is not installed: pip install "lora_blip[quantized]"'
needs_bitsandbytes = pytest.mark.skipif(not quantized.find_spec("bitsandbytes"), reason=REASON)
DTYPES = ("int8", "nf4")


def dequantized_copy(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone whose weights are the dequantized ones, in float32."""
    model = deepcopy(backbone.model)
    model.hf_quantizer = deepcopy(backbone.model.hf_quantizer)
    quantized.dequantize(model)
    return Backbone(model, backbone.tokenizer, backbone.image_processor, backbone.name, backbone.device, fast=False)


# ---------------------------------------------------------------- loading


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa", "itm", "itm2"])
def test_linears_of_every_kind_are_quantized_and_heads_are_not(make, checkpoints, capsys, kind, dtype):
    """The printed numbers are those of the model. A base counts as many weights as in float32."""
    backbone = make(kind, dtype=dtype)
    linears = {path: module for path, module in backbone.model.named_modules() if is_linear(module)}
    small = quantized.quantized_linears(backbone.model)
    line = f"{len(small)} linears are in {dtype}; {len(linears) - len(small)} linear"
    assert f"'{checkpoints[kind]}': {line}" in capsys.readouterr().out
    assert small and all(path.startswith(("vision_model.", "text_", "language_model.")) for path in small)
    assert all("." in path and "lm_head" not in path and "predictions.decoder" not in path for path in small)
    assert base_size(backbone.model) == base_size(make(kind).model)
    assert quantization(backbone.model) == dtype and not any(p.requires_grad for p in backbone.model.parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_logits_and_gradients_equal_those_on_a_dequantized_base(make, kind, dtype, monkeypatch):
    """The oracle is the same base with dequantized weights in float32, transformers' own modules and `lora_hook`.

    The fused update runs on linears that are not quantized, and on no other one.
    """
    fused_linears: list[Any] = []
    updated = fused.updated
    monkeypatch.setattr(fused, "updated", lambda linear, output: fused_linears.append(linear) or updated(linear, output))
    own = make(kind, dtype=dtype)
    inject(own)
    other = dequantized_copy(own)
    attached.fast(other.model, False)
    results = []
    for backbone in (own, other):
        task = CaptionTask(backbone)
        task.loss(batch_of(task)).backward()
        loras = attached.adapters(backbone.model)
        assert all(half.dtype == torch.float32 for lora in loras.values() for half in (lora.A, lora.B))
        results.append([logits_of(backbone), *(half.grad for lora in loras.values() for half in (lora.A, lora.B))])
    for one, expected in zip(*results, strict=True):
        assert (one - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not any(linear in list(quantized.quantized_linears(own.model).values()) for linear in fused_linears)
    assert bool(fused_linears) is (kind != "blip")  # the Q-Former is in float32


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_and_base_dtype_are_independent(checkpoints, dtype, precision):
    """Under autocast and without it, a base with linears of width 32 gives finite logits near those of the base in float32."""
    backbone, used = open_backbone(str(checkpoints["opt"]), "cpu", precision, dtype)
    task = CaptionTask(backbone)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=used == "bf16"):
        logits = task.logits(batch_of(task)).float()
    full = logits_of(load_backbone(str(checkpoints["opt"]), "cpu"))
    assert (logits - full).norm() < 0.5 * full.norm()


@needs_bitsandbytes
@pytest.mark.parametrize("write", [merging.merge, merging.bake])
def test_a_merge_is_refused_with_the_fix(make, write):
    backbone = make("blip", dtype="nf4")
    inject(backbone)
    before = weights_digest(backbone.model)
    with pytest.raises(LoRAError, match=r"is quantized \(FourBitLinear, Params4bit\).*lora-blip export RUN"):
        write(backbone)
    assert weights_digest(backbone.model) == before


@needs_bitsandbytes
def test_dora_on_a_quantized_linear_is_refused(make):
    backbone = make("blip", dtype="int8")
    with pytest.raises(LoRAError, match=r'BASE_DTYPE = "fp32" .*, or train with VARIANT = "lora"'):
        lora_blip.inject(backbone, "vit", variant="dora")


@needs_bitsandbytes
def test_a_digest_of_the_base_includes_the_scales(make):
    """Two bases with the same codes and other scales have different digests, in 8 and in 4 bits."""
    for dtype in DTYPES:
        backbone = make("blip", dtype=dtype)
        before = weights_digest(backbone.model)
        assert weights_digest(make("blip", dtype=dtype).model) == before
        linear = next(iter(quantized.quantized_linears(backbone.model).values()))
        quantized.scales_of(linear)[0].mul_(2)
        assert weights_digest(backbone.model) != before


@pytest.mark.parametrize("missing", ["bitsandbytes", "accelerate"])
def test_a_missing_library_is_one_error_with_the_command(checkpoints, monkeypatch, missing):
    """If "auto" follows the training of an adapter, the message also names the base in full precision."""
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == missing else object())
    command = re.escape('pip install "lora_blip[quantized]"')
    with pytest.raises(ModelError, match=f"needs {missing}: {command}; or load it in full precision"):
        load_backbone(str(checkpoints["blip"]), "cpu", "nf4")
    with pytest.raises(ModelError, match=r'as in the training of the adapter.*BASE_DTYPE = "fp32"'):
        open_backbone(str(checkpoints["blip"]), "cpu", "fp32", trained_dtype="int8")
    assert not quantization(open_backbone(str(checkpoints["blip"]), "cpu", "fp32", "fp32", trained_dtype="int8")[0].model)


# ---------------------------------------------------------------- fingerprints


@pytest.fixture
def trained(checkpoints, tmp_path) -> Callable[[str], Path]:
    """Return a function: trained("nf4") saves an adapter on every part of the BLIP-2 in this dtype."""

    def save(dtype: str) -> Path:
        backbone = load_backbone(str(checkpoints["opt"]), "cpu", dtype)
        inject(backbone)
        return adapter_file.save(tmp_path / f"{dtype}.safetensors", backbone, overwrite=True)

    return save


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_file_has_the_dtype_and_the_fingerprint_of_the_weights_before_they_were_quantized(trained, make, dtype):
    adapter, plain = adapter_file.read(trained(dtype)), make("opt")
    inject(plain)
    assert adapter.base_dtype == dtype
    assert adapter.metadata["base"]["samples"] == samples(plain.model, attached.adapters(plain.model).values())
    assert adapter_file.read(trained("fp32")).base_dtype == "float32"


@needs_bitsandbytes
def test_an_adapter_loads_on_the_same_base_in_every_dtype_with_a_note(trained, make, capsys):
    """The note is one line on stderr, and only if one of the two bases is quantized, or both in different ways."""
    for first in ("fp32", "int8", "nf4"):
        adapter = adapter_file.read(trained(first))
        for second in ("fp32", "bf16", "int8", "nf4"):
            backbone = make("opt", dtype=second)
            capsys.readouterr()
            adapter_file.load(backbone, adapter)
            notes = capsys.readouterr().err
            kinds = [dtype if dtype in DTYPES else "" for dtype in (first, second)]
            expected = [f"in {kind}" if kind else "not quantized" for kind in kinds]
            note = f"note: in training, the base was {expected[0]}, and now it is {expected[1]}, so texts may differ a little\n"
            assert notes == (note if kinds[0] != kinds[1] else "")


@needs_bitsandbytes
def test_an_adapter_is_refused_on_another_base_in_every_dtype(trained, checkpoints, tmp_path):
    """The other base has one other weight per linear, changed by as little as 5 %, before it is quantized."""
    other = tmp_path / "other"
    shutil.copytree(checkpoints["opt"], other)
    weights = load_file(other / "model.safetensors")
    changed = {name: value * 1.05 if name.endswith("fc1.weight") else value for name, value in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    for first, second in (("nf4", "nf4"), ("nf4", "fp32"), ("int8", "nf4"), ("fp32", "int8")):
        with pytest.raises(AdapterError, match="are not those of the training"):
            adapter_file.load(load_backbone(str(other), "cpu", second), trained(first))


# ---------------------------------------------------------------- a folder that is stored in 8 or 4 bits


@pytest.fixture
def stored(checkpoints, tmp_path) -> Callable[[str], Path]:
    """Return a function: stored("nf4") writes the BLIP-2 in this dtype by `save_pretrained`."""

    def write(dtype: str) -> Path:
        folder = tmp_path / f"stored_{dtype}"
        backbone = load_backbone(str(checkpoints["opt"]), "cpu", dtype)
        for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
            part.save_pretrained(folder)
        return folder

    return write


@needs_bitsandbytes
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_folder_in_8_or_4_bits_loads_with_the_same_logits(stored, make, dtype):
    """Adapters of the original base load on it, and its adapters load on the original. Another BASE_DTYPE is refused."""
    folder, original = stored(dtype), make("opt", dtype=dtype)
    backbone = load_backbone(str(folder), "cpu")
    assert torch.equal(logits_of(backbone), logits_of(original))
    assert quantization(open_backbone(str(folder), "cpu", "fp32", dtype)[0].model) == dtype
    assert quantization(open_backbone(str(folder), "cpu", "fp32", trained_dtype="nf4")[0].model) == dtype
    other = {"int8": "nf4", "nf4": "int8"}[dtype]
    for wrong in (other, "fp32", "bf16"):
        with pytest.raises(ConfigError, match=f'stored in {dtype}; set BASE_DTYPE = "auto"'):
            open_backbone(str(folder), "cpu", "fp32", wrong)
    inject(backbone, WHOLE["opt"])
    adapter = adapter_file.read(adapter_file.save(folder / "adapter.safetensors", backbone))
    for second in ("fp32", "bf16", "int8", "nf4"):
        adapter_file.load(make("opt", dtype=second), adapter)
    inject(original)
    path = adapter_file.save(folder / "original.safetensors", original)
    adapter_file.load(load_backbone(str(folder), "cpu"), path)


@needs_bitsandbytes
def test_an_adapter_of_a_stored_base_is_refused_on_another_base(stored, tmp_path):
    """Without the original weights, the fingerprint has the dequantized ones with the largest error of each."""
    torch.manual_seed(0)
    tiny.save_blip2(tmp_path / "first", "opt")
    backbone = load_backbone(str(stored("nf4")), "cpu")
    inject(backbone, "vit")
    path = adapter_file.save(tmp_path / "adapter.safetensors", backbone)
    other = load_backbone(str(tmp_path / "first"), "cpu")
    for name, parameter in other.model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * parameter.std()
    with pytest.raises(AdapterError, match="are not those of the training"):
        adapter_file.load(other, path)


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor], str], None]] = {
    "fewer scales": lambda weights, name: weights.update({f"{name}.absmax": weights[f"{name}.absmax"][:3]}),
    "fewer codes": lambda weights, name: weights.update({f"{name}.quant_map": weights[f"{name}.quant_map"][:8]}),
    "fewer bytes": lambda weights, name: weights.update({name: weights[name][:9]}),
    "no scales": lambda weights, name: weights.pop(f"{name}.absmax"),
    "another shape": lambda weights, name: with_state(weights, name, shape=[64, 16]),
    "a huge block": lambda weights, name: with_state(weights, name, blocksize=2**40),
    "a negative block": lambda weights, name: with_state(weights, name, blocksize=-64),
}


def with_state(weights: dict[str, torch.Tensor], name: str, **changes: object) -> None:
    """Change the JSON that bitsandbytes stores with a weight."""
    key = f"{name}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(weights[key].tolist())) | changes
    weights[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@needs_bitsandbytes
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_quantized_weight_is_one_error(stored, case):
    folder = stored("nf4")
    weights = load_file(folder / "model.safetensors")
    DAMAGE[case](weights, "vision_model.encoder.layers.1.mlp.fc1.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_backbone(str(folder), "cpu")
    assert len(str(caught.value)) < 1000


@needs_bitsandbytes
def test_a_damaged_scale_of_8_bits_is_one_error(stored):
    folder = stored("int8")
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.encoder.layers.1.mlp.fc1.SCB"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"fc1' has no scale for each row; download the checkpoint again"):
        load_backbone(str(folder), "cpu")


REFUSED = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
    "awq": ({"quant_method": "awq", "bits": 4}, "quantized by 'awq'"),
    "torchao": ({"quant_method": "torchao"}, "quantized by 'torchao'"),
    "no method": ({"bits": 4}, "quantized by None"),
    "a list": ([1], "expected an object"),
    "both widths": ({"load_in_8bit": True, "load_in_4bit": True}, "neither 8 nor 4 bits, or both"),
    "no width": ({"quant_method": "bitsandbytes"}, "neither 8 nor 4 bits, or both"),
    "16-bit weights": ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "'llm_int8_has_fp16_weight' is True"),
    "a slow pattern": ({"load_in_8bit": True, "llm_int8_skip_modules": ["(a+)+$"]}, "'llm_int8_skip_modules' is"),
    "another storage": ({"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}, "'bnb_4bit_quant_storage' is 'float32'"),
    "an unknown key": ({"load_in_4bit": True, "evil": "x"}, "'evil' is 'x'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_quantization_is_refused_by_name(checkpoints, tmp_path, case):
    """The message says which checkpoint to give, and how to quantize it."""
    entry, message = REFUSED[case]
    folder = tmp_path / "base"
    shutil.copytree(checkpoints["blip"], folder)
    config = json.loads((folder / "config.json").read_text()) | {quantization_config.KEY: entry}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        load_backbone(str(folder), "cpu")
    assert "quantization_config" in str(caught.value) and 'BASE_DTYPE = "nf4"' in str(caught.value)
