# %% [markdown]
# # 10 · Does the model use the image?
#
# **You learn** how to measure which words depend on the image, what cross-attention computes, and how far a picture of attention can be
# trusted.
#
# **Time:** less than a minute on two cores, longer if they are busy.
#
# **Read:** `check_image_matters` in `lora_blip/training/preflight.py`. Before each training, it pairs the texts of a batch with
# other images, and stops if the logits remain the same.
#
# A caption model can ignore the image and still write sentences that look right: in these captions, "cube" follows every colour. We
# ask three questions. Does another image change the prediction? Which patches does a word attend to? Which patches change the word if
# they are covered?

# %%
import lesson_tools  # first: it sets the paths and the number of threads
import matplotlib.pyplot as plt
import torch
from lesson_tools import ROOT, record, show

import lora_blip

run = lesson_tools.quick_train(max_steps=120)  # adapters on the ViT; the text decoder and its cross-attention are frozen
backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu", fast=False)  # plain attention returns weights
model = backbone.model
lora_blip.load_adapter(backbone, run)
MODELS = {"base": lambda: lora_blip.disable_adapters(backbone), "adapter": lambda: lora_blip.use_adapters(backbone, "default")}

images, captions = lesson_tools.test_cubes(48)
pixels = backbone.image_processor(images, return_tensors="pt").pixel_values  # (48, 3, 96, 96)
tokens = lesson_tools.tokenize(backbone, captions)
words = tokens.input_ids[:, 1:]  # (48, T): position t predicts word t, from the words before it and the image
is_word = tokens.attention_mask[:, 1:].bool()


@torch.no_grad()
def log_probabilities(pixels, rows=slice(None)):
    """Return the log-probabilities of all tokens, (n, T, vocabulary), if the words before are those of the captions."""
    output = model(pixel_values=pixels, input_ids=tokens.input_ids[rows], attention_mask=tokens.attention_mask[rows])
    return output.logits[:, :-1].log_softmax(-1)


# %% [markdown]
# ## Other images, other predictions
#
# Each caption keeps its text, and gets the image of another row. Let p be the distribution of the next token with the right image, and q
# with the other image. The Kullback-Leibler divergence measures how much q differs from p, in nats (natural logarithm):
#
# $$\mathrm{KL}(p \,\|\, q) = \sum_v p_v \log \frac{p_v}{q_v} \ge 0.$$
#
# It is zero if and only if the other image leaves the distribution as it is. It does not say whether the change is right. For this, we also compare the
# log-probability of the caption, with its own image and with the other.

# %%
kl, gain, score = {}, {}, {}
for which, active in MODELS.items():
    with active():
        own = log_probabilities(pixels)
        divergences, differences = [], []
        for shift in (1, 7, 13):  # three other images for each caption
            other = log_probabilities(pixels.roll(shift, 0))
            divergences.append((own.exp() * (own - other)).sum(-1))  # the equation, for every position
            library = torch.nn.functional.kl_div(other, own, reduction="none", log_target=True).sum(-1)
            assert torch.allclose(divergences[-1], library, atol=1e-4) and divergences[-1].min() > -1e-4
            difference = (own - other).gather(-1, words[..., None])[..., 0]
            differences.append(difference[is_word].sum() / len(images))
        assert torch.equal(log_probabilities(pixels), own)  # the same images: KL = 0
    kl[which], gain[which] = torch.stack(divergences).mean(0), sum(differences).item() / 3
    score[which] = own.gather(-1, words[..., None])[..., 0][is_word].sum().item() / len(images)
    record(f"mean KL of a token, {which}", kl[which][is_word].mean().item())
    record(f"log-probability of a caption, {which}", score[which])
    record(f"and how much it falls with another image, {which}", gain[which])
    assert kl[which][is_word].mean() > 0.5 and gain[which] > 5
assert kl["base"][is_word].mean() > kl["adapter"][is_word].mean() and score["base"] < score["adapter"] - 10

# %% [markdown]
# Both models use the image. The KL of the base is larger, but the base is the worse model: it gives the correct captions a much
# lower probability, because the word "cube" gets a very low one (exercise 1). It has read this word in texts without images, but
# never in a caption. So "the logits change" is a test for a broken model, and not a score.
#
# Which words depend on the image? We average the KL by word.

# %%
names = [backbone.tokenizer.convert_ids_to_tokens(row) for row in words.tolist()]
COLOURS, FIXED = ("red", "orange", "yellow", "green", "blue", "purple"), ("cube", "of", "the", "left")
by_word = {}  # word → model → KL
for word in (*COLOURS, "single", "on", "to", "a", *FIXED):
    at_word = torch.tensor([[name == word for name in row] for row in names]) & is_word
    by_word[word] = {which: kl[which][at_word].mean().item() for which in MODELS}

