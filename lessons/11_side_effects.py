# %% [markdown]
# # 11 · Side effects
#
# **You learn** what an adapter for cubes does to the captions of other images, whether full fine-tuning forgets less or more,
# and what an intruder dimension is.
#
# **Time:** one to two minutes on two cores, longer if they are busy.
#
# **Read:** `intruder_dimensions` and `closest_cosines` in `lora_blip/lora/spectrum.py`.
#
# The base knows flat circles, squares and triangles: it was trained on images such as those of `toyworld/scenes.py`. We train it
# on 300 images of cubes, which it has never seen, with LoRA and with full fine-tuning. Both have the same batches. Then we test
# both on new cubes, and on new images of flat shapes.

# %%
import random

import lesson_tools  # first: it sets the paths and the number of threads
import torch
from lesson_tools import ROOT, SEED, record, show
from matplotlib import pyplot as plt

import lora_blip
from lora_blip.lora.spectrum import closest_cosines, intruder_dimensions
from toyworld.scenes import flat_scene, render_flat

STEPS, BATCH, TESTS, WHEN = 80, 8, 100, (20, 30, 40, 60, 80)


def load():
    torch.manual_seed(SEED)
    return lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")


base = load()


def encode(images, captions):
    """Return the pixels (images, 3, 96, 96), and the token ids and their mask, both (images, tokens)."""
    tokens = lesson_tools.tokenize(base, captions)
    return base.image_processor(images, return_tensors="pt").pixel_values, tokens.input_ids, tokens.attention_mask


rng = random.Random(f"lesson 11, seed {SEED}")
scenes = [flat_scene(rng) for _ in range(TESTS)]
flat = encode([render_flat(scene, rng)[0] for scene in scenes], [scene.caption("shape") for scene in scenes])
test, train_set = encode(*lesson_tools.test_cubes(TESTS)), encode(*lesson_tools.cubes())
NOUNS = torch.tensor(base.tokenizer.convert_tokens_to_ids(["circle", "square", "triangle", "shape"]))


# %% [markdown]
# ## The score
#
# Greedy generation takes the most probable token each time. So a greedy caption is right if the most probable token is the correct one
# at each position, given the correct tokens before it. One forward pass with the correct caption shows this, without
# generation. A cell below compares this score with that of generated captions.
#
# The second score ignores the nouns *circle*, *square*, *triangle* and *shape* (of "no shape is present in the image"): at their
# places, every token counts as right.
# The model still reads the correct nouns before each next word. So this second score is not that of a generated caption.


# %%
def next_tokens(backbone, data):
    """Return the most probable next token after each token but the last, (images, tokens − 1)."""
    with torch.no_grad():
        return backbone.model.eval()(pixel_values=data[0], input_ids=data[1], attention_mask=data[2]).logits[:, :-1].argmax(2)


def exact(backbone, data):
    """Return the share of captions with every token right, and the share with every token right except the nouns."""
    _, ids, mask = data
    right = (next_tokens(backbone, data) == ids[:, 1:]) | (mask[:, 1:] == 0)  # position i predicts token i + 1
    return [rows.all(1).float().mean().item() for rows in (right, right | torch.isin(ids[:, 1:], NOUNS))]


for name, data in (("cubes", test), ("flat shapes", flat)):
    record(f"base, {name}", exact(base, data)[0])
assert exact(base, flat)[0] > 0.95 and exact(base, test)[0] < 0.05

# %% [markdown]
# ## LoRA and full fine-tuning
#
# LoRA trains A and B on all linears in the layers of the ViT and of the text model. The other weights stay frozen, such as those
# of the head that predicts the words. Full fine-tuning trains every parameter. The update of a weight is the difference to the
# base in both cases:
#
# $$\Delta W = W' - W_0,$$
# $$\text{for LoRA}\quad \Delta W = \frac{\alpha}{r} B A.$$
#
# (`bake` adds ΔW to W₀ and removes the adapter. Lesson 7 checks this sum.) Each method has its own peak learning rates η (with warm-up
# and a fall to nearly zero; gradients are clipped to norm 1). LoRA: 0.001, 0.003, 0.01. Full: 0.0001, 0.0003. LoRA with η = 0.01 is not stable: its score on the cubes differs much between runs. In the other four
# runs, the cubes are learned. During the training we measure the scores.


