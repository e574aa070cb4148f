# %% [markdown]
# # 1 · A linear, a hook, two small matrices
#
# **You learn** what LoRA adds to a linear layer, how a forward hook adds it without a change of the model, and why the rank r
# limits what the update can be.
#
# **Time:** less than a minute on two cores, longer if they are busy. **Read:** `lora_blip/lora/layer.py`, which this lesson rewrites in 20 lines.
# `Site` is in `lora_blip/lora/sites.py`.
#
# ## The equation
#
# A linear layer computes $y = W_0 x + b$. $W_0$ has $d$ rows and $k$ columns: $k$ input features, $d$ output features.
# Fine-tuning usually changes all $d \cdot k$ numbers of $W_0$. LoRA freezes them. It trains two small matrices instead,
# $A$ of shape $r \times k$ and $B$ of shape $d \times r$ (Hu et al. 2021: equation 3, and the factor $\alpha / r$ in the text below it):
#
# $$y = W_0 x + b + \frac{\alpha}{r} \, B A x$$
#
# $r$ is the *rank*, and $\alpha$ is a constant factor. The pair $A$, $B$ is called an *adapter*. The adapter of a whole model is all
# its pairs. At the start, $A$ is random and $B$ is zero. The paper draws $A$ from a Gaussian. This code, and by default peft (Hugging
# Face's library for LoRA), draw it from a uniform distribution (Kaiming-uniform).

# %%
import torch
from lesson_tools import SEED, record, show
from matplotlib import pyplot as plt
from torch import nn
from torch.nn import functional as F

from lora_blip.lora.layer import AdapterStack, LoRA, Site, lora_hook

# %% [markdown]
# ## LoRA in 20 lines
#
# PyTorch stores a batch as rows: `x` has the shape (batch, k), and `F.linear(x, A)` computes $x A^\top$, which is $A x$ for each
# row. The module has the two matrices. The hook runs after the linear. What it returns replaces the output of the linear.


# %%
class MyLoRA(nn.Module):
    def __init__(self, k, d, r, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.empty(r, k))
        self.B = nn.Parameter(torch.zeros(d, r))
        self.scale = alpha / r
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # the same as nn.Linear: uniform in ±1/√k

    def forward(self, x):  # (batch, k) → (batch, d)
        return F.linear(F.linear(x, self.A), self.B) * self.scale


def my_hook(linear, args, output):
    return output + linear.my_lora(args[0])


def add_my_lora(linear, r, alpha):
    linear.requires_grad_(False)
    linear.my_lora = MyLoRA(linear.in_features, linear.out_features, r, alpha)
    linear.register_forward_hook(my_hook)
    return linear.my_lora


# %% [markdown]
# ## The same, from `lora_blip`
#
# Three differences matter here. A linear can have several adapters, so they are in an `AdapterStack`. A `Site` contains the name
# of the linear, r and α. Here the name is only a label. The hook also accepts an input that is given by keyword. `layer.py`
# contains more, such as dropout and merged adapters. This lesson does not use them.


# %%
def add_lora(linear, r, alpha):
    linear.requires_grad_(False)
    linear.lora = AdapterStack()
    linear.lora["default"] = LoRA(Site("fc", r=r, alpha=alpha), linear.in_features, linear.out_features)
    linear.register_forward_hook(lora_hook, with_kwargs=True)
    return linear.lora["default"]


k, d, r, alpha, batch = 64, 96, 4, 8.0, 10
x = torch.randn(batch, k)
results = []
for add in (add_my_lora, add_lora):
    torch.manual_seed(SEED)  # the same W₀ and the same A
    linear = nn.Linear(k, d)
    before = linear(x)
    lora = add(linear, r, alpha)
    assert torch.equal(linear(x), before)  # B = 0: a new adapter changes no bit
    nn.init.normal_(lora.B)
    y = linear(x)
    y.square().mean().backward()
    results.append((y, lora.A.grad, lora.B.grad))
for own, library in zip(*results, strict=True):
    assert torch.equal(own, library)  # outputs and gradients have the same bits
print("outputs and gradients: bit-equal to lora_blip.lora.layer")

# %% [markdown]
# ## The update is a matrix
#
# $B A$ is a matrix of the shape of $W_0$. With $\Delta W = \frac{\alpha}{r} B A$, the equation becomes
# $y = (W_0 + \Delta W) x + b$. The two forms differ only by rounding. $A$ and $B$ have $r (d + k)$ trained numbers together, and
# $\Delta W$ has $d k$ numbers.

