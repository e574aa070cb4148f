"""A model that computes NaN or infinity raises an error. Its texts would be wrong: often empty, with the score NaN."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_blip
from lora_blip.cli import main
from lora_blip.errors import ModelError
from lora_blip.models.finite import checking_outputs, is_invalid
from tests.support import tiny

CALLS: dict[str, tuple[Callable[[Any, Any], Any], ...]] = {
    "caption": (lambda c, image: c(image), lambda c, image: c.rank(image, ["a red cube", "a blue cube"])),
    "vqa": (
        lambda c, image: c.answer(image, "what?"),
        lambda c, image: c.rank(image, ["a red cube", "a blue cube"], question="what?"),
    ),
    "retrieval": (lambda c, image: c.rank(image, ["a red cube", "a blue cube"]),),
}


def poisoned(base: Path, folder: Path, part: str, value: float) -> tuple[str, Path]:
    """Return the name of a weight of a part, and a copy of a base in which one element of it has another value."""
    shutil.copytree(base, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name, each in reversed(weights.items()) if part in name and each.ndim == 2 and "embed" not in name)
    weights[name][0, 0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return name, folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["vision_model", "text|language|qformer"])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa", "itm", "itm2"])
def test_a_weight_that_is_not_finite_is_an_error_in_every_call(checkpoints, tmp_path, kind, part, value):
    """Before, the text was empty, and the score NaN."""
    for one in part.split("|"):
        if one != "vision_model" and not any(one in name for name in load_file(checkpoints[kind] / "model.safetensors")):
            continue
        name, folder = poisoned(checkpoints[kind], tmp_path / one, one, value)
        captioner = lora_blip.Captioner.from_adapter(None, base=folder, device="cpu")
        tiny.write_photos(tmp_path, 2)
        for call in CALLS[captioner.task]:
            with pytest.raises(
                ModelError, match=r"outputs are not finite: the weight '.*' contains NaN or infinity; copy or"
            ) as e:
                call(captioner, [tmp_path / "photos" / "0.png", tmp_path / "photos" / "1.png"])
            assert name.rpartition(".")[0].split(".")[-1] in str(e.value)
        modules = [
            each
            for each in captioner.backbone.model.modules()
            if any(each is m for m in captioner.runner.task.output_modules())
        ]
        assert not any(module._forward_hooks for module in modules)


def test_an_overflow_names_the_module(checkpoints, tmp_path, monkeypatch, capsys):
    """`infer` computes no scores, so the outputs themselves are checked. No line is written for a wrong text."""
    poisoned(checkpoints["blip"], tmp_path / "base", "vision_model", 3e38)
    tiny.write_photos(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    command = "infer --images photos --adapter none --model base --output-dir out --device cpu"
    monkeypatch.setattr(sys, "argv", ["lora-blip", *command.split()])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert "outputs are not finite: the first output that is not finite is that of 'vision_model." in error
    assert error.rstrip().endswith("check the base, the adapter and its scale")
    assert not [line for path in Path("out").rglob("*.jsonl") for line in path.read_text().splitlines()]


def test_an_overflow_in_fp16_names_the_precisions_that_do_not_overflow(checkpoints, tmp_path):
    _, folder = poisoned(checkpoints["blip"], tmp_path / "base", "vision_model", 60_000.0)
    tiny.write_photos(tmp_path, 1)
    photo = tmp_path / "photos" / "0.png"
    with pytest.raises(
        ModelError, match=r'fp16 overflows easily: use PRECISION = "bf16" \(--precision bf16; in Python: precision="bf16"\)'
    ):
        captioner = lora_blip.Captioner.from_adapter(None, base=folder, device="cpu", precision="fp16", base_dtype="fp16")
        for scale in range(20):
            captioner.backbone.model.vision_model.post_layernorm.weight.data *= 2.0**scale
            captioner(photo)
    for precision in ("bf16", "fp32"):
        assert lora_blip.Captioner.from_adapter(None, base=folder, device="cpu", precision=precision)(photo).score is not None


@pytest.mark.parametrize(("value", "invalid"), [(torch.nan, True), (torch.inf, True), (-torch.inf, False), (3e38, False)])
def test_minus_infinity_is_a_valid_logit(value, invalid):
    """It excludes a token. Only the last token counts: the others may be padding."""
    logits = torch.zeros(2, 3, 4)
    logits[1, 2, 0] = value
    assert bool(is_invalid(logits)) == bool(is_invalid(logits[:, 2])) == invalid
    assert not is_invalid(logits[:, :2])
    linear = torch.nn.Linear(2, 2)
    with checking_outputs([linear]) as check:
        linear(torch.ones(1, 2))
        assert not check.failed
        linear(torch.full((1, 2), torch.nan))
    assert check.failed and not linear._forward_hooks
