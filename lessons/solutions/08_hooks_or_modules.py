# %% [markdown]
# # 8 · Hooks or replaced modules: solutions

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import copy
import pickle

import torch
from lesson_tools import SEED
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# %% [markdown]
# ## 1. A subclass of nn.Linear that shares the weight
#
# Two answers of the column *module* change: the names are kept, and the module at the old path is a Linear.


# %%
class SharedLinear(nn.Linear):
    def __init__(self, linear, r=4, alpha=16.0):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # allocates nothing
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / r
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
        self.lora_B = nn.Parameter(torch.randn(linear.out_features, r) * 0.1)

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def build(adapted=True):
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).requires_grad_(False)
    if adapted:
        model[0] = SharedLinear(model[0])
    return model


x = torch.randn(16, 32)
base, adapted = build(False), build()
answers = {
    "names are kept": set(base.state_dict()) <= set(adapted.state_dict()),
    "is a Linear": isinstance(adapted[0], nn.Linear),
    "can be pickled": torch.equal(pickle.loads(pickle.dumps(adapted))(x), adapted(x)),
    "acts in F.linear": torch.allclose(F.linear(x, adapted[0].weight, adapted[0].bias), adapted[0](x)),
}
twin = copy.deepcopy(adapted)
with torch.no_grad():
    twin[0].lora_B.zero_()
answers["deepcopy is separate"] = torch.equal(twin(x), base(x)) and not torch.equal(adapted(x), base(x))
gradients = []
for recompute in (False, True):
    model = build()
    (checkpoint(model, x, use_reentrant=False) if recompute else model(x)).square().sum().backward()
    gradients.append(model[0].lora_A.grad)
answers["checkpointing"] = torch.equal(*gradients)
answers["compiles whole"] = torch.allclose(torch.compile(adapted, backend="eager", fullgraph=True)(x), adapted(x))
torch._dynamo.reset()
compiled = torch.compile(base, backend="eager")
compiled(x)
base[0] = SharedLinear(base[0])
answers["acts if added after compile"] = torch.equal(compiled(x), base(x))
print(answers)
assert [question for question, answer in answers.items() if not answer] == ["acts in F.linear"]

# %% [markdown]
# ## 2. Find linears that are never called
#
# A second hook counts the calls during one forward.


# %%
def never_called(model, *inputs):
    """Return the names of the linears with a forward hook whose forward does not run in model(*inputs)."""
    hooked = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module._forward_hooks}
    called = set()
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
        for name, module in hooked.items()
    ]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    return sorted(set(hooked) - called)


class Bypass(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for linear in (self.first, self.second):
            linear.register_forward_hook(lambda linear, args, output: output + 1)

    def forward(self, x):
        return F.linear(self.first(x), self.second.weight)


model = Bypass()
assert never_called(model, torch.randn(2, 4)) == ["second"]
assert len(model.first._forward_hooks) == 1  # the counting hooks are gone