# %%
delta = alpha / r * lora.B @ lora.A
merged = F.linear(x, linear.weight + delta, linear.bias)
assert torch.allclose(merged, y, rtol=1e-4, atol=1e-5)
assert torch.linalg.matrix_rank(delta) == r  # d · k entries, but only r independent rows

trained = sum(p.numel() for p in linear.parameters() if p.requires_grad)
assert trained == r * (d + k)
print(f"trained: {trained} numbers of A and B, {trained / linear.weight.numel():.0%} of the {linear.weight.numel()} of W₀")

# %% [markdown]
# ## What the rank limits
#
# Suppose that the task needs the weight $W_0 + \Delta W^\star$, and that $\Delta W^\star$ has rank 4. We train $A$ and $B$ with
# r = 1, 2, 4 and 8, so that the outputs become those of this weight. The inputs are the $k$ unit vectors. So the summed squared
# error is $\|\Delta W - \Delta W^\star\|_F^2$. The Frobenius norm $\|\cdot\|_F$ is the root of the sum of all squared entries.
#
# Let $\sigma_i$ be the singular values of $\Delta W^\star$. No matrix of rank $r$ has a smaller error than
# $\sum_{i > r} \sigma_i^2$ (the theorem of Eckart, Young and Mirsky). We divide the error by $\|\Delta W^\star\|_F^2$: 1 means that
# nothing is learned.

# %%
target = torch.randn(d, 4) @ torch.randn(4, k) / 8
sigma = torch.linalg.svdvals(target)
curves, bounds = {}, {}
for rank in (1, 2, 4, 8):
    torch.manual_seed(SEED)
    linear, inputs = nn.Linear(k, d), torch.eye(k)
    lora = add_lora(linear, rank, alpha=2.0 * rank)  # α/r = 2 for each rank
    outputs = F.linear(inputs, linear.weight + target, linear.bias)
    optimizer = torch.optim.Adam(lora.parameters(), lr=0.01)
    curves[rank] = []
    for _ in range(400):
        loss = (linear(inputs) - outputs).square().sum() / target.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curves[rank].append(loss.item())
    bounds[rank] = (sigma[rank:].square().sum() / target.square().sum()).item()
    record(f"error with r = {rank}", curves[rank][-1])
    record(f"lowest error that is possible with r = {rank}", bounds[rank])
    assert bounds[rank] - 1e-5 <= curves[rank][-1] <= bounds[rank] + 0.01

figure, axes = plt.subplots()
for rank, curve in curves.items():
    (line,) = axes.plot(curve, label=f"r = {rank}")
    axes.axhline(bounds[rank], color=line.get_color(), linestyle=":", linewidth=1)
axes.set(xlabel="optimizer steps", ylabel="squared error, share of the start", title="A change of rank 4 needs r = 4")
axes.legend()
show(figure, "rank")

# %% [markdown]
# The dotted lines are the lowest possible errors. With r = 1 and r = 2, training ends there. With r = 4 and r = 8, the lowest
# error is zero up to rounding, because $B A$ with r = 8 can also have rank 4. Training ends
# close to zero with both: 400 steps of Adam do not reach the minimum exactly. Lesson 5 asks which rank the captions of cubes need.
#
# ## Exercises
#
# 1. Put two adapters on one linear, in the same `AdapterStack`, both with a random B. A right answer shows that the output equals
#    $(W_0 + \Delta W_1 + \Delta W_2) x + b$ up to rounding, and that the sum has the rank $r_1 + r_2$.
# 2. Add an adapter to an `nn.Conv2d` with a 1 × 1 kernel: it computes the same linear for each pixel. Write the hook. A right answer
#    equals a convolution with the kernel $W_0 + \Delta W$, up to rounding.
#
# ## What to remember
#
# - LoRA trains $A$ and $B$, in total $r (d + k)$ numbers, and leaves $W_0$ unchanged.
# - A forward hook adds $\frac{\alpha}{r} B A x$ to the output. The code of the model does not change.
# - $\Delta W$ has rank at most $r$. This limits what LoRA can learn, and it is the reason why an adapter has few numbers.
#
# ## Sources
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685, section 4.1.
# - Eckart and Young 1936, *The approximation of one matrix by another of lower rank*, Psychometrika 1.
