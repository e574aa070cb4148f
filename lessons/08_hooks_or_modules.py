# %% [markdown]
# # 8 · Hooks or replaced modules?
#
# **You learn** three ways to put LoRA on a linear, what each does to the rest of PyTorch, and where a hook is bypassed.
#
# **Time:** less than a minute on two cores, longer if they are busy.
#
# **Read:** `lora_hook` in `lora_blip/lora/layer.py`, and `lora_blip/lora/attached.py`.
#
# All three compute y = W₀x + b + (α/r)·B A x:
#
# - **module**: the linear is replaced by a module that contains it. `peft` does this.
# - **closure**: the hook is a function inside another function, and remembers its adapter.
# - **hook**: the hook is a top-level function (importable by name), and finds the adapter in the linear. `lora_blip`
#   does this.
#
# The last two use a forward hook: PyTorch calls it after the forward of the linear.

# %%
import copy
import pickle

import matplotlib.pyplot as plt
import torch
from lesson_tools import ROOT, SEED, show
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lora_blip


class Adapter(nn.Module):
    """Return s·B A x. B is random here, so that the adapter changes the output."""

    def __init__(self, linear, r=4, alpha=16.0):
        super().__init__()
        self.scale = alpha / r
        self.A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
        self.B = nn.Parameter(torch.randn(linear.out_features, r) * 0.1)

    def forward(self, x):
        return self.scale * F.linear(F.linear(x, self.A), self.B)


class LoRALinear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.lora = linear, Adapter(linear)

    def forward(self, x):
        return self.base_layer(x) + self.lora(x)


def add_lora(linear, args, output):
    return output + linear.lora(args[0])


def by_module(model):
    model[0] = LoRALinear(model[0])


def by_closure(model):
    adapter = Adapter(model[0])
    model[0].lora = adapter
    model[0].register_forward_hook(lambda linear, args, output: output + adapter(args[0]))


def by_hook(model):
    model[0].lora = Adapter(model[0])
    model[0].register_forward_hook(add_lora)


WAYS = {"module": by_module, "closure": by_closure, "hook": by_hook}


