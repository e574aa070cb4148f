# %% [markdown]
# # 4 · α, r and the learning rate
#
# **You learn** how the size of an update depends on r, what changes if α/√r replaces α/r, and which settings give the
# same run, for SGD and for Adam.
#
# **Time:** less than a minute on two cores, longer if they are busy.
#
# **Read:** `lora_blip/lora/layer.py`. The factor of this lesson is `self.scale` in `LoRA.__init__`. The settings are in
# `lora_blip/config.py`.
#
# LoRA (arXiv:2106.09685, section 4.1) computes
#
# $$y = W_0 x + s \cdot B A x,$$
# $$s = \frac{\alpha}{r},$$
# $$A: (r, k), \quad B: (d, r).$$
#
# At the start, B is zero and A has random values A₀. In this library, the entries of A₀ are uniform between −1/√k and
# 1/√k. Their variance is 1/(3k). The learning rate is η.

# %%
import lesson_tools  # first: it sets the paths and the number of threads
import matplotlib.pyplot as plt
import numpy as np
import torch
from lesson_tools import ROOT, SEED, show

import lora_blip

backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
model = backbone.model.eval()  # eval: no dropout, so every difference comes from the settings
images, captions = lesson_tools.cubes(16)
pixels = backbone.image_processor(images, return_tensors="pt").pixel_values  # (16, 3, 96, 96)
tokens = lesson_tools.tokenize(backbone, captions)  # input_ids, attention_mask and labels


def loss():
    return model(pixel_values=pixels, **tokens).loss


def new_adapters(r, alpha):
    """Put adapters with the same seed on the linears of the ViT."""
    lora_blip.eject(backbone)
    torch.manual_seed(SEED)
    return lora_blip.inject(backbone, "vit", r=r, alpha=alpha)


def parameters(adapters):
    return [parameter for lora in adapters.values() for parameter in (lora.A, lora.B)]


# %% [markdown]
# ## The first update
#
# Let G = ∂L/∂W be the gradient of the loss with respect to a full weight, shape (d, k). (In lesson 3, G is dYᵀX.) With
# H = X A₀ᵀ, lesson 3 gives dB = s dYᵀH = s G A₀ᵀ and dA = s Bᵀ dYᵀX = s BᵀG. With B = 0, only the gradient of B is not zero:
#
# $$\frac{\partial L}{\partial B} = s\, G A_0^\top,$$
# $$\frac{\partial L}{\partial A} = s\, B^\top G = 0.$$
#
# One step of SGD gives B₁ = −η ∂L/∂B. The first step of Adam divides each entry of a gradient by its own absolute value
# (arXiv:1412.6980, algorithm 1, with ε → 0), so B₁ = −η sign(∂L/∂B). After the first step,
#
# $$\Delta W_{\text{SGD}} = -\eta\, s^2\, G A_0^\top A_0,$$
# $$\Delta W_{\text{Adam}} = -\eta\, s\, \mathrm{sign}(G A_0^\top)\, A_0.$$
#
# The cell below trains one step with each optimizer and compares ΔW with these formulas.

# %%
linears = {name: model.get_submodule(name) for name in new_adapters(8, 32)}
lora_blip.eject(backbone)
weights = [linear.weight.requires_grad_(True) for linear in linears.values()]
G = dict(zip(linears, torch.autograd.grad(loss(), weights), strict=True))  # {name: (d, k)}


def assert_close(actual, expected):
    assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


for optimizer_class, options in ((torch.optim.SGD, {}), (torch.optim.Adam, {"eps": 1e-20})):
    adapters = new_adapters(8, 32)  # s = 4; inject freezes the full weights again
    optimizer = optimizer_class(parameters(adapters), lr=1e-3, **options)
    loss().backward()
    start = {name: (lora.A.detach().clone(), lora.B.grad.clone()) for name, lora in adapters.items()}
    optimizer.step()
    for name, lora in adapters.items():
        A0, gradient = start[name]  # of B
        assert_close(gradient, lora.scale * G[name] @ A0.T)
        step = gradient if optimizer_class is torch.optim.SGD else gradient.sign()
        assert_close(lora.delta_weight(), -1e-3 * lora.scale * step @ A0)
        assert torch.equal(lora.A, A0)  # ∂L/∂A = 0: the first step does not change A

