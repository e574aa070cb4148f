# %% [markdown]
# # Solutions of lesson 2
#
# Both solutions train on eight images and check which gradients are zero.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

import torch
from lesson_tools import ROOT, SEED, cubes, tokenize
from torch import nn

import lora_blip

images, captions = cubes(8)


def train(steps, random_b):
    """Start with A = 0. Return the losses of the base and of each step, and whether A and B have a gradient in each step."""
    torch.manual_seed(SEED)
    backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
    adapters = lora_blip.inject(backbone, "vit", r=8, alpha=32.0).values()
    for lora in adapters:
        nn.init.zeros_(lora.A)
        if random_b:
            nn.init.kaiming_uniform_(lora.B, a=5**0.5)
    pixels = backbone.image_processor(images, return_tensors="pt").pixel_values
    batch = {"pixel_values": pixels, **tokenize(backbone, captions)}
    with torch.no_grad(), lora_blip.disable_adapters(backbone):
        losses = [backbone.model(**batch).loss.item()]
    optimizer = torch.optim.AdamW([matrix for lora in adapters for matrix in (lora.A, lora.B)], lr=3e-3)
    moves = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = backbone.model(**batch).loss
        loss.backward()
        moves.append((any(lora.A.grad.any() for lora in adapters), any(lora.B.grad.any() for lora in adapters)))
        optimizer.step()
        losses.append(loss.item())
    return losses, moves


# %% [markdown]
# ## 1. A = 0 and a random B
#
# $B A = 0$ again, so the first loss is that of the base. Now $\partial L / \partial B = \frac{\alpha}{r} dy \, (A x)^\top = 0$ at step 0.

# %%
losses, moves = train(10, random_b=True)
print("loss of the base, then of each step:", *(f"{loss:.3f}" for loss in losses))
assert losses[1] == losses[0]
assert moves[0] == (True, False)
assert moves[1] == (True, True)
assert losses[-1] < losses[1] / 2

# %% [markdown]
# ## 2. A = 0 and B = 0
#
# Both gradients contain a factor that is zero, so neither matrix ever changes.

# %%
losses, moves = train(3, random_b=False)
print("loss of the base, then of each step:", *(f"{loss:.3f}" for loss in losses))
assert moves == [(False, False)] * 3
assert len(set(losses)) == 1
