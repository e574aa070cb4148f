# %% [markdown]
# # 3 · The gradients by hand
#
# **You learn** the three gradients of a linear with LoRA, how to write them for a batch of rows, and how many bytes the backward pass
# needs from the forward pass.
#
# **Time:** less than a minute on two cores, longer if they are busy. **Read:** `lora_blip/lora/fused.py`, whose backward pass is the one of this lesson
# (its `h` includes the factor s).
#
# ## From the equation to the gradients
#
# Write $s = \alpha / r$, $h = A x$ and $y = W_0 x + s B h$. Let $dy = \partial L / \partial y$ be the gradient that arrives from the next
# layer, with $d$ numbers. In the same way, write $dA$ for $\partial L / \partial A$. To first order, a small change $\Delta A$ changes the loss by
#
# $$s \, dy^\top B \, \Delta A \, x = \langle s \, B^\top dy \, x^\top, \Delta A \rangle$$
#
# $\langle P, Q \rangle$ is the sum of the products of the entries of $P$ and $Q$. So each entry of
# $s \, B^\top dy \, x^\top$ is the derivative of the loss with respect to that entry of $A$: this matrix is $dA$. The same for $B$ and $x$ gives
#
# $$dA = s \, B^\top dy \, x^\top$$
# $$dB = s \, dy \, h^\top$$
# $$dx = W_0^\top dy + s \, A^\top B^\top dy$$
#
# A batch has one row for each vector, for example one for each patch of each image: $X$ of shape $(n, k)$, $dY$ of shape $(n, d)$, and $H = X A^\top$. Row $i$ of $X$ is $x_i^\top$, so
# $W_0 x$ becomes $X W_0^\top$, and $B h$ becomes $H B^\top$. The gradients of $A$ and $B$
# are sums over the rows, which matrix products compute:
#
# $$dA = s \, (dY B)^\top X$$
# $$dB = s \, dY^\top H$$
# $$dX = dY \, W_0 + s \, (dY B) A$$

# %%
import torch
from lesson_tools import ROOT, always_fused, record, show
from matplotlib import pyplot as plt
from torch import nn

import lora_blip
from lora_blip.lora.layer import AdapterStack, LoRA, Site, lora_hook

k, d, r, alpha, n = 64, 96, 5, 12.0, 10
s = alpha / r

# %% [markdown]
# ## Against autograd, in float64
#
# We compute all three by hand, and compare them with the gradients that autograd finds through `lora_hook`. In float64 they agree to
# twelve digits. In float32, rounding would hide a small mistake.

# %%
linear = nn.Linear(k, d).requires_grad_(False)
linear.lora = AdapterStack()
lora = linear.lora["default"] = LoRA(Site("fc", r=r, alpha=alpha), k, d)
nn.init.normal_(lora.B)
linear.register_forward_hook(lora_hook, with_kwargs=True)
linear.double()

X = torch.randn(n, k, dtype=torch.float64, requires_grad=True)
Y = linear(X)
dY = torch.randn_like(Y)  # any gradient of the loss with respect to Y
Y.backward(dY)


def difference(by_hand, autograd):
    """Return the largest difference of an entry, relative to the largest entry."""
    return ((by_hand - autograd).abs().max() / autograd.abs().max()).item()


with torch.no_grad():
    A, B, W0 = lora.A, lora.B, linear.weight
    H = X @ A.T
    for name, by_hand, autograd in (
        ("dA", s * (dY @ B).T @ X, A.grad),
        ("dB", s * dY.T @ H, B.grad),
        ("dX", dY @ W0 + s * (dY @ B) @ A, X.grad),
    ):
        print(f"{name}: {difference(by_hand, autograd):.0e} from autograd")
        assert difference(by_hand, autograd) < 1e-12

    columns = zip(X, dY, strict=True)  # x and dy of one row
    sums = sum(
        torch.cat([(s * B.T @ torch.outer(dy, x)).flatten(), (s * torch.outer(dy, A @ x)).flatten()]) for x, dy in columns
    )
    assert difference(sums, torch.cat([A.grad.flatten(), B.grad.flatten()])) < 1e-12  # the formulas for one x, summed

# %% [markdown]
# ## What must be kept for the backward pass
#
# lora_blip has two hooks with the same result. `lora_hook` is that of lesson 1. `fused_hook` works with a pre-hook, which runs before the linear.
# The pre-hook gives the linear a detached x, so autograd does not record the linear. The hook then adds the update with one autograd function.
# The backward pass of this function computes all gradients above: those of the linear and those of the update. `inject` adds the pre-hook and `fused_hook`. (For small linears on most CPUs, `fused_hook`
# computes the update with operations of PyTorch, which is faster there.)
#
# $dA$ needs $X$, and $dB$ needs $H = X A^\top$. $W_0$, $A$ and $B$ are in memory anyway. So it is enough to keep $X$ in the forward pass:
# $n k$ numbers. Both hooks also keep $H$ ($n r$ more numbers), so that the backward pass does not compute it again. Full fine-tuning also keeps $X$, for
# $\partial L / \partial W = dY^\top X$. So for one linear, LoRA does **not reduce the memory of activations**. It reduces the memory of
# the gradient and of the optimizer, because $r (d + k)$ numbers are trained instead of $d k$. A frozen linear without an adapter has
# no weight gradient, so it does not need $X$: adapters on fewer linears need less memory.
#
# `saved_tensors_hooks` calls a function for each tensor that autograd keeps. We count the bytes of each storage once, and leave out
# the parameters. Here the linear is the first one of the MLP in the ViT of `tiny-blip`, with $k$ = 128, $d$ = 512 and r = 8. Its input
# has 8 images of 37 rows: 36 patches, and one class token for the whole image. So now $n$ = 8 · 37 = 296.