# %%
def train(method, lr):
    """Train on the cubes. Return the backbone with merged weights, and [step, cubes, flat shapes, flat without nouns]."""
    backbone = load()
    if method == "LoRA":
        lora_blip.inject(backbone, "vit,text", r=8, alpha=32.0)
    else:
        backbone.model.requires_grad_(True)
    trained = [parameter for parameter in backbone.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=STEPS, pct_start=0.25, cycle_momentum=False)
    order = torch.cat([torch.randperm(300, generator=torch.Generator().manual_seed(SEED + epoch)) for epoch in range(3)])
    scores = [[0, exact(base, test)[0], *exact(base, flat)]]
    for step in range(STEPS):
        pixels, ids, mask = (tensor[order[step * BATCH : (step + 1) * BATCH]] for tensor in train_set)
        labels = ids.masked_fill(mask == 0, -100)
        backbone.model.train()(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step + 1 in WHEN:
            scores.append([step + 1, exact(backbone, test)[0], *exact(backbone, flat)])
    if method == "LoRA":
        lora_blip.bake(backbone)
    return backbone, torch.tensor(scores)


RUNS = [("LoRA", 1e-3), ("LoRA", 3e-3), ("LoRA", 1e-2), ("full", 1e-4), ("full", 3e-4)]
trained, scores = {}, {}
for run in RUNS:
    trained[run], scores[run] = train(*run)
    for name, value in zip(("cubes", "flat shapes", "flat shapes without nouns"), scores[run][-1, 1:].tolist(), strict=True):
        record(f"{run[0]}, η = {run[1]:g}: {name}", value)

# %% [markdown]
# These statements hold for the seeds 0, 1 and 2 (`lessons/spread.md` has all numbers). The next cell
# asserts them. It does not assert exact scores, because these depend on the run. (The picture at the end shows the scores after 0, 20, 30,
# 40, 60 and 80 steps. A run starts at the upper left, and 30 is written beside its point of step 30.)
#
# - With η = 0.001 and 0.003, LoRA writes more than 85 % of the captions of cubes correctly. But it loses more than half of the
#   captions of flat shapes.
#   With η = 0.003 it loses nearly all of them: it calls nearly every shape a *cube*.
# - The other words remain right. Given the correct nouns, more than 90 % of the captions of flat shapes have all other words right.
#   So the model still sees the colours and the positions.
# - Full fine-tuning forgets too. In each run, we look only at the measured steps with at least 85 % of the cubes right. The best
#   step of the run is the one among them with the most flat shapes right. A run without such a step is left out. We
#   compare the runs at their best steps: every run of full fine-tuning keeps more flat shapes than every run of LoRA. (The test
#   images choose this step, for both methods in the same way.) But these steps are not equally good on the cubes: with only five measured steps, their
#   scores can be anything from 85 % to 100 %. The result also depends on the learning rates, and we tried only a few.
#   This result is the opposite of "LoRA Learns Less and Forgets Less" (Biderman et al. 2024, on code and mathematics). Shuttleworth
#   et al. (below) also find that LoRA forgets less. Do not generalize
#   from this tiny model.
# - A larger learning rate forgets more, until nearly no flat shape is right. With η = 0.01, LoRA also damages the other words. Its score
#   on the cubes is not stable either: 61 %, 54 % and 20 % with the three seeds of `lessons/spread.md`. On other machines, which round differently, we
#   saw scores from 5 % to 94 %.

# %%
end = {run: dict(zip(("cubes", "flat", "without nouns"), scores[run][-1, 1:].tolist(), strict=True)) for run in RUNS}
for run in RUNS:
    if reached := [row[2] for row in scores[run].tolist() if row[1] >= 0.85]:
        end[run]["best flat"] = max(reached)
        record(f"{run[0]}, η = {run[1]:g}: best flat shapes with 85 % of the cubes or more", end[run]["best flat"])
# generated captions have the same score
assert abs(lesson_tools.exact_match(model=trained["LoRA", 1e-2], count=TESTS) - end["LoRA", 1e-2]["cubes"]) < 0.011
for run in (("LoRA", 1e-3), ("LoRA", 3e-3), ("full", 1e-4), ("full", 3e-4)):
    assert end[run]["cubes"] > 0.85 and end[run]["flat"] < 0.8 and end[run]["without nouns"] > 0.9, end[run]
words = next_tokens(trained["LoRA", 3e-3], flat)[torch.isin(flat[1][:, 1:], NOUNS)]  # in the place of a noun
share = (words == base.tokenizer.convert_tokens_to_ids("cube")).float().mean().item()
record("LoRA, η = 0.003: nouns of flat shapes that become cube", share)
assert min(end[r]["best flat"] for r in RUNS if "full" in r) > max(end[r].get("best flat", 0) for r in RUNS if "LoRA" in r)
assert share > 0.9 and end["LoRA", 3e-3]["flat"] < 0.05 < end["LoRA", 1e-3]["flat"] < 0.5
assert end["full", 3e-4]["flat"] < end["full", 1e-4]["flat"]
assert end["LoRA", 1e-2]["without nouns"] < end["LoRA", 3e-3]["without nouns"]

# %% [markdown]
# ## Intruder dimensions
#
# The left singular vectors of a weight are directions of its output. Compare those of W' = W₀ + ΔW with those of W₀. For each of the
# ten uᵢ' of W' with the largest singular values, take the largest absolute cosine with any uⱼ of W₀:
#
# $$\rho_i = \max_j |u_i'^\top u_j|.$$
#
# If ρᵢ < 0.5, uᵢ' is an intruder dimension: a strong direction of the new weight that was no direction of the old one
# (Shuttleworth et al. 2024, algorithm 1; in peft, `peft.tuners.lora.intruders.reduce_intruder_dimension` uses the same rule). The cell counts them in all 46
# linears with adapters, so among 460 vectors.
#
# All three updates of LoRA are larger than those of full fine-tuning. To separate size and rank, the cell also scales each ΔW of
# full fine-tuning (η = 0.0001) to the norm that the ΔW of LoRA with η = 0.01 has in the same linear.

# %%
names = list(lora_blip.inject(load(), "vit,text"))


def weights(backbone):
    return [backbone.model.get_submodule(name).weight.detach() for name in names]


W0s = weights(base)
updates = {run: [W - W0 for W, W0 in zip(weights(trained[run]), W0s, strict=True)] for run in RUNS}
big = [d * lora.norm() / d.norm() for d, lora in zip(updates["full", 1e-4], updates["LoRA", 1e-2], strict=True)]
updates["full, scaled", 1e-4] = big
cosines, intruders, sizes = {}, {}, {}
for (method, lr), deltas in updates.items():
    cosines[method, lr] = torch.cat([closest_cosines(W0, delta) for W0, delta in zip(W0s, deltas, strict=True)])
    intruders[method, lr] = int((cosines[method, lr] < 0.5).sum())
    sizes[method, lr] = (sum(delta.square().sum() for delta in deltas) / sum(W0.square().sum() for W0 in W0s)).sqrt()
    record(f"{method}, η = {lr:g}: intruders of {len(cosines[method, lr])}", intruders[method, lr])
    record(f"{method}, η = {lr:g}: norm of ΔW / norm of W₀", sizes[method, lr])
for W0, delta, rho in zip(W0s, updates["LoRA", 1e-2], cosines["LoRA", 1e-2].split(10), strict=True):
    U0, U = (torch.linalg.svd(W.double(), full_matrices=False)[0] for W in (W0, W0 + delta))
    # the equation, and the library's count
    assert torch.allclose(rho, (U[:, :10].T @ U0).abs().amax(1), atol=1e-3)
    assert (rho < 0.5).sum() == intruder_dimensions(W0, delta)
assert intruders["full, scaled", 1e-4] > intruders["LoRA", 1e-2] > 5 * intruders["LoRA", 3e-3] > 0
assert intruders["LoRA", 1e-3] > 0 == intruders["full", 1e-4] == intruders["full", 3e-4]
assert sizes["LoRA", 1e-3] > sizes["full", 3e-4]

# %% [markdown]
# LoRA has intruders, and full fine-tuning has none. This agrees with the paper. But the learning rate matters too: with η = 0.01,
# LoRA has more than five times as many as with η = 0.003. And the update of full fine-tuning that is scaled to the norms of
# η = 0.01 has even more intruders than LoRA with η = 0.01. So in this model, much of the difference is the size of the update.
#
# ## A smaller update
#
# We can add only a part of the update to W₀: W₀ + c ΔW, with c from 0 to 1. With c = 0 it is the base, and with c = 1 the trained model. No training is needed.
# (Wortsman et al. 2021 interpolate the weights of fully fine-tuned models in this way.)
#
# We try c = 0.5 and 0.75 for LoRA with η = 0.001. With c = 0.5, fewer flat shapes are forgotten, and fewer captions of cubes are right. How good the
# trade is depends on the seed. Compare it with full fine-tuning at its best step with at least 85 % of the cubes (see above). Consider
# only the values of c with at least 85 % of the cubes right. In two of the three seeds, one of them keeps more flat shapes than full
# fine-tuning with η = 0.0003. In no seed does one of them keep as many as full fine-tuning with η = 0.0001.

# %%
mixed, parts = load(), {}
for c in (0.5, 0.75, 1.0):
    for name, W0, delta in zip(names, W0s, updates["LoRA", 1e-3], strict=True):
        mixed.model.get_submodule(name).weight.data = W0 + c * delta
    parts[c] = exact(mixed, test)[0], exact(mixed, flat)[0]
    record(f"LoRA, η = 0.001, c = {c}: cubes", parts[c][0])
    record(f"LoRA, η = 0.001, c = {c}: flat shapes", parts[c][1])
assert parts[0.5][1] > parts[1.0][1] and parts[0.5][0] < parts[1.0][0]

# %%
figure, panels = plt.subplots(2, 1, figsize=(5, 7.5))
for number, ((method, lr), values) in enumerate(cosines.items()):
    style = {"color": f"C{number}", "linestyle": "-" if method == "LoRA" else "--"}
    if (method, lr) in scores:
        panels[0].plot(*(100 * scores[method, lr][:, 1:3].T), marker="o", markersize=5, label=f"{method}, η = {lr:g}", **style)
        panels[0].annotate("30", 100 * scores[method, lr][2, 1:3], (4, 4), textcoords="offset points", color=style["color"])
    label = f"{method}, η = {lr:g}" if method != "full, scaled" else "full, as large as LoRA 0.01"
    panels[1].plot(torch.linspace(0, 100, len(values)), values.sort().values, label=label, **style)
panels[0].set(xlabel="new cubes, exact captions (%)", ylabel="flat shapes, exact captions (%)", title="Learning and forgetting")
panels[0].legend(fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1.1))
panels[1].axhline(0.5, color="grey", linewidth=1)
panels[1].set(xlabel="singular vectors of W', sorted (%)", ylabel="largest cosine with one of W₀", ylim=(0, 1.05))
panels[1].set_title("Below the line: intruder dimensions")
panels[1].legend(fontsize=9, loc="lower right")
show(figure, "forgetting")

