# %% [markdown]
# # 10 · Does the model use the image?: solutions

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lesson_tools
import torch
from lesson_tools import ROOT, record
from PIL import ImageOps

import lora_blip

run = lesson_tools.quick_train(max_steps=120)
backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu", fast=False)
lora_blip.load_adapter(backbone, run)
model = backbone.model


@torch.no_grad()
def caption_scores(images, captions, only=None):
    """Return the log-probability of each caption for its image, or that of the words "cube" in it, or of all others."""
    pixels = backbone.image_processor(images, return_tensors="pt").pixel_values
    tokens = lesson_tools.tokenize(backbone, captions)
    logs = model(pixel_values=pixels, **tokens).logits[:, :-1].log_softmax(-1)
    of_words = logs.gather(-1, tokens.input_ids[:, 1:, None])[..., 0] * tokens.attention_mask[:, 1:]
    is_cube = tokens.input_ids[:, 1:] == backbone.tokenizer.convert_tokens_to_ids("cube")
    return {None: of_words, "cube": of_words * is_cube, "others": of_words * ~is_cube}[only].sum(1)


# %% [markdown]
# ## 1. Uniform attention
#
# A query of zeros gives the score 0 for each key, and the softmax of 37 equal scores is 1/37.

# %%
images, captions = lesson_tools.test_cubes(48)
scores = {}


def measure(attention):
    for words in ("cube", "others"):
        scores["adapter", attention, words] = caption_scores(images, captions, words).mean().item()
        with lora_blip.disable_adapters(backbone):
            scores["base", attention, words] = caption_scores(images, captions, words).mean().item()


measure("learned")
handles = [
    module.register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    for name, module in model.text_decoder.named_modules()
    if name.endswith("crossattention.self.query")
]
measure("uniform")
with torch.no_grad():
    pixels = backbone.image_processor(images[:1], return_tensors="pt").pixel_values
    states = model.vision_model(pixels).last_hidden_state
    ids = lesson_tools.tokenize(backbone, captions[:1]).input_ids
    weights = model.text_decoder(input_ids=ids, encoder_hidden_states=states, output_attentions=True).cross_attentions
for handle in handles:
    handle.remove()
for (state, attention, words), score in scores.items():
    record(f"log-probability in a caption, {state}, {attention} attention, {words}", score)
assert len(weights) == 3 and all(torch.allclose(weight, torch.tensor(1 / 37)) for weight in weights)  # three layers
for state in ("adapter", "base"):
    assert scores[state, "uniform", "others"] < scores[state, "learned", "others"] - 1
assert scores["base", "learned", "cube"] < -10 and scores["base", "learned", "others"] > -1
assert scores["base", "uniform", "cube"] > scores["base", "learned", "cube"] + 1
of_caption = {
    attention: sum(scores["base", attention, words] for words in ("cube", "others")) for attention in ("learned", "uniform")
}
assert of_caption["uniform"] > of_caption["learned"] + 1

# %% [markdown]
# For the words other than "cube", the log-probability falls in both models, so both need their attention. The base gives these words
# nearly the probability 1. But it gives "cube" a very low probability. With uniform attention, this probability is higher, and
# with it that of the whole caption. Do not look only at the sum.

# %% [markdown]
# ## 2. Mirrored images
#
# The first word is "a" or "an", which belongs to the colour, so we exchange both words.

# %%
LEFT = " cube to the left of "
images, captions = lesson_tools.test_cubes()
pairs = [(image, caption) for image, caption in zip(images, captions, strict=True) if LEFT in caption]
images, captions = ([pair[index] for pair in pairs] for index in (0, 1))
exchanged = []
for caption in captions:
    left, right = caption.removesuffix(" cube").split(LEFT)
    exchanged.append(f"{right}{LEFT}{left} cube")
assert exchanged[0] != captions[0] and sorted(exchanged[0].split()) == sorted(captions[0].split())

mirrored = [ImageOps.mirror(image) for image in images]
for name, shown, right, wrong in (("original", images, captions, exchanged), ("mirrored", mirrored, exchanged, captions)):
    prefers_right = (caption_scores(shown, right) > caption_scores(shown, wrong)).float().mean().item()
    record(f"share of {len(images)} {name} images for which the right caption is more probable", prefers_right)
    assert prefers_right > 0.5
