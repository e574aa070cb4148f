"""One training step, ours beside `peft`'s: `make bench`, or `python -m benchmarks.step --size base --precision fp32`.

Both sides train the same adapters on the same batch with the same hand-written step; only the way in
which the update is added differs. The two run in turn, A B A B …, and each pair gives one ratio, so
that a machine whose speed drifts does not decide the outcome.
"""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import peft
import torch
import transformers
from transformers import BlipConfig, BlipForConditionalGeneration

from lora_blip import lora, targets
from lora_blip.models import autocasting

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 96},
    "base": {},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
}
R, ALPHA, TOKENS, RATE = 8, 16, 16, 1e-3


@dataclass
class Side:
    name: str
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def build(size: str) -> BlipForConditionalGeneration:
    """BLIP of a true size with random weights; the vision config's own init of 1e-10 would make denormals."""
    torch.manual_seed(0)
    config = BlipConfig(vision_config={"initializer_range": 0.02, **SIZES[size]})
    return BlipForConditionalGeneration(config).requires_grad_(False).eval()


def ours(size: str) -> Side:
    model = build(size)
    found = lora.inject(model, targets.find(model, "vit", R, ALPHA))
    return Side("lora_blip", model, torch.optim.AdamW([p for x in found.values() for p in (x.A, x.B)], lr=RATE))


def theirs(size: str) -> Side:
    model = build(size)
    modules = [site.module for site in targets.find(model, "vit", R, ALPHA)]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=modules))
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    return Side("peft", wrapped.base_model.model, torch.optim.AdamW(trained, lr=RATE))


def step(side: Side, batch: dict[str, torch.Tensor], precision: str) -> float:
    """Seconds of one forward, backward and update."""
    context: Callable = autocasting(torch.device("cpu"), precision) if precision != "fp32" else nullcontext
    started = time.perf_counter()
    with context():
        loss = side.model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def compare(size: str, precision: str, images: int, pairs: int) -> str:
    sides = [ours(size), theirs(size)]
    side = sides[0].model.config.vision_config.image_size
    ids = torch.randint(1000, 30000, (images, TOKENS), generator=torch.Generator().manual_seed(1))
    batch = {"pixel_values": torch.randn(images, 3, side, side), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seconds: dict[str, list[float]] = {"lora_blip": [], "peft": []}
    for turn in range(pairs + 1):
        for one in sides if turn % 2 else reversed(sides):
            gc.collect()
            spent = step(one, batch, precision)
            if turn:  # the first is a warm-up
                seconds[one.name].append(spent)
    ratios = [a / b for a, b in zip(seconds["lora_blip"], seconds["peft"], strict=True)]
    medians = " ".join(f"{name} {statistics.median(values):.3f} s" for name, values in seconds.items())
    return (
        f"{size:<6}{precision:<5} ratio to peft: median {statistics.median(ratios):.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {pairs} pairs); {medians}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, action="append")
    parser.add_argument("--precision", choices=("fp32", "bf16"), action="append")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}, r={R} on the ViT, {arguments.images} images")
    for size in arguments.size or ["tiny", "base"]:
        for precision in arguments.precision or ["fp32"]:
            print(compare(size, precision, arguments.images, arguments.pairs), flush=True)