# %% [markdown]
# ## How does its size depend on r?
#
# We measure two sizes for r = 1, 2, 4, … 64:
#
# - the Frobenius norm ‖ΔW‖ (lesson 1) of the updates of all linears of the ViT together,
# - the gain −⟨G, ΔW⟩, which is the decrease of the loss to first order in η. ⟨G, ΔW⟩ is the sum of the products of their
#   entries.
#
# The gain of SGD is η s² ‖G A₀ᵀ‖². ‖G A₀ᵀ‖² is a sum over the r rows of A₀, and each row adds ‖G‖²/(3k) on average. So the gain
# grows like s² r. The gain of Adam is η s times the sum of |G A₀ᵀ| over all d·r entries. So it grows like s r.
#
# ΔW is a sum of r parts, one for each row of A₀. If r is much smaller than k, these random rows are nearly orthogonal, so
# the parts are nearly orthogonal too. Then their squared norms add, and the norm grows like s² √r (SGD) and s √r (Adam). With s = α/r and s = α/√r this predicts powers of r:
#
# | first update | norm, α/r | norm, α/√r | gain, α/r | gain, α/√r |
# |---|---|---|---|---|
# | SGD | −3/2 | −1/2 | −1 | 0 |
# | Adam | −1/2 | 0 | 0 | 1/2 |
#
# The largest r here is 64. Three of the four linears of a layer have k = 128, which is only twice as large. So the prediction is
# approximate. The cell asserts that each power is within 0.2 of the table.

# %%
RANKS = [1, 2, 4, 8, 16, 32, 64]
PREDICTED = {  # (optimizer, power of r in the denominator of s) → powers of r of the norm and of the gain
    ("SGD", 1.0): (-1.5, -1.0), ("SGD", 0.5): (-0.5, 0.0), ("Adam", 1.0): (-0.5, 0.0), ("Adam", 0.5): (0.0, 0.5),
}  # fmt: skip
DRAWS = 8  # the mean over eight draws of A₀


def first_update(optimizer, power, r):
    """Return ‖ΔW‖ and −⟨G, ΔW⟩ over all linears for α = η = 1: root mean square, and mean, over DRAWS."""
    square, gain, s = 0.0, 0.0, 1 / r**power
    for g in G.values():
        A0 = (2 * torch.rand(DRAWS, r, g.shape[1]) - 1) / g.shape[1] ** 0.5
        grad_B = s * g @ A0.mT
        delta = -s * (grad_B if optimizer == "SGD" else grad_B.sign()) @ A0
        square += delta.square().sum().item() / DRAWS
        gain -= (g * delta).sum().item() / DRAWS
    return square**0.5, gain


torch.manual_seed(SEED)
sizes = {key: np.array([first_update(*key, r) for r in RANKS]) for key in PREDICTED}  # (ranks, 2)
for key, values in sizes.items():
    slopes = [np.polyfit(np.log(RANKS), np.log(values[:, column]), 1)[0] for column in (0, 1)]
    print(f"{key[0]:<5} s = {'α/r' if key[1] == 1 else 'α/√r':<5} power of r: norm {slopes[0]:+.2f}, gain {slopes[1]:+.2f}")
    assert np.allclose(slopes, PREDICTED[key], atol=0.2), (key, slopes)

# %%
figure, panels = plt.subplots(2, 1, figsize=(5, 7), layout="constrained")
for column, axis in enumerate(panels):
    for (optimizer, power), values in sizes.items():
        style = {"color": "C0", "marker": "s", "markersize": 9} if optimizer == "SGD" else {"color": "C1", "marker": "o"}
        style |= {"linestyle": "-" if power == 1 else "--", "fillstyle": "none"}
        label = f"{optimizer}, {'α/r' if power == 1 else 'α/√r'}"
        axis.loglog(RANKS, values[:, column] / values[0, column], label=label, **style)
    axis.set(ylabel=f"{('norm of ΔW', 'gain')[column]}, relative to r = 1", xticks=RANKS, xticklabels=RANKS)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
