# %% [markdown]
# # Solutions 6 · Which layers?

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

from lesson_tools import ROOT, exact_match, quick_train, record

import lora_blip
from lora_blip.lora.spectrum import delta_spectrum, relative_norm


def train(targets, r, epochs=2):
    """Return a backbone with a trained adapter, with s = 32/√r as in the lesson."""
    run = quick_train(targets=targets, r=r, alpha=32 * r**0.5, lr=3e-3, epochs=epochs, batch_size=4, augment=False)
    backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
    lora_blip.load_adapter(backbone, run / "adapter.safetensors")
    factors = [lora.scale for module in backbone.model.modules() for lora in getattr(module, "lora", {}).values()]
    assert factors and all(abs(s * r**0.5 / 32 - 1) < 1e-6 for s in factors)
    return backbone


# %% [markdown]
# ## 1 · Both parts at once
#
# With r = 3 on both parts, the ViT has 24,576 parameters, and the text model 29,952. The relative update of the text model is
# larger, as in the lesson, where each part was trained alone.

# %%
both = train("vit,text", r=3)
record("exact match, vit and text, r = 3", exact_match(model=both))
ratios = {"vision_model": [], "text_decoder": []}
for name, module in both.model.named_modules():
    for lora in getattr(module, "lora", {}).values():
        ratio = relative_norm(delta_spectrum(lora.A, lora.B, lora.scale), module.weight)
        expected = (lora.delta_weight().norm() / module.weight.norm()).item()
        assert abs(ratio / expected - 1) < 1e-3  # the mean ratios alone would hide a missing s: it is the same in both parts
        ratios[name.split(".")[0]].append(ratio)
means = {part: sum(values) / len(values) for part, values in ratios.items()}
for part, mean in means.items():
    record(f"mean ‖ΔW‖/‖W‖, {part}", mean)
assert means["text_decoder"] > means["vision_model"]

# %% [markdown]
# ## 2 · One layer of the text model
#
# One layer has 3,328 parameters per rank, so rank 15 gives 49,920. The last layer alone is enough for the
# cubes. The score of the first layer depends on the run: we measured 46 % to 79 % in four runs with seed 0, which round
# differently, and 97 % to 99 % with seeds 1 and 2.

# %%
scores = {}
for layer in range(3):
    scores[layer] = exact_match(model=train(f"text[{layer}:{layer + 1}]", r=15))
    record(f"exact match, text layer {layer}, r = 15", scores[layer])
assert scores[2] > 0.9
