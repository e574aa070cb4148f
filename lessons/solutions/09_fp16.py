# %% [markdown]
# # 9 · fp16: solutions

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lesson_tools
import torch
from lesson_tools import ROOT

import lora_blip

# %% [markdown]
# ## 1. Adam in fp16
#
# g² ≈ 10⁻¹⁰, and Adam multiplies it by 1 − β₂ = 10⁻³. g² and the product are below 2⁻²⁵ ≈ 3·10⁻⁸, and so is ε. The step divides by 0.

# %%
start, gradient, rate = torch.randn(1000), 1e-5 * (1 + torch.rand(1000)), 1e-3
after = {}
for dtype in (torch.float16, torch.float32):
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    parameter.grad = gradient.to(dtype)
    optimizer = torch.optim.Adam([parameter], lr=rate, eps=1e-8)
    optimizer.step()
    after[dtype] = parameter.detach()
    print(dtype, "mean of g² is zero:", not optimizer.state[parameter]["exp_avg_sq"].any())
assert not torch.tensor([1e-8]).half().any() and not gradient.half().square().any()
assert not after[torch.float16].isfinite().any()
assert torch.allclose(start - after[torch.float32], torch.tensor(rate), rtol=0.01)

# %% [markdown]
# ## 2. The first gradient that overflows
#
# `register_hook` on an output gets the gradient of this output. The backward pass runs in the reverse order, so the first name is
# near the loss.

# %%
backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu", fast=False)
lora_blip.inject(backbone, "vit")
images, captions = lesson_tools.cubes(4)
tokens = lesson_tools.tokenize(backbone, captions)
pixels = backbone.image_processor(images, return_tensors="pt").pixel_values
outputs, gradients = [], []  # names of modules without a finite output, or gradient of the output


def watch(name):
    def hook(_module, _args, output):
        if isinstance(output, torch.Tensor):
            outputs.extend([name] if not output.isfinite().all() else [])
            if output.requires_grad:
                output.register_hook(lambda gradient: gradients.extend([name] if not gradient.isfinite().all() else []))

    return hook


for name, module in backbone.model.named_modules():
    module.register_forward_hook(watch(name))
first = {}
for power in (16, 28):
    gradients.clear()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = backbone.model(pixel_values=pixels, **tokens).loss
    (loss * 2.0**power).backward()
    first[power] = gradients[:1]
    print(f"S = 2^{power}: the first gradient that is not finite: {first[power]}")
assert outputs == [] and first[16] == [] and len(first[28]) == 1
