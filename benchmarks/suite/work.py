"""The data for the contestants: pixels and captions in memory, or JPEG files with annotations."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lora_blip.models.loading import Backbone
from toyworld.words import WORDS

TOKENS = 16  # tokens of a caption, including the first and the last
UNEVEN = (8, 20)  # tokens of the shortest and the longest of many captions
PHOTO = (640, 480)


@dataclass(frozen=True)
class Work:
    """One batch: images, and the captions of each."""

    pixel_values: Tensor  # (images, 3, H, W), float32
    texts: list[list[str]]


def caption(rng: random.Random, tokens: int) -> str:
    """Return `tokens` − 2 words of one token each: a decoder adds a first and a last token."""
    return " ".join(rng.choice(WORDS) for _ in range(tokens - 2))


def work(backbone: Backbone, images: int = 2, captions: int = 1, uneven: bool = False, seed: int = 1) -> Work:
    """Return random pixels with captions of 16 tokens, or of 8 to 20 tokens if `uneven`."""
    rng, side = random.Random(seed), backbone.model.config.vision_config.image_size
    texts = [[caption(rng, rng.randint(*UNEVEN) if uneven else TOKENS) for _ in range(captions)] for _ in range(images)]
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(seed))
    return Work(pixels.to(backbone.device), texts)


def write_photos(folder: Path, images: int, captions: int, seed: int = 2) -> Path:
    """Write JPEG files of 640 × 480 and annotations.jsonl, with a line for each caption.

    Gradients with noise over them: flat colours would be decoded in no time.
    """
    rng, draw = random.Random(seed), np.random.default_rng(seed)
    (folder / "photos").mkdir(parents=True)
    lines = []
    for number in range(images):
        _photo(draw).save(folder / "photos" / f"{number}.jpg", quality=90)
        texts = [caption(rng, rng.randint(*UNEVEN)) for _ in range(captions)]
        lines += [json.dumps({"image": f"photos/{number}.jpg", "text": text}) for text in texts]
    path = folder / "annotations.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _photo(draw: np.random.Generator) -> Image.Image:
    width, height = PHOTO
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    corners = draw.uniform(0, 255, (3, 3))
    slope = corners[0] + across[..., None] * (corners[1] - corners[0]) + down[..., None] * (corners[2] - corners[0])
    return Image.fromarray((slope + draw.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8))