colours, fixed = (sum(by_word[word]["adapter"] for word in group) / len(group) for group in (COLOURS, FIXED))
record("KL of colours, adapter", colours)
record("KL of cube, of, the, left, adapter", fixed)
assert colours > 5 * fixed and by_word["orange"]["adapter"] < 0.7 * colours
assert min(by_word[word]["adapter"] for word in ("single", "on", "to")) > 2 * fixed
assert min(kl["adapter"][i, r.index("orange")] for i, r in enumerate(names) if {"single", "orange"} <= {*r}) > 0.7 * colours
for first, both in (("an ", "an orange cube"), *((colour, f"{colour} cube") for colour in COLOURS)):
    assert all(text.count(first) == text.count(both) for text in captions)

figure, axes = plt.subplots(figsize=(5, 5.5))
for offset, which in ((0.2, "base"), (-0.2, "adapter")):
    axes.barh([offset - place for place in range(len(by_word))], [value[which] for value in by_word.values()], 0.4, label=which)
axes.set_yticks([-place for place in range(len(by_word))], list(by_word))
axes.set(xlabel="KL between the right and another image (nats)", title="Colours depend on the image, grammar little")
axes.legend(loc=(0.6, 0.1))
show(figure, "words")

# %% [markdown]
# Colours, the number of cubes ("single") and the relation ("on", "to") depend on the image (see the picture). So does "a": for another image, "an" may
# be right, or at the start "no" ("no cube is present in the image"). "orange" depends on the image less than the other colours:
# usually the word "an" announces it. After "single" (two captions), "orange" depends on the image about as much as other colours. With the
# adapter, the words before determine "of", "the" and "left" almost completely, and "cube" mostly.
#
# ## Cross-attention
#
# The ViT has 37 output vectors, here called states: one for the whole image (the class token of the ViT, here called `[CLS]`) and
# one for each of the 6 × 6 patches. Each of the three layers of the text decoder has four heads. A head is an attention of its
# own, on d_h = 32 of the 128 outputs of the linears `query` (of the text), `key` and `value` (of the states). Q, K and V are these
# outputs. A head compares the query of each position with the keys of the states. a_tj is the weight of state j at position t:
#
# $$a = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d_h}}\right),$$
# $$\text{output} = a V,$$
# $$\sum_j a_{tj} = 1.$$
#
# With `output_attentions=True`, transformers returns a for each layer. We compute it by hand for the second layer, from the outputs of the linears `query` and
# `key`, and compare.


# %%
@torch.no_grad()
def attention(pixels, rows):
    """Return the cross-attention (n, layers, heads, T, 37), where T counts the predicted words."""
    states = model.vision_model(pixels).last_hidden_state
    text = {"input_ids": tokens.input_ids[rows], "attention_mask": tokens.attention_mask[rows]}
    output = model.text_decoder(**text, encoder_hidden_states=states, output_attentions=True)
    return torch.stack(output.cross_attentions, 1)[..., :-1, :]  # position t predicts word t


layer, kept = model.text_decoder.bert.encoder.layer[1].crossattention.self, {}
for name in ("query", "key"):  # these hooks stay: they only keep the last output
    getattr(layer, name).register_forward_hook(lambda _module, _args, output, name=name: kept.update({name: output}))
EXAMPLE, maps = 0, {}
for which, active in MODELS.items():
    with active():
        maps[which] = attention(pixels[:12], slice(12))
    Q, K = (kept[name].unflatten(-1, (4, 32)).transpose(1, 2) for name in ("query", "key"))  # (n, heads, T or 37, d_h)
    by_hand = (Q @ K.mT / 32**0.5).softmax(-1)[..., :-1, :]
    assert torch.allclose(by_hand, maps[which][:, 1], atol=1e-5)
    assert torch.allclose(maps[which].sum(-1), torch.tensor(1.0), atol=1e-5)
    record(f"share of the attention on [CLS], {which}", maps[which][..., 0].mean((1, 2))[is_word[:12]].mean().item())

# %% [markdown]
# ## What happens if a patch is covered?
#
# Attention shows where a head reads. It does not show what the model does with it. The direct test is an intervention: paint one
# patch in the mean colour of the image, and measure by how much the log-probability of a word falls. We do this for each of the 36
# patches of twelve images, and correlate the 36 falls with the 36 attention weights, for the colour words.

