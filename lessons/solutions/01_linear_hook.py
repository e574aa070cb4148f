# %% [markdown]
# # Solutions of lesson 1
#
# ## 1. Two adapters on one linear
#
# The hook adds the update of each adapter in the stack. The sum $\Delta W_1 + \Delta W_2$ has rank at most $r_1 + r_2$. For
# random matrices, its rank is exactly $r_1 + r_2$.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

import torch
from lesson_tools import SEED
from torch import nn
from torch.nn import functional as F

from lora_blip.lora.layer import AdapterStack, LoRA, Site, lora_hook

torch.manual_seed(SEED)
linear = nn.Linear(64, 96).requires_grad_(False)
linear.lora = AdapterStack()
for name, r in (("first", 3), ("second", 5)):
    linear.lora[name] = LoRA(Site("fc", r=r, alpha=8.0), 64, 96)
    nn.init.normal_(linear.lora[name].B)
linear.register_forward_hook(lora_hook, with_kwargs=True)

x = torch.randn(10, 64)
delta = linear.lora["first"].delta_weight() + linear.lora["second"].delta_weight()
assert torch.allclose(linear(x), F.linear(x, linear.weight + delta, linear.bias), rtol=1e-4, atol=1e-4)
assert torch.linalg.matrix_rank(delta) == 3 + 5
print("the sum of two adapters of ranks 3 and 5 has rank 8")

# %% [markdown]
# ## 2. A convolution of 1 × 1
#
# A kernel of shape (d, k, 1, 1) is a matrix of shape (d, k) that acts on the channels of each pixel. So $A$ and $B$ are used as
# two such convolutions.

# %%
conv = nn.Conv2d(16, 24, kernel_size=1).requires_grad_(False)
conv.A = nn.Parameter(torch.randn(4, 16))
conv.B = nn.Parameter(torch.randn(24, 4))
scale = 8.0 / 4


def conv_hook(conv, args, output):
    update = F.conv2d(F.conv2d(args[0], conv.A[:, :, None, None]), conv.B[:, :, None, None])
    return output + scale * update


image = torch.randn(2, 16, 5, 5)
expected = F.conv2d(image, conv.weight + (scale * conv.B @ conv.A)[:, :, None, None], conv.bias)
assert not torch.allclose(conv(image), expected, rtol=1e-4, atol=1e-4)  # without the hook
conv.register_forward_hook(conv_hook)
assert torch.allclose(conv(image), expected, rtol=1e-4, atol=1e-4)
print("the hook equals a convolution with W₀ + ΔW")