# %%
def saved_bytes(linear, x, autocast):
    """Return the bytes that the forward pass of a linear keeps for the backward pass, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in linear.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor  # the tensor stays alive, so that no other gets its address
        return tensor

    autocast_to_bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast_to_bf16:
        linear(x)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# %%
k, d, r, images, rows = 128, 512, 8, 8, 37
backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
lora_blip.inject(backbone, "vit", r=r, alpha=32.0)
always_fused()  # by default, small linears do not use the fused update on most CPUs
fused = backbone.model.vision_model.encoder.layers[0].mlp.fc1  # with `fused_hook`
plain = nn.Linear(k, d).requires_grad_(False)
plain.lora = AdapterStack({"default": LoRA(Site("fc1", r=r, alpha=32.0), k, d)})
plain.register_forward_hook(lora_hook, with_kwargs=True)

x = torch.randn(images, rows, k, requires_grad=True)
layers = {"full fine-tuning": nn.Linear(k, d), "lora_hook": plain, "fused_hook": fused}
kept = {(name, bf16): saved_bytes(layer, x, bf16) for name, layer in layers.items() for bf16 in (False, True)}
x_and_h = {bf16: images * rows * (k + r) * (2 if bf16 else 4) for bf16 in (False, True)}
for (name, bf16), number in kept.items():
    record(f"kilobytes of {name} in {'bf16' if bf16 else 'fp32'}", number / 1000)

assert kept["full fine-tuning", False] == images * rows * k * 4  # X
assert saved_bytes(nn.Linear(k, d).requires_grad_(False), x, False) == 0  # frozen, without an adapter
assert kept["full fine-tuning", True] == images * rows * k * 2 + 2 * d * k  # X, and a copy of W in bf16
assert kept["lora_hook", False] == kept["fused_hook", False] == x_and_h[False]  # X and H
copies = 2 * r * (d + k)  # bytes of A and B in bf16
assert kept["fused_hook", True] == x_and_h[True] + copies
assert kept["lora_hook", True] == x_and_h[True] + copies + 2 * d * k  # and a copy of W₀ in bf16, for dX

# %% [markdown]
# In float32, both hooks keep only $X$ and $H$. Under autocast, autograd also keeps the bf16 copies of the weights that it used:
# $A$ and $B$, and $W_0$, which $dX$ needs. `fused_hook` keeps no copy of $W_0$. Its backward pass makes the copy again.
# Full fine-tuning keeps such a copy too, and could also make it again: this saving comes from the fused hook, and not from LoRA.
#
# For each trained number, Adam stores two numbers, and the gradient is a third. So full fine-tuning needs $3 d k$ numbers here, and
# LoRA needs $3 r (d + k)$.

# %%
trained = sum(p.numel() for p in plain.parameters() if p.requires_grad)
assert trained == r * (d + k)
print(f"gradient and Adam: {12 * d * k / 1000:.0f} kB for full fine-tuning, {12 * trained / 1000:.0f} kB for LoRA")

figure, axes = plt.subplots(figsize=(5, 3.2))
for offset, bf16, name in ((0.2, False, "float32"), (-0.2, True, "bf16 autocast")):
    values = [kept[layer, bf16] / 1000 for layer in layers]
    bars = axes.barh([2 - place + offset for place in range(3)], values, height=0.38, label=name)
    axes.bar_label(bars, fmt="%.0f kB", label_type="center", color="white", fontsize=9)
    ends = [2 - place + offset + side for place in range(3) for side in (-0.19, 0.19)]
    axes.vlines([x_and_h[bf16] / 1000] * 3, ends[::2], ends[1::2], color="black", linestyle=":", linewidth=1.5, zorder=3)
axes.set(xlabel="kept for the backward pass (kB)", title="The fused hook keeps no copy of W₀ in bf16", xlim=(0, 300))
axes.set_yticks([2, 1, 0], list(layers))
axes.legend(loc="lower right", handlelength=1)
show(figure, "saved")

# %% [markdown]
# The dotted line at each bar shows the size of $X$ and $H$: $n (k + r)$ numbers of 4 or 2 bytes.
#
# ## Exercises
#
# 1. With dropout, the update is $s B A (m \odot x)$ ($\odot$: entry by entry), and the mask $m$ contains 0 with the
#    probability $p$, and otherwise $1 / (1 - p)$. Derive the
#    three gradients. Write the forward pass yourself, with a mask that you draw. A right answer equals autograd in float64, with
#    relative differences below $10^{-12}$.
# 2. Write the update alone, $s B A x$ without $W_0 x$, as a `torch.autograd.Function` that keeps $X$ but not $H$. A right answer passes
#    `torch.autograd.gradcheck` in float64, and keeps exactly $n k$ numbers beside $A$ and $B$.
#
# ## What to remember
#
# - $dA = s B^\top dy\, x^\top$, $dB = s\, dy\, (A x)^\top$, $dx = W_0^\top dy + s A^\top B^\top dy$.
# - The hooks keep $X$ and $H$: $n (k + r)$ numbers. $X$ alone is enough, and full fine-tuning keeps $X$ too. So an adapter
#   does not reduce the memory of activations of its linear.
# - LoRA reduces the memory of gradients and of the optimizer: $r (d + k)$ numbers are trained instead of $d k$.
#
# ## Sources
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685, section 4.2.
# - Rumelhart, Hinton and Williams 1986, *Learning representations by back-propagating errors*, Nature 323.
