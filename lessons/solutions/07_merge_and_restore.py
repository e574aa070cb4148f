# %% [markdown]
# # 7 · Merge and restore: solutions

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lesson_tools
import torch
from lesson_tools import ROOT

import lora_blip

backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu", dtype="bf16")
updates = []  # of two adapters
for seed in (1, 2):
    run = lesson_tools.quick_train(max_steps=20, seed=seed)
    lora_blip.load_adapter(backbone, run, name=f"seed{seed}")
linears = {name: module for name, module in backbone.model.named_modules() if hasattr(module, "lora")}
W0 = {name: linear.weight.detach().clone() for name, linear in linears.items()}  # bf16
for seed in (1, 2):
    updates.append({name: linear.lora[f"seed{seed}"].delta_weight().detach() for name, linear in linears.items()})

# %% [markdown]
# ## 1. Round after each update, or once

# %%
first, second = updates
depends = error_each = error_once = 0.0
for name, W in W0.items():
    a, b = first[name], second[name]
    each = ((W.float() + a).bfloat16().float() + b).bfloat16()
    reverse = ((W.float() + b).bfloat16().float() + a).bfloat16()
    once = (W.float() + (a + b)).bfloat16()
    assert torch.equal(once, (W.float() + (b + a)).bfloat16())
    exact = W.double() + a.double() + b.double()
    depends += (each != reverse).sum().item()
    error_each += (each.double() - exact).abs().sum().item()
    error_once += (once.double() - exact).abs().sum().item()
print(f"{depends:.0f} elements depend on the order; sum of the errors {error_each:.1f} and {error_once:.1f}")
assert depends > 0 and error_once < error_each

lora_blip.merge(backbone)  # (W₀ + ΔW₁) + ΔW₂ in float32, rounded once
for name, linear in linears.items():
    assert torch.equal(linear.weight, (W0[name].float() + first[name] + second[name]).bfloat16())
lora_blip.restore(backbone)

# %% [markdown]
# ## 2. Restore with a list of corrections
#
# A correction needs an index of four bytes and a value of two bytes. An element of the copy has two bytes. So the list is smaller
# if fewer than a third of the elements are wrong.

# %%
bytes_copy = bytes_list = wrong = elements = 0
for name, W in W0.items():
    merged = (W.float() + first[name]).bfloat16()
    subtracted = (merged.float() - first[name]).bfloat16()
    index = (subtracted != W).flatten().nonzero().flatten().to(torch.int32)
    value = W.flatten()[index.long()]
    restored = subtracted.flatten().index_put((index.long(),), value).view_as(W)
    assert torch.equal(restored, W)
    bytes_copy += W.nbytes
    bytes_list += index.nbytes + value.nbytes
    wrong, elements = wrong + len(index), elements + W.numel()
print(f"copy {bytes_copy // 1024} KiB, list {bytes_list // 1024} KiB, {wrong / elements:.1%} of the elements are wrong")
assert bytes_list < bytes_copy and 3 * wrong < elements
