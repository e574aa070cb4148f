# %% [markdown]
# # Solutions of lesson 3
#
# ## 1. Gradients with dropout
#
# Dropout replaces $X$ by $M \odot X$ in the update, but not in $W_0 x$. So $dA = s (dY B)^\top (M \odot X)$,
# $dB = s \, dY^\top (M \odot X) A^\top$, and $dX = dY W_0 + s M \odot ((dY B) A)$.

# %%
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of lesson_tools.py

import torch
from lesson_tools import SEED

torch.manual_seed(SEED)
n, k, d, r, s, p = 10, 64, 96, 4, 2.0, 0.25
X, W0, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((n, k), (d, k), (r, k), (d, r)))
M = (torch.rand(n, k) > p) / (1 - p)
for tensor in (X, A, B):
    tensor.requires_grad_()
Y = X @ W0.T + s * (M * X) @ A.T @ B.T
dY = torch.randn_like(Y)
Y.backward(dY)


def is_equal(by_hand, autograd):
    return ((by_hand - autograd).abs().max() / autograd.abs().max()).item() < 1e-12


with torch.no_grad():
    assert is_equal(s * (dY @ B).T @ (M * X), A.grad)
    assert is_equal(s * dY.T @ ((M * X) @ A.T), B.grad)
    assert is_equal(dY @ W0 + s * M * ((dY @ B) @ A), X.grad)
    assert not is_equal(dY @ W0 + s * (dY @ B) @ A, X.grad)  # the mask belongs in dX too
print("gradients with dropout: equal to autograd")

# %% [markdown]
# ## 2. Keep X, compute H again
#
# The backward pass computes $H = X A^\top$ a second time. This costs $n k r$ multiplications, and saves $n r$ numbers.


# %%
class Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, A, B, s):
        ctx.save_for_backward(X, A, B)
        ctx.s = s
        return s * (X @ A.T) @ B.T

    @staticmethod
    def backward(ctx, dY):
        X, A, B = ctx.saved_tensors
        G = ctx.s * dY @ B
        return G @ A, G.T @ X, ctx.s * dY.T @ (X @ A.T), None


assert torch.autograd.gradcheck(lambda *inputs: Update.apply(*inputs, s), (X, A, B))
kept = []
with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
    Update.apply(X, A, B, s)
activations = [tensor for tensor in kept if tensor.data_ptr() not in (A.data_ptr(), B.data_ptr())]
assert sum(tensor.numel() for tensor in activations) == n * k
print(f"kept beside A and B: {n * k} numbers, which is X alone")