def build(way=None):
    """Return Linear → GELU → Linear with LoRA on the first linear. Equal seeds give equal values in all three ways."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).requires_grad_(False)
    if way:
        WAYS[way](model)
    return model


x = torch.randn(16, 32)  # (batch, k)
outputs = {way: build(way)(x) for way in WAYS}
assert torch.equal(outputs["module"], outputs["closure"]) and torch.equal(outputs["module"], outputs["hook"])
assert not torch.allclose(outputs["hook"], build()(x))

# %% [markdown]
# ## Eight questions
#
# Each function below returns True if the answer is yes. Each runs for all three ways.

# %%


def keeps_names(way):
    """Do the weights of the base keep their names in the state_dict?"""
    return set(build().state_dict()) <= set(build(way).state_dict())


def is_linear(way):
    """Is the module at the same path still a Linear? (The new module contains one, which a search through all modules finds.)"""
    return isinstance(build(way)[0], nn.Linear)


def deepcopy_is_separate(way):
    """Is a deepcopy a separate model? We set B of the copy to zero: the copy must then compute as the base."""
    model = build(way)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].lora.B.zero_()
    return torch.equal(twin(x), build()(x)) and torch.equal(model(x), outputs[way])


def pickles(way):
    """Can the model be pickled? Processes started with "spawn" receive their arguments in this way."""
    try:
        return torch.equal(pickle.loads(pickle.dumps(build(way)))(x), outputs[way])
    except (AttributeError, pickle.PicklingError):
        return False


def acts_in_f_linear(way):
    """Does the adapter act in F.linear(x, m.weight, m.bias), which never calls the module m?"""
    model = build(way)
    linear = getattr(model[0], "base_layer", model[0])  # the module that has the weight
    return torch.allclose(model[2](model[1](F.linear(x, linear.weight, linear.bias))), outputs[way])


def trains_with_checkpointing(way):
    """Are the gradients the same if activations are recomputed in the backward pass?"""
    gradients = []
    for recompute in (False, True):
        model = build(way)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.square().sum().backward()
        gradients.append(model[0].lora.A.grad)
    return torch.equal(*gradients)


def compiles_whole(way):
    """Does torch.compile capture the model in one graph, with the adapter inside?"""
    torch._dynamo.reset()
    return torch.allclose(torch.compile(build(way), backend="eager", fullgraph=True)(x), outputs[way])


def acts_if_added_after_compile(way):
    """Does a compiled model use an adapter that is added after the first call?"""
    torch._dynamo.reset()
    model = build()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    torch.manual_seed(SEED)
    WAYS[way](model)
    return torch.equal(compiled(x), model(x))


QUESTIONS = {
    "names are kept": keeps_names, "is a Linear": is_linear, "deepcopy is separate": deepcopy_is_separate,
    "can be pickled": pickles, "acts in F.linear": acts_in_f_linear, "checkpointing": trains_with_checkpointing,
    "compiles whole": compiles_whole, "acts if added\nafter compile": acts_if_added_after_compile,
}  # fmt: skip
answers = {question: {way: test(way) for way in WAYS} for question, test in QUESTIONS.items()}
for question, row in answers.items():
    print(f"{question.replace(chr(10), ' '):<30}", row)

# %%
figure, axis = plt.subplots(figsize=(5, 5))
table = torch.tensor([[float(row[way]) for way in WAYS] for row in answers.values()])
axis.imshow(table, cmap="RdYlGn", vmin=-0.6, vmax=1.6, aspect="auto")
for i, row in enumerate(answers.values()):
    for j, way in enumerate(WAYS):
        axis.text(j, i, "yes" if row[way] else "no", ha="center", va="center")
axis.set(xticks=range(3), xticklabels=WAYS, yticks=range(len(answers)), yticklabels=answers)
axis.set_title("What each way of adding LoRA keeps")
axis.tick_params(length=0)
show(figure, "answers")

# %% [markdown]
# The columns *closure* and *hook* differ in two rows. The closure remembers the adapter of the original model, so the copy
# uses that adapter, without an error. And Python cannot pickle a lambda or a function inside a function. A top-level
# function remembers no adapter, and is pickled by its name. In the other rows, the two columns are equal.
#
# None of the three ways acts in `F.linear(x, m.weight)`: the code reads the weight and never calls the module. With a hook, the
# adapter then has no effect, and PyTorch reports nothing. The same holds for `peft`, whose module has a property `weight` that
# returns the weight of `base_layer`. Our `LoRALinear` has no `weight`, so `m.weight` would raise AttributeError. Therefore the
# test reads `base_layer.weight`. A merged weight always acts. A training of `lora_blip` stops before the first step if an adapter
# is never called.
#
# Checkpointing with `use_reentrant=False`, the default of transformers 5, works in all three ways, and so does compiling a model that has its adapter already. The last row comes from a
# default of `torch.compile`: a compiled graph does not look for new hooks (`torch._dynamo.config.skip_nnmodule_hook_guards`). It notices a replaced module, so only *module*
# has a yes there. `lora_blip` adds adapters before it compiles.

# %%
expected = {
    "names are kept": (False, True, True), "is a Linear": (False, True, True), "deepcopy is separate": (True, False, True),
    "can be pickled": (True, False, True), "acts in F.linear": (False, False, False), "checkpointing": (True, True, True),
    "compiles whole": (True, True, True), "acts if added\nafter compile": (True, False, False),
}  # fmt: skip
assert {question: tuple(row.values()) for question, row in answers.items()} == expected
assert not hasattr(build("module")[0], "weight")

# %% [markdown]
# ## The same on a real model

# %%
backbone = lora_blip.load_backbone(str(ROOT / "assets/tiny-blip"), device="cpu")
before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
lora_blip.inject(backbone, "vit")
after = backbone.model.state_dict()
assert all(torch.equal(after[name], value) for name, value in before.items())  # no name and no bit of the base changes
added = sorted(set(after) - set(before))
assert len(added) == 2 * len(lora_blip.find_targets(backbone, "vit")) and all(".lora." in name for name in added)
print(f"{len(before)} tensors of the base, {len(added)} of adapters, such as {added[0]}")
lora_blip.eject(backbone)
assert set(backbone.model.state_dict()) == set(before)

# %% [markdown]
# ## Exercises
#
# 1. Write a `LoRALinear` that subclasses `nn.Linear` and shares the weight and bias of the linear that it replaces. Which of the
#    eight answers of the column *module* change? A right answer shows the new column.
# 2. Write a check that finds each linear that has a hook but is not called in a forward of the model. A right answer finds the
#    second linear of a model that computes `F.linear(x, self.second.weight)`.
#
# ## What to remember
#
# - A hook changes no class and no name. A module that contains the linear, as in `peft`, changes both. A subclass of
#   `nn.Linear` that shares the weight keeps the names, and is still a Linear (exercise 1).
# - A hook should be a top-level function that finds its adapter in the linear. A closure breaks `deepcopy` and `pickle`.
# - Code that reads `m.weight` bypasses hooks and modules. Merge, or check that every adapter is called.
#
# ## Sources
#
# - PyTorch documentation: `torch.nn.Module.register_forward_hook`; *PyTorch 2.0 NNModule Support*, section
#   *NNModule Hooks Support*
# - Mangrulkar et al. 2022, *PEFT*, the library: `peft.tuners.lora.layer.Linear` contains `base_layer`
