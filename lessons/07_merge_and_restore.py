# %% [markdown]
# # 7 · Merge and restore
#
# **You learn** what a merge does to the bits of W, how much of an update is lost in 16 bits, and why subtracting the update
# does not give back W.
#
# **Time:** less than a minute on two cores, longer if they are busy.
#
# **Read:** `lora_blip/lora/merging.py`.
#
# An adapter that is merged needs no hook at inference. The weight is replaced by
#
# $$W' = \mathrm{round}(W_0 + \Delta W), \qquad \Delta W = \frac{\alpha}{r} B A.$$
#
# The sum is computed in float32 and then rounded to the dtype of the weight. This rounding is the subject of the lesson.

# %%
import lesson_tools  # first: it sets the paths and the number of threads
import matplotlib.pyplot as plt
import torch
from lesson_tools import ROOT, record, show

import lora_blip

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
run = lesson_tools.quick_train(max_steps=100)  # adapters on the linears of the ViT, alpha / r = 4
backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
lora_blip.load_adapter(backbone, run)

linears = {name: module for name, module in backbone.model.named_modules() if hasattr(module, "lora")}
W0 = {name: linear.weight.detach().clone() for name, linear in linears.items()}  # (d, k)
delta = {name: sum(lora.delta_weight() for lora in linear.lora.values()).detach() for name, linear in linears.items()}

# %% [markdown]
# ## A merged model equals the hooked one
#
# In float32, we compare the logits of four captions: with hooks, and after `merge`.

# %%
images, captions = lesson_tools.test_cubes(4)
tokens = lesson_tools.tokenize(backbone, captions)


def logits(loaded):
    pixels = loaded.image_processor(images, return_tensors="pt").pixel_values.to(next(loaded.model.parameters()).dtype)
    with torch.no_grad():
        return loaded.model(pixel_values=pixels, **tokens).logits.float()


hooked = logits(backbone)
lora_blip.merge(backbone)
merged = logits(backbone)
difference = ((merged - hooked).abs().max() / hooked.abs().max()).item()
print(f"largest difference of a logit, relative to the largest logit: {difference:.1e}")
assert 0 < difference < 1e-5
for name, linear in linears.items():
    assert torch.equal(linear.weight, W0[name] + delta[name])  # W' of the equation, bit for bit

# %% [markdown]
# The difference is not zero. With hooks, the model adds W₀x and ΔWx, and each has its own rounding errors. Merged, it rounds
# the sum of the weights first. Neither is exact. The difference has the size of float32's rounding errors.
#
# ## 16 bits: a part of the update is lost
#
# A floating-point number with p significant bits has the unit roundoff u = 2⁻ᵖ: p is 24 for fp32, 11 for fp16 and 8 for bf16.
# Rounding a number z changes it by at most u·|z|. (In fp16, numbers below 2⁻¹⁴ have fewer bits. There, the change is at
# most 2⁻²⁵.) So for every element, up to this exception,
#
# $$|W' - (W_0 + \Delta W)| \le u\,|W_0 + \Delta W|.$$
#
# The code allows 1.01·u, because the sum is rounded twice: to float32, and then to the dtype of the weight.
#
# A dtype has only some numbers. From W₀ to the next number of the dtype, the distance is at least u·|W₀|. A change of less
# than half of this distance is rounded away: if |ΔW| < u·|W₀|/2, then W' = W₀. We count all elements that do not change, for the trained update and for the same update made
# smaller. The other elements change by whole distances, so we also measure the part of the update that is lost:
# ‖(W' − W₀) − ΔW‖/‖ΔW‖, with Frobenius norms over all linears. Here, W₀ is the weight in the dtype of the merge.