# %% [markdown]
# ## Exercises
#
# 1. Train LoRA with η = 0.003 and replay: two of the eight images in each batch are flat shapes, which are not in the test.
#    `lesson_tools.tokenize(…, length=16)` gives the captions of both the same length. A right answer shows that much less is
#    forgotten, and that cubes are still learned.
# 2. Take LoRA with η = 0.003 and multiply the singular value of each intruder by c = 0.75, 0.5 and 0. The paper reports that a
#    model with smaller intruders forgets less, and that the new task suffers little. A right answer shows whether this holds here.
#    (In peft, `reduce_intruder_dimension` does the same, and then cuts the new update to rank r. Its `mitigation_lambda` is c:
#    the code of peft 0.21.2 multiplies by it. Its docstring says the opposite: a higher value subtracts more.)
#
# ## What to remember
#
# - A small adapter can change nearly all captions of the old task. Measure the old task too, not only the new one.
# - Forgetting grows with the learning rate, for LoRA and for full fine-tuning. Replay, or a smaller c, keeps more of the base.
# - An intruder dimension is a strong singular vector of W' that W₀ did not have. Their number grows with the size of the update.
#
# ## Sources
#
# - Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, arXiv:2410.21228
# - Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, arXiv:2405.09673
# - Wortsman et al. 2021, *Robust Fine-Tuning of Zero-Shot Models*, arXiv:2109.01903
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685
