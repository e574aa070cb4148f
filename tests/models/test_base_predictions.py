"""Captions, answers and rankings of a base without an adapter equal those of transformers."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from lora_blip.models.loading import ARCHITECTURES, load_backbone
from lora_blip.models.matching import cosines
from lora_blip.models.precision import DTYPES
from lora_blip.tasks.registry import TASKS, default_task
from lora_blip.tasks.retrieval import TEMPERATURE
from tests.support import tiny
from tests.support.tokenizers import save_t5

PROMPTS = ("", "a picture of", "A red Cube: 12")
TEXTS = ["a red cube", "two blue cubes on a table", "nothing, 99"]
# Fast kernels round sums in another order. In 16 bits, and with random weights, that may exchange two tokens of equal logits.
COMPUTED = [
    ("fp32", True),
    pytest.param("fp32", False, marks=pytest.mark.slow),
    pytest.param("bf16", False, marks=pytest.mark.slow),
]
EVERY = pytest.mark.parametrize(("dtype", "fast"), COMPUTED)


def photos() -> list[Image.Image]:
    draw = random.Random(4)
    return [
        Image.frombytes("RGB", (width, 48), bytes(draw.randrange(256) for _ in range(3 * 48 * width))) for width in (64, 40)
    ]


def opened(folder: Path, dtype: str, fast: bool) -> tuple[Any, Any, Any]:
    """Return our task, the model of transformers, and its processor."""
    backbone = load_backbone(str(folder), "cpu", dtype=dtype, fast=fast)
    kinds = {kind.__name__: kind for each in ARCHITECTURES.values() for kind in each}
    model = kinds[backbone.architecture].from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    if backbone.family == "blip-2":
        processor.num_query_tokens = tiny.QUERIES
    return TASKS[default_task(backbone.architecture)](backbone), model, processor


def processed(processor: Any, image: Image.Image, text: str, dtype: str) -> dict[str, Any]:
    inputs = dict(processor(images=image, return_tensors="pt", **({"text": text} if text else {})))
    return inputs | {"pixel_values": inputs["pixel_values"].to(DTYPES[dtype])}


def untie_head(folder: Path) -> None:
    """Give a T5 another head than its embeddings, as Flan-T5 has. With a tied one, random weights repeat the start token."""
    weights = load_file(folder / "model.safetensors")
    head = torch.zeros_like(weights["language_model.shared.weight"])
    head[4:100] = torch.randn(96, head.shape[1], generator=torch.Generator().manual_seed(6))
    save_file(weights | {"language_model.lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


@EVERY
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa"])
def test_texts_are_those_of_generate(checkpoints, tmp_path, kind, dtype, fast):
    """Texts equal those of `generate` for each image and prompt alone, because transformers attends to padding."""
    folder = shutil.copytree(checkpoints[kind], tmp_path / "checkpoint")
    if kind == "t5":
        save_t5(folder)
        untie_head(folder)
    task, model, processor = opened(folder, dtype, fast)
    answers, beams = set(), 3 if fast else 1
    for image in photos():
        for prompt in PROMPTS[kind == "vqa" :]:
            inputs = processed(processor, image, prompt, dtype)
            ids = model.generate(**inputs, max_new_tokens=8, num_beams=beams)[0]
            start = len(inputs.get("input_ids", [[]])[0]) or 1 + tiny.QUERIES * (kind == "opt")
            if kind == "blip" and prompt:
                start -= 1  # `generate` removes [SEP]
            if kind in ("blip", "opt"):  # the prompt comes first
                ids = ids[start:]
            expected = " ".join(processor.decode(ids, skip_special_tokens=True).split())
            pixels = task.backbone.image_processor(image, return_tensors="pt")["pixel_values"]
            assert torch.equal(pixels.to(DTYPES[dtype]), inputs["pixel_values"])
            assert task.language.generate(pixels, [prompt], max_new_tokens=8, num_beams=beams) == [expected]
            answers.add(expected)
    assert len(answers) > 1


@EVERY
@pytest.mark.parametrize("kind", ["itm", "itm2"])
def test_rankings_are_those_of_the_two_heads(checkpoints, kind, dtype, fast):
    """The log-odds of ITM, the cosines of ITC and the order of the texts equal those of transformers."""
    task, model, processor = opened(checkpoints[kind], dtype, fast)
    head = {"itm": "use_itm_head", "itm2": "use_image_text_matching_head"}[kind]
    output = {"itm": "itm_score", "itm2": "logits_per_image"}[kind]
    bound = {"rtol": 0, "atol": 1e-5 if dtype == "fp32" else 0.02}
    for image in photos():
        texts = processor.tokenizer(TEXTS, padding=True, return_tensors="pt")
        inputs = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        states = {"pixel_values": pixels.to(DTYPES[dtype])}
        with torch.no_grad():
            every = {"pixel_values": states["pixel_values"].expand(len(TEXTS), -1, -1, -1)}
            logits = getattr(model(**inputs, **every, **{head: True}), output).float()
            contrast = getattr(model(**inputs, **states, **{head: False}), output).float().reshape(-1)
            matcher, rows = task.matcher, task.encode_texts(TEXTS)
            ours = cosines(matcher.image_features(matcher.encode_images(pixels)), rows.features)[0]
        odds = logits[:, 1] - logits[:, 0]
        torch.testing.assert_close(torch.tensor(task.match(pixels, [TEXTS])[0]), odds, **bound)
        torch.testing.assert_close(ours, contrast, **bound)
        expected = (contrast / TEMPERATURE + odds).argsort(descending=True)
        assert task.rank(pixels, [], TEXTS)[0].argsort(descending=True).tolist() == expected.tolist()