# %%
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
SIZES = [2.0**-k for k in range(0, 11)]  # the update is multiplied by this
unchanged, lost = {key: [] for key in DTYPES}, {key: [] for key in DTYPES}
tiny = {"fp32": 0.0, "fp16": 2.0**-25, "bf16": 0.0}  # the largest error below 2⁻¹⁴, for fp16
for key, dtype in DTYPES.items():
    for size in SIZES:
        same = elements = error = total = 0
        for name, weight in W0.items():
            W, update = weight.to(dtype), size * delta[name]
            exact = W.double() + update.double()
            new = (W.float() + update).to(dtype)
            assert ((new.double() - exact).abs() <= 1.01 * ROUNDOFF[key] * exact.abs() + tiny[key]).all()
            assert not ((new != W) & (update.abs() < ROUNDOFF[key] * W.double().abs() / 2)).any()
            same, elements = same + (new == W).sum().item(), elements + W.numel()
            error += (new.double() - exact).square().sum().item()  # (W' − W₀) − ΔW
            total += update.double().square().sum().item()
        unchanged[key].append(same / elements)
        lost[key].append((error / total) ** 0.5)
    for end, label in ((0, "1"), (-1, "1/1024")):
        print(f"{key}, size {label}: {unchanged[key][end]:.2%} of the elements do not change")
        record(f"lost part of ΔW, {key}, size {label}", lost[key][end])

assert unchanged["fp32"][0] < unchanged["fp16"][0] < unchanged["bf16"][0] < 0.05
assert unchanged["bf16"][-1] > 0.9 > unchanged["fp16"][-1] > 0.5 > 0.01 > unchanged["fp32"][-1]
assert lost["bf16"][0] < 0.02 and lost["bf16"][-1] > 0.8 and lost["fp16"][-1] > 0.4 and lost["fp32"][-1] < 0.001

# %% [markdown]
# The tiny base and its large learning rate give a large update, so little is lost here. Of an update that is 1024 times
# smaller, more than 80 % is lost in bf16, and more than 40 % in fp16. An optimizer step on A or B in bf16 would be
# rounded in the same way, so `lora_blip` keeps A and B in float32.
#
# A hook leaves W₀ as it is and, without autocast, computes ΔWx in float32. But in a 16-bit model, the output y of a linear has 16 bits too, and
# so has the sum y + ΔWx. If |ΔWx| < u·|y|/2 for an output, this update is lost in the same way.
#
# ## Subtracting does not restore
#
# A library that keeps only W' and ΔW can undo a merge only by subtracting: W'' = round(W' − ΔW). (`peft` 0.21.2 rounds ΔW to
# the dtype of the weight first.) But W' contains the rounding error of W₀ + ΔW, and the subtraction does not remove it. If
# this error is larger than half the distance from W₀ to the next number, W'' differs from W₀. This is possible if |W'| is larger than |W₀|,
# because the distances between larger numbers are larger. It happens in some elements, in float32 too. Each cycle with
# another adapter adds more errors. We imitate 20 different adapters of the same size: each has the rows of ΔW in another random
# order.

# %%
CYCLES = 20
changed = {key: [] for key in DTYPES}
for key, dtype in DTYPES.items():
    weights = {name: weight.to(dtype) for name, weight in W0.items()}
    for _ in range(CYCLES):
        for name, W in weights.items():
            update = delta[name][torch.randperm(len(W))]
            weights[name] = ((W.float() + update).to(dtype).float() - update).to(dtype)
        wrong = sum((W0[name].to(dtype) != W).sum().item() for name, W in weights.items())
        changed[key].append(wrong / sum(W.numel() for W in weights.values()))
    record(f"changed after 1 cycle, {key}", changed[key][0])
    record(f"changed after {CYCLES} cycles, {key}", changed[key][-1])
    assert changed[key][0] > 0.02 and 2 * changed[key][0] < changed[key][-1]

# %% [markdown]
# `lora_blip.restore` copies W₀ back. The copy is made at the first merge. It has as many bytes as the adapted weights.
# To get every bit back, W' and ΔW are not enough in general: you need a copy of W₀, the checkpoint, or a list of corrections (exercise 2).

