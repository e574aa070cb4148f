"""Adapters of lora_blip and of peft on equal models, and how far apart their outputs are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_blip.conversion.command import ConvertConfig, convert
from lora_blip.lora import adapter_file
from lora_blip.lora.targets import find
from lora_blip.models.loading import Backbone
from lora_blip.runtime.setting_checks import VARIANTS
from tests.support import tiny
from tests.support.models import WHOLE, inject

KINDS = ("blip", "opt", "t5", "vqa", "itm")
OTHER = {"blip": "text", "opt": "lm", "t5": "qformer", "vqa": "text", "itm": "text"}  # a second part of the model
SHAPES = {  # name of a case → targets of lora_blip; {} is the second part
    "whole linears": "",
    "q and v blocks": "vit.q:r=4:alpha=8,vit.v:r=2:alpha=12,{}",
    "ranks per module": "vit[0:1]:r=2:alpha=3,vit[1:]:r=3,{}:r=5:alpha=20",
}
DIRECTIONS = ("lora_blip → peft", "peft → lora_blip")
CASES = [(kind, variant, shape) for kind in KINDS for variant in VARIANTS for shape in SHAPES]
Make = Callable[[str], Backbone]


@torch.no_grad()
def outputs_of(model: Any, kind: str) -> Tensor:
    """Return the outputs of a transformers model for two images and texts, as one vector."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    ids = torch.randint(10, 90, (2, 5), generator=generator)
    inputs = {"pixel_values": images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind in ("opt", "t5"):
        image = torch.full((2, tiny.QUERIES), model.config.image_token_index)
        inputs |= {"input_ids": torch.cat([image, ids], 1), "attention_mask": torch.ones(2, 5 + tiny.QUERIES, dtype=torch.long)}
    if kind == "t5":
        inputs["decoder_input_ids"] = ids[:, :3]
    if kind == "vqa":
        encoded = model.vision_model(images)[0]
        question = model.text_encoder(input_ids=ids, attention_mask=inputs["attention_mask"], encoder_hidden_states=encoded)[0]
        decoded: Tensor = model.text_decoder(
            input_ids=ids[:, :3], encoder_hidden_states=question, encoder_attention_mask=inputs["attention_mask"]
        ).logits
        return decoded.flatten()
    if kind == "itm":
        scores = [model(**inputs, use_itm_head=head).itm_score for head in (True, False)]
        return torch.cat([score.flatten() for score in scores])
    logits: Tensor = model(**inputs).logits
    return logits.flatten()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def from_ours(make: Make, kind: str, variant: str, shape: str, folder: Path) -> tuple[float, float]:
    """Write an adapter of ours for peft. Return the differences from our outputs: of peft, and of the folder as we read it.

    Raise AssertionError if the adapter hardly changes the outputs.
    """
    from peft import PeftModel

    ours = make(kind)
    before = outputs_of(ours.model, kind)
    adapters = inject(ours, SHAPES[shape].format(OTHER[kind]), variant=variant)
    for number, lora in enumerate(adapters.values()):
        if variant == "dora":
            lora.magnitude.data.mul_(
                1 + 0.1 * torch.rand(lora.magnitude.shape, generator=torch.Generator().manual_seed(number))
            )
    expected = outputs_of(ours.model, kind)
    assert relative(expected, before) > 1e-3
    adapter_file.save(folder / "adapter.safetensors", ours, task={"name": "caption"})
    convert(ConvertConfig(adapter=str(folder / "adapter.safetensors"), to="peft", output_dir=str(folder / "peft")))
    theirs = PeftModel.from_pretrained(make(kind).model, str(folder / "peft")).eval()
    again = make(kind)
    adapter_file.load(again, folder / "peft")
    return relative(outputs_of(theirs.base_model.model, kind), expected), relative(outputs_of(again.model, kind), expected)


def from_peft(make: Make, kind: str, variant: str, shape: str, folder: Path) -> tuple[float, float]:
    """Write an adapter with peft. Return the differences of our outputs from peft's: read in place, and converted to a file.

    Raise AssertionError if the adapter hardly changes the outputs.
    """
    from peft import LoraConfig, get_peft_model

    base = make(kind)
    before = outputs_of(base.model, kind)
    more: dict[str, Any] = {"target_modules": [site.module for site in find(base.model, WHOLE[kind])]}
    if shape == "ranks per module":
        more |= {"rank_pattern": {"qkv": 3, r"layers?\.0\..*dense": 2}, "alpha_pattern": {"qkv": 5, "fc1": 2}}
        more |= {
            "target_modules": r"(vision_model|text_encoder|text_decoder|qformer|language_model)\..*\.(qkv|fc1|query|dense|q)"
        }
    if variant != "lora":
        more[f"use_{variant}"] = True
    torch.manual_seed(5)
    wrapped = get_peft_model(base.model, LoraConfig(r=4, lora_alpha=8, **more)).eval()
    randomise(wrapped, blocks=shape == "q and v blocks")
    expected = outputs_of(wrapped.base_model.model, kind)
    assert relative(expected, before) > 1e-3
    wrapped.save_pretrained(str(folder / "peft"))
    read = make(kind)
    adapter_file.load(read, folder / "peft")
    convert(
        ConvertConfig(
            adapter=str(folder / "peft"), to="lora_blip", output_dir=str(folder / "own"), model="tiny", task="caption"
        )
    )
    converted = make(kind)
    adapter_file.load(converted, folder / "own")
    return relative(outputs_of(read.model, kind), expected), relative(outputs_of(converted.model, kind), expected)


def randomise(wrapped: Any, blocks: bool) -> None:
    """Give each B of a model of peft values that matter. With `blocks`, the rows of k in each fused qkv stay zero."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
            if blocks and ".qkv." in name:
                third = len(parameter) // 3
                parameter.data[third : 2 * third] = 0
        elif "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))


MEASURES = dict(zip(DIRECTIONS, (from_ours, from_peft), strict=True))
