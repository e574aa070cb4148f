# %% [markdown]
# # Solutions 4 · α, r and the learning rate
#
# The set-up is that of the lesson, with eight images.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

import lesson_tools
import torch
from lesson_tools import ROOT, SEED

import lora_blip

backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
model = backbone.model.eval()
images, captions = lesson_tools.cubes(8)
pixels = backbone.image_processor(images, return_tensors="pt").pixel_values  # (8, 3, 96, 96)
tokens = lesson_tools.tokenize(backbone, captions)


def loss():
    return model(pixel_values=pixels, **tokens).loss


def new_adapters(r, alpha):
    lora_blip.eject(backbone)
    torch.manual_seed(SEED)
    return lora_blip.inject(backbone, "vit", r=r, alpha=alpha)


def train(adapters, optimizer_class, lr, max_norm=None, steps=5, **options):
    """Return the loss before each step and after the last one. With `max_norm`, clip the gradients before each step."""
    trained = [parameter for lora in adapters.values() for parameter in (lora.A, lora.B)]
    optimizer = optimizer_class(trained, lr=lr, **options)
    losses = [loss()]
    for _ in range(steps):
        optimizer.zero_grad()
        losses[-1].backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        losses.append(loss())
    return torch.tensor([value.item() for value in losses])


# %% [markdown]
# ## 1 · Weight decay and clipping
#
# A and B are √c times smaller, and their gradients are √c times larger.
#
# - AdamW multiplies A and B by 1 − ηλ in each step. λ is the weight decay. The learning rate is now η/√c, so λ must be √c times larger.
# - Clipping scales all gradients if their norm is above a limit. The norm is √c times larger, so the limit must be
#   too. PyTorch adds 10⁻⁶ to the norm, so the last bits can differ.
#
# For c = 4, the weight decay is 1 and the limit is 2. To see that both matter, the cell also runs the old values.

# %%
old = train(new_adapters(8, 32), torch.optim.AdamW, 2e-3, max_norm=1.0, weight_decay=0.5, eps=1e-8)


def scaled(max_norm, weight_decay):
    adapters = new_adapters(8, 4 * 32)
    for lora in adapters.values():
        lora.A.data /= 2
    return train(adapters, torch.optim.AdamW, 1e-3, max_norm=max_norm, weight_decay=weight_decay, eps=2e-8)


right = scaled(2.0, 1.0)
print("largest difference with 2 and 1:", (right - old).abs().max().item())
assert torch.allclose(right, old, rtol=0, atol=2e-6)
for max_norm, weight_decay in ((1.0, 1.0), (2.0, 0.5)):
    wrong = (scaled(max_norm, weight_decay) - old).abs().max().item()
    print(f"largest difference with {max_norm:g} and {weight_decay}: {wrong}")
    assert wrong > 1e-4

# %% [markdown]
# ## 2 · Each row twice, with SGD
#
# With the same α, s is halved, so the gradient of each copy of B is half of the old one. The two copies give the old
# update if each is equal to the old B, because their factor is s/2. So SGD needs the learning rate 2η. The same holds
# for A. In general, for m times as many rows, SGD needs m·η. With the
# unchanged η, the gain is 1/m of that with the original rows: this is the power −1 in the table.

# %%
old = train(new_adapters(8, 32), torch.optim.SGD, 0.02)
rows = {name: lora.A.detach() for name, lora in new_adapters(8, 32).items()}
losses = {}
for lr in (0.02, 0.04):
    twice = new_adapters(16, 32)
    for name, lora in twice.items():
        lora.A.data = torch.cat([rows[name], rows[name]])  # (16, k)
    losses[lr] = train(twice, torch.optim.SGD, lr)
    print(f"learning rate {lr}: largest difference of a loss {(losses[lr] - old).abs().max():.1e}")
assert torch.allclose(losses[0.04], old, rtol=1e-5)
assert not torch.allclose(losses[0.02], old, rtol=1e-3)