# %%
PATCH, mean_attention, effect = 16, {}, {}
for which, active in MODELS.items():
    mean_attention[which] = maps[which].mean((1, 2))[..., 1:]  # over layers and heads: (12, T, 36)
    falls = []
    with active():
        full = log_probabilities(pixels[:12], slice(12))
        for patch in range(36):
            row, column = PATCH * (patch // 6), PATCH * (patch % 6)
            covered = pixels[:12].clone()
            covered[:, :, row : row + PATCH, column : column + PATCH] = covered.mean((2, 3), keepdim=True)
            fall = full - log_probabilities(covered, slice(12))
            falls.append(fall.gather(-1, words[:12, :, None])[..., 0])
    effect[which] = torch.stack(falls, -1)  # (12, T, 36)

is_colour = torch.tensor([[name in COLOURS for name in row] for row in names[:12]])
correlation = {}
for which in MODELS:
    pairs = zip(mean_attention[which][is_colour], effect[which][is_colour], strict=True)
    correlation[which] = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    record(f"correlation of attention and effect, mean, {which}", correlation[which].mean().item())
    record(f"correlation of attention and effect, smallest, {which}", correlation[which].min().item())
    assert -0.2 < correlation[which].mean() < 0.4 and correlation[which].min() < 0

with torch.no_grad():  # the last loop covered patch 35
    states, changed = (model.vision_model(x).last_hidden_state for x in (pixels[:12], covered))
moved = (changed - states).norm(dim=-1)[:, 1:36] / states.norm(dim=-1)[:, 1:36]
record("relative change of the states of the 35 other patches", moved.mean().item())
assert (moved > 1e-6).all() and 0.002 < moved.mean() < 0.01

# %%
length = int(is_word[EXAMPLE].sum()) - 1  # without the end token
columns = [("attention,\nbase", mean_attention["base"]), ("attention,\nadapter", mean_attention["adapter"])]
columns.append(("effect of a\ncover, adapter", effect["adapter"].clamp(min=0)))
figure, (top, *grid) = plt.subplots(length + 1, 3, figsize=(5, 1.65 * length + 2.4))
for axis in top:
    axis.axis("off")
top[1].imshow(images[EXAMPLE])
top[1].set_title(captions[EXAMPLE])
for t in range(length):
    for axis, (title, values) in zip(grid[t], columns, strict=True):
        axis.imshow(images[EXAMPLE].convert("L"), cmap="gray", extent=(0, 6, 6, 0))
        axis.imshow(values[EXAMPLE, t].view(6, 6), cmap="inferno", alpha=0.6, extent=(0, 6, 6, 0))
        axis.set(xticks=[], yticks=[], title=title if t == 0 else "")
        axis.set_xlabel(f"largest: {values[EXAMPLE, t].max():.2g}", fontsize=9)
    grid[t][0].set_ylabel(names[EXAMPLE][t])
show(figure, "attention")

# %% [markdown]
# The image and its caption are on top. Each row is a predicted word, on the image in grey, and each panel has its own colours:
# bright is the largest value of the panel. An effect is a fall of the log-probability, in nats. A rise is drawn as zero. The
# number below a panel is its largest value: for a word that the model is sure of, no single patch changes much. Attention is the
# mean over three layers and four heads. The share of `[CLS]`, printed above, is not drawn: it is near 1/37 ≈ 0.027, which is the
# share of uniform attention.
#
# ## What the picture shows, and what it does not
#
# - In this picture (seed 0), the brightest patches of a colour are on the cubes, in both models. The adapter is only on the ViT, and no weight
#   of the cross-attention changes. But the ViT gives other states. So the keys and values change, and so do the queries of the
#   later layers.
# - Attention and effect agree only a little. Over the colour words, their correlation is 0.22 on average for the base, and 0.19, 0.02 and
#   0.04 with the adapters of the seeds 0, 1 and 2. It is negative for some words. So bright patches are not always those that matter.
# - A patch of the last ViT layer is not a patch of pixels. Its state has read all other patches by self-attention: covering one corner
#   changes the states of all 35 other patches, by half a percent on average.
# - Covering is not a perfect measure either. The model was not trained on covered images. And if two patches show the same
#   colour, covering one of them may change little.
#
# Jain and Wallace (arXiv:1902.10186) found something similar for recurrent models of text: attention is often uncorrelated with
# other measures of importance, and different attention can give the same prediction. Wiegreffe and Pinter (arXiv:1908.04626) answer that this depends on what
# one calls an explanation. Use attention to ask where a head reads. Use an intervention to ask what matters.
#
# ## Exercises
#
# 1. Make the attention uniform: a forward hook on each cross-attention `query` returns zeros. A right answer shows that each
#    weight is 1/37. It also gives the log-probability of the captions with and without the adapter, for the word "cube" and for all
#    other words. Does each model need its attention, although a picture of it explains little?
# 2. Mirror the images of "… to the left of …", and exchange the two colours in the caption, with their "a" or "an". A right answer compares the log-probability of
#    the two captions for the original and the mirrored images, and reports for how many images the model prefers the right caption.
#    This tests whether the model reads the positions, and not only which colours are there.
#
# ## What to remember
#
# - Swap the images: if the logits do not change, the model ignores them. A large change is not a good score.
# - Rows of attention sum to 1. They show where a head reads, and not what decides.
# - To learn what matters, change the input and measure the output.
#
# ## Sources
#
# - Jain and Wallace 2019, *Attention is not Explanation*, arXiv:1902.10186
# - Wiegreffe and Pinter 2019, *Attention is not not Explanation*, arXiv:1908.04626
# - Vaswani et al. 2017, *Attention Is All You Need*, arXiv:1706.03762, equation 1
# - Zeiler and Fergus 2013, *Visualizing and Understanding Convolutional Networks*, arXiv:1311.2901, section 4.2: covering parts of an image