panels[0].set_title("The first update: α/√r keeps Adam's norm,\nα/r keeps Adam's gain")
panels[1].set(xlabel="rank r")
panels[1].legend()
show(figure, "first_update")

# %% [markdown]
# No rule keeps both sizes, and the two optimizers differ. With α/√r, called rsLoRA (arXiv:2312.03732; in peft,
# `use_rslora=True`; in `lora_blip.inject`, `variant="rslora"`), Adam's update
# keeps its norm, and SGD's update keeps its gain. With α/r, Adam's update keeps its gain.
#
# ## Ten steps of training
#
# The table predicts the first step only. We now train ten steps with Adam, for r = 1, 8 and 64, with both rules. Both
# have s = 4 at r = 8.

# %%


def train(adapters, optimizer_class, lr, init=1.0, steps=5, of_b=None, **options):
    """Train on the batch. Return the loss before each step and after the last one, and all ΔW as one vector.

    init: a factor of A₀. of_b: options of the optimizer for B only.
    """
    with torch.no_grad():
        for lora in adapters.values():
            lora.A.mul_(init)
    all_a, all_b = zip(*((lora.A, lora.B) for lora in adapters.values()), strict=True)
    optimizer = optimizer_class([{"params": all_a}, {"params": all_b} | (of_b or {})], lr=lr, **options)
    losses = [loss()]
    for _ in range(steps):
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        losses.append(loss())
    return [value.item() for value in losses], torch.cat([lora.delta_weight().detach().flatten() for lora in adapters.values()])


after = {}
for rule in ("α/r", "α/√r"):
    for r in (1, 8, 64):
        alpha = 32 if rule == "α/r" else 32 * (r / 8) ** 0.5  # `new_adapters` divides by r, so α must grow like √r
        losses, delta = train(new_adapters(r, alpha), torch.optim.Adam, lr=3e-3, steps=10)
        after[rule, r] = losses[-1], delta.norm().item()
        print(f"s = {rule:<5} r = {r:<3} loss {losses[0]:.2f} → {losses[-1]:.2f}, norm of ΔW {delta.norm():.1f}")

loss_of, norm_of = ({key: value[index] for key, value in after.items()} for index in (0, 1))
assert 3 < norm_of["α/r", 1] / norm_of["α/r", 64] < 8  # 64^½ = 8 at the first step
assert 0.7 < norm_of["α/√r", 1] / norm_of["α/√r", 64] < 1.4
assert max(loss_of["α/r", r] for r in (1, 8, 64)) < 1.3 * min(loss_of["α/r", r] for r in (1, 8, 64))
assert loss_of["α/√r", 1] > 1.4 * loss_of["α/√r", 8] > 1.4 * 1.3 * loss_of["α/√r", 64]

# %% [markdown]
# The pattern remains. With α/r, the loss after ten steps depends little on r, but the norm of ΔW falls. With α/√r,
# the norm depends little on r, but a larger r learns faster. This matters when you compare ranks after a short
# training: the result may come from the rule for s, and not from the ranks. Lesson 5 shows this for whole runs.
#
# ## Which settings give the same run?
#
# Replace A by A/√c, B by B/√c and s by c·s. Then s·B A is the same matrix. The gradients of A and B become √c times
# larger. The run stays the same if each step of A and B becomes √c times smaller:
#
# - SGD multiplies the larger gradients by the learning rate. It needs η/c.
# - Adam divides each entry of a gradient by its size. It needs η/√c (and √c·ε).
#
# | | α | η | A₀ | loss, and ΔW |
# |---|---|---|---|---|
# | SGD | c·α | η/c | A₀/√c | the same |
# | Adam | c·α | η/√c | A₀/√c | the same |
#
# The LoRA paper states the second row in words: "tuning α is roughly the same as tuning the learning rate if we scale
# the initialization appropriately" (section 4.1). With c = 4, all factors are powers of two, so the results have the
# same bits. The cell compares the loss of every step, and ΔW after the last step.

