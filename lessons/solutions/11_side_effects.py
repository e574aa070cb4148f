# %% [markdown]
# # Solutions 11 · Side effects

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

import random

import lesson_tools
import torch
from lesson_tools import ROOT, SEED, record

import lora_blip
from lora_blip.lora.spectrum import intruder_dimensions
from toyworld.scenes import flat_scene, render_flat

STEPS, BATCH, TESTS = 80, 8, 100
base = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
names = list(lora_blip.inject(base, "vit,text"))
lora_blip.eject(base)


def encode(images, captions):
    tokens = lesson_tools.tokenize(base, captions, length=16)
    return base.image_processor(images, return_tensors="pt").pixel_values, tokens.input_ids, tokens.attention_mask


def flat_shapes(count, name):
    rng = random.Random(f"{name}, seed {SEED}")
    scenes = [flat_scene(rng) for _ in range(count)]
    return encode([render_flat(scene, rng)[0] for scene in scenes], [scene.caption("shape") for scene in scenes])


cubes, test = encode(*lesson_tools.cubes()), encode(*lesson_tools.test_cubes(TESTS))
flat, replay = flat_shapes(TESTS, "test"), flat_shapes(2 * STEPS, "replay")


def exact(backbone, data):
    pixels, ids, mask = data
    with torch.no_grad():
        logits = backbone.model.eval()(pixel_values=pixels, input_ids=ids, attention_mask=mask).logits
    return ((logits[:, :-1].argmax(2) == ids[:, 1:]) | (mask[:, 1:] == 0)).all(1).float().mean().item()


def train(lr, replayed):
    """Train LoRA on batches of 8 images, of which the first `replayed` are flat shapes. Return the merged backbone."""
    torch.manual_seed(SEED)
    backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
    lora_blip.inject(backbone, "vit,text", r=8, alpha=32.0)
    trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.25, cycle_momentum=False)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(SEED)).repeat(3)
    for step in range(STEPS):
        old = slice(step * replayed, (step + 1) * replayed)
        new = order[step * BATCH : (step + 1) * BATCH - replayed]
        pixels, ids, mask = (torch.cat([flats[old], rows[new]]) for flats, rows in zip(replay, cubes, strict=True))
        labels = ids.masked_fill(mask == 0, -100)
        backbone.model.train()(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    lora_blip.bake(backbone)
    return backbone


# %% [markdown]
# ## 1 · Replay
#
# Two of the eight images in each batch are flat shapes. The test has other flat shapes.

# %%
alone, mixed = train(3e-3, 0), train(3e-3, 2)
for name, backbone in (("cubes only", alone), ("with replay", mixed)):
    record(f"{name}: cubes", exact(backbone, test))
    record(f"{name}: flat shapes", exact(backbone, flat))
assert exact(mixed, flat) > exact(alone, flat) + 0.2 and exact(mixed, test) > 0.85

# %% [markdown]
# ## 2 · Smaller intruders
#
# W' = Σ σᵢ uᵢ vᵢᵀ. If uᵢ is an intruder, subtract (1 − c) σᵢ uᵢ vᵢᵀ: its singular value is then c σᵢ.


# %%
def scale_intruders(backbone, c):
    """Multiply the singular value of each intruder by c. Return the number of intruders."""
    count = 0
    for name in names:
        W0, weight = base.model.get_submodule(name).weight, backbone.model.get_submodule(name).weight
        U0 = torch.linalg.svd(W0.double(), full_matrices=False)[0]
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        intruder = (U.T @ U0).abs().amax(1) < 0.5
        intruder[10:] = False
        assert intruder.sum() == intruder_dimensions(W0, weight - W0)  # the library's count
        weight.data -= ((1 - c) * (U * S)[:, intruder] @ Vh[intruder]).float()
        after = (U.T @ weight.double() @ Vh.T).diagonal()  # uᵢᵀ W' vᵢ, the new singular values
        assert torch.allclose(after, torch.where(intruder, c * S, S), atol=1e-4)
        count += intruder.sum().item()
    return count


weights = {name: alone.model.get_submodule(name).weight.detach().clone() for name in names}
after = {}
for c in (1.0, 0.75, 0.5, 0.0):
    for name in names:
        alone.model.get_submodule(name).weight.data.copy_(weights[name])
    record(f"c = {c}: intruders", scale_intruders(alone, c))
    after[c] = exact(alone, test), exact(alone, flat)
    record(f"c = {c}: cubes", after[c][0])
    record(f"c = {c}: flat shapes", after[c][1])
assert after[1.0][0] > 0.85 and after[0.0][0] < 0.2
assert after[1.0][1] + 0.1 < after[0.0][1] < 0.8 * exact(base, flat)

# %% [markdown]
# Here, only one half of the paper's result holds. Without the intruders (c = 0), the model forgets less: 27 %, 31 % and 54 % of the
# flat shapes are right with the seeds 0, 1 and 2, and none with c = 1. But no caption of a cube is right. In this model, the
# intruders are a part of the new skill. The paper studies large language models.
#
# A c between 0 and 1 is not a good trade either. With c = 0.75, all captions of cubes remain right with the seeds 0, 1 and 2, but
# only 3 %, 0 % and 0 % of the flat shapes are right. With c = 0.5, it is 15 %, 0 % and 2 % of the flat shapes, and with seed 0
# only 5 % of the cubes (99 % and 100 % with the other seeds).
