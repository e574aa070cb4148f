# %% [markdown]
# # Solutions 12 · Variants

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

import lesson_tools
import torch
from lesson_tools import ROOT, SEED
from torch import nn

import lora_blip
from lora_blip.lora.layer import AdapterStack, LoRA, Site, lora_hook

R, STEPS = 8, 20
base = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
images, captions = lesson_tools.cubes(64)
pixels = base.image_processor(images, return_tensors="pt").pixel_values
tokens = lesson_tools.tokenize(base, captions)
names = list(lora_blip.inject(base, "vit"))
lora_blip.eject(base)


def outputs(backbone, rows):
    text = {key: values[rows] for key, values in tokens.items()}
    return backbone.model.eval()(pixel_values=pixels[rows], **text)


def train(make, hook, steps=STEPS):
    """Put `make(linear)` on each linear of the ViT, and train it. Return the backbone."""
    torch.manual_seed(SEED)
    backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
    for name in names:
        linear = backbone.model.get_submodule(name)
        linear.lora = AdapterStack()
        linear.lora["default"] = make(linear)
        linear.register_forward_hook(hook, with_kwargs=True)
    optimizer = torch.optim.Adam([p for p in backbone.model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        loss = outputs(backbone, [(step * 8 + i) % 64 for i in range(8)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return backbone


# %% [markdown]
# ## 1 · PiSSA as an adapter of the original base
#
# After the training, the weight is W_res + B A = W₀ + (B A − B₀ A₀). The update is the product of a matrix with 2r columns and one with 2r rows:
#
# $$\Delta W = B A - B_0 A_0 = \begin{pmatrix} B & -B_0 \end{pmatrix} \begin{pmatrix} A \\ A_0 \end{pmatrix}.$$
#
# This adapter of the original base has rank 2r = 16. With α = 16, its factor is 1.


# %%
def pissa(linear):
    lora = LoRA(Site("linear", r=R, alpha=R), linear.in_features, linear.out_features)  # s = 1
    U, S, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    root = S[:R].sqrt()
    lora.A.data, lora.B.data = root[:, None] * Vh[:R], U[:, :R] * root
    linear.weight.data -= lora.delta_weight().detach()
    lora.start = (lora.A.detach().clone(), lora.B.detach().clone())
    return lora


trained = train(pissa, lora_hook)
adapters = lora_blip.inject(base, "vit", r=2 * R, alpha=2 * R)
for name, adapter in adapters.items():
    lora = trained.model.get_submodule(name).lora["default"]
    A0, B0 = lora.start
    adapter.A.data = torch.cat([lora.A.detach(), A0])  # (2r, k)
    adapter.B.data = torch.cat([lora.B.detach(), -B0], dim=1)  # (d, 2r)
path = lora_blip.save_adapter(Path(lesson_tools.RUNS.name) / "pissa.safetensors", base)
lora_blip.eject(base)
with torch.no_grad():
    before = outputs(base, range(8)).logits
    lora_blip.load_adapter(base, path)
    loaded, expected = outputs(base, range(8)).logits, outputs(trained, range(8)).logits
print("largest difference of a logit:", (loaded - expected).abs().max().item())
print("largest change by the training:", (before - expected).abs().max().item())
assert torch.allclose(loaded, expected, atol=1e-3) and not torch.allclose(before, expected, atol=0.1)
lora_blip.eject(base)

# %% [markdown]
# ## 2 · The rank of DoRA's update
#
# W' − W₀ = diag(g − 1) W₀ + diag(g) ΔW. The second term has rank r, but the first has the rank of W₀ if no element of g
# is 1. So the rank of the sum is at least the rank of W₀ minus r. (A singular value may be lost in the rounding errors of
# float32.) The file of a LoRA adapter with a small r cannot store this update exactly. The best matrix of rank 8 keeps the
# eight largest singular values.


# %%
def dora(linear):
    lora = LoRA(Site("linear", r=R, alpha=32.0), linear.in_features, linear.out_features)
    lora.m = nn.Parameter(linear.weight.detach().norm(dim=1))
    return lora


def dora_hook(linear, args, _kwargs, output):
    lora = linear.lora["default"]
    g = lora.m / (linear.weight + lora.delta_weight()).detach().norm(dim=1)
    return output + (g - 1) * (output - linear.bias) + g * lora(args[0])


with torch.no_grad():  # DoRA starts at the base
    assert torch.equal(outputs(train(dora, dora_hook, steps=0), range(8)).logits, outputs(base, range(8)).logits)

trained, plain = (
    train(dora, dora_hook),
    train(lambda linear: LoRA(Site("linear"), linear.in_features, linear.out_features), lora_hook),
)
lost = {"LoRA": 0.0, "DoRA": 0.0}
total, merged = dict(lost), {}
for name in names:
    W0 = base.model.get_submodule(name).weight.double()
    lora = trained.model.get_submodule(name).lora["default"]
    direction = W0 + lora.delta_weight().double()
    updates = {
        "LoRA": plain.model.get_submodule(name).lora["default"].delta_weight().double(),
        "DoRA": (lora.m / direction.norm(dim=1))[:, None] * direction - W0,
    }
    merged[name] = (W0 + updates["DoRA"]).float().detach()  # W'
    for key, update in updates.items():
        S = torch.linalg.svdvals(update.detach())
        rank = torch.linalg.matrix_rank(update.detach(), rtol=1e-6).item()
        assert rank == R if key == "LoRA" else rank > 0.9 * min(update.shape), (name, key, rank)
        lost[key] += S[R:].square().sum().item()
        total[key] += S.square().sum().item()
for key in lost:
    print(f"{key}: ‖update − best matrix of rank {R}‖ / ‖update‖ = {(lost[key] / total[key]) ** 0.5:.3f}")
assert lost["LoRA"] < 1e-6 * total["LoRA"] and lost["DoRA"] > 1e-3 * total["DoRA"]

with torch.no_grad():  # the hook computes the same as W'
    hooked = outputs(trained, range(8)).logits
    for name, weight in merged.items():
        base.model.get_submodule(name).weight.data = weight
    assert torch.allclose(outputs(base, range(8)).logits, hooked, atol=1e-3)