# %%
lora_blip.restore(backbone)
assert all(torch.equal(linear.weight, W0[name]) for name, linear in linears.items())
for _ in range(CYCLES):
    lora_blip.merge(backbone)
    lora_blip.restore(backbone)
assert all(torch.equal(linear.weight, W0[name]) for name, linear in linears.items())
assert torch.equal(logits(backbone), hooked)

half = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu", dtype="bf16")
before = {name: half.model.get_submodule(name).weight.detach().clone() for name in linears}
with lora_blip.disable_adapters(backbone):
    of_base = logits(backbone)
errors = {"base without adapter": (logits(half) - of_base).norm() / of_base.norm()}
lora_blip.load_adapter(half, run)
errors["hooks"] = (logits(half) - hooked).norm() / hooked.norm()
lora_blip.merge(half)
errors["merged"] = (logits(half) - hooked).norm() / hooked.norm()
lora_blip.restore(half)
assert all(torch.equal(half.model.get_submodule(name).weight, weight) for name, weight in before.items())
print("copy of the weights:", sum(weight.nbytes for weight in before.values()) // 1024, "KiB in bf16")
for name, error in errors.items():
    record(f"relative error of the bf16 logits, {name}", error.item())
assert max(errors.values()) < 3 * min(errors.values())

# %%
figure, panels = plt.subplots(2, 1, figsize=(5, 7))
for key, marker in zip(DTYPES, "osD", strict=True):
    panels[0].semilogx(SIZES, [100 * share for share in unchanged[key]], marker=marker, label=key, base=2)
    panels[1].plot(range(1, CYCLES + 1), [100 * share for share in changed[key]], marker=marker, markersize=4, label=key)
panels[0].set(xlabel="size of the update (1 = trained)", ylabel="elements of W without a change (%)")
panels[0].set_title("16 bits: a small update is often rounded away")
panels[1].plot([1, CYCLES], [0, 0], "k--", label="restore")
panels[1].set(xlabel="cycles of merging and subtracting", ylabel="elements different from W₀ (%)", xticks=[1, 5, 10, 15, 20])
panels[1].set_title("Subtracting does not restore W₀")
panels[0].legend()
panels[1].legend(loc=(0.55, 0.12))
show(figure, "rounding")

# %% [markdown]
# In bf16, the logits with hooks and those with merged weights have errors of similar size. The bf16 base has such an error too,
# without any adapter. So a part of the error comes from the other roundings of a bf16 model.
#
# ## Exercises
#
# 1. Train two adapters, with `quick_train(max_steps=20, seed=1)` and `seed=2`. Load both on one base: `load_adapter(backbone, run,
#    name="second")` gives an adapter its own name. Merge them into bf16 weights in two ways: round
#    after each, W' = round(round(W₀ + ΔW₁) + ΔW₂), and round once, W' = round(W₀ + (ΔW₁ + ΔW₂)). Compute both by hand from
#    `delta_weight()`, because `lora_blip.merge` rounds once. A right answer shows that the
#    first way depends on the order of the adapters in some
#    elements, that the second does not, and that the second is nearer to the exact sum on average.
# 2. Restore W₀ by subtracting, with less memory than a copy: store only the elements that subtracting gets wrong, as an index of
#    four bytes and a value of two. Use the first adapter of exercise 1. A right answer restores bf16 weights bit for bit after
#    one merge, and shows that fewer than a third of the elements are wrong, so that the list has fewer bytes than a copy.
#
# ## What to remember
#
# - A merge rounds W₀ + ΔW to the dtype of the weight. In float32 it changes nothing that matters. In 16 bits, a large part of a small
#   update is lost.
# - Subtracting ΔW does not give back every bit of W₀. To restore them, you need more information, such as a copy of the adapted weights.
# - Start every merge from W₀, with the sum of all updates.
#
# ## Sources
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685, section 4.1: no additional latency
# - Higham 2002, *Accuracy and Stability of Numerical Algorithms*, theorem 2.2: the unit roundoff