# %%
EPS = 1e-8
sgd = train(new_adapters(8, 32), torch.optim.SGD, lr=0.02)
same_sgd = train(new_adapters(8, 4 * 32), torch.optim.SGD, lr=0.02 / 4, init=0.5)
adam = train(new_adapters(8, 32), torch.optim.Adam, lr=2e-3, eps=EPS)
same_adam = train(new_adapters(8, 4 * 32), torch.optim.Adam, lr=2e-3 / 2, init=0.5, eps=2 * EPS)
for one, other in ((sgd, same_sgd), (adam, same_adam)):
    assert one[0] == other[0]  # every loss
    assert torch.equal(one[1], other[1])  # every element of ΔW

# %% [markdown]
# In practice the size of A₀ is fixed: no setting of this library scales it. Then α and η are two settings. Multiply α by c and keep A₀.
# The run is still the same if A and B have different options of Adam: η and ε for A, and η/c and c·ε for B.
# If both have the learning rate η/c, A learns c times more slowly. We measure how different this run is after five steps.

# %%
OF_B = {"lr": 2e-3 / 4, "eps": 4 * EPS}
same = train(new_adapters(8, 4 * 32), torch.optim.Adam, lr=2e-3, eps=EPS, of_b=OF_B)
assert same[0] == adam[0] and torch.equal(same[1], adam[1])
other = train(new_adapters(8, 4 * 32), torch.optim.Adam, **OF_B)  # for A and B
difference = ((other[1] - adam[1]).norm() / adam[1].norm()).item()
print(f"α·4, η/4, the same A₀: ‖ΔW − ΔW'‖ / ‖ΔW‖ = {difference:.2f}; last loss {adam[0][-1]:.2f} and {other[0][-1]:.2f}")
assert 0.1 < difference < 0.4 and other[0][-1] > adam[0][-1]

# %% [markdown]
# ## Why does α/r make sense with Adam?
#
# Write each row of A twice in an adapter with r = 8. Now r = 16, but ΔW still has at most rank 8. With the same α, s is
# halved, and so are the gradients of each copy. The steps of Adam do not change if the gradients and ε are halved together, as in the cell. So each copied
# row of A, and its column of B, learn the same as the original pair. The sum of the two updates, each with s/2, is the update of the adapter with r = 8. So with
# α/r and Adam, this doubled adapter trains in the same way without a new learning rate.
#
# Here the two copies are equal, so their updates have the same direction, and the norm of ΔW does not fall. The random rows
# of the table are nearly orthogonal. For them, only the gain stays when r doubles, and the norm falls by a factor of √2.

# %%
rows = {name: lora.A.detach() for name, lora in new_adapters(8, 32).items()}
twice = new_adapters(16, 32)
for name, lora in twice.items():
    lora.A.data = torch.cat([rows[name], rows[name]])  # (16, k)
doubled = train(twice, torch.optim.Adam, lr=2e-3, eps=EPS / 2)
print("largest difference of a loss:", max(abs(a - b) for a, b in zip(adam[0], doubled[0], strict=True)))
assert torch.allclose(doubled[1], adam[1], atol=1e-2 * adam[1].abs().max())

# %% [markdown]
# ## Exercises
#
# 1. Train rank 8, α = 32, five steps with AdamW, η = 2e-3, ε = 1e-8 and `weight_decay=0.5`. Before each step, clip the norm of
#    all gradients together to 1 (`torch.nn.utils.clip_grad_norm_` with all A and B in one list). For c = 4, α·4, η/2,
#    A₀/2 and 2ε, which weight decay and which clipping norm give the same run? A right answer shows the same losses
#    up to rounding.
# 2. Repeat the last section (each row of A twice, the same α) with SGD. Which learning rate gives the same run? A
#    right answer shows the same losses, and it explains the power −1 of the gain in the table.
#
# ## What to remember
#
# - With Adam, α/r keeps the gain of the first update when r changes, and α/√r keeps its norm. With SGD, α/√r keeps the gain, and
#   neither of the two rules keeps the norm. If you compare ranks, say which rule you use, and why.
# - α and η are two settings because the size of A₀ is fixed. If A₀ were scaled too, one of them would be enough.
# - With Adam and α/r, the gain of the first step stays when r doubles and α and η remain. The norm of ΔW falls by
#   a factor of √2.
#
# ## Sources
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685, section 4.1
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, arXiv:2312.03732
# - Kingma and Ba 2014, *Adam: A Method for Stochastic Optimization*, arXiv:1412.6980
