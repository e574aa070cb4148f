"""`lora-blip tune`: measure from which size on each fast path is faster on this machine, and store the limits.

The two paths of a comparison alternate many times, and their shortest times are compared, so that other programs on the machine
have little effect. All tensors are random.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.kernels import paths, sdpa, vit
from lora_blip.kernels.linear import ROWS_OF_WEIGHT, QuickLinear, has_kernel
from lora_blip.lora import attached, injection
from lora_blip.lora.sites import Site
from lora_blip.runtime.files import make_folder, write_whole

Run = Callable[[], object]
SECONDS = 0.3  # of one comparison of two paths
TURN = 2e-3  # seconds of one turn: short products are repeated
PRODUCTS = (  # (rows, width, features)
    (74, 128, 128),
    (74, 128, 512),
    (148, 128, 512),
    (200, 256, 256),
    (24, 768, 768),
    (148, 256, 1024),
    (200, 512, 512),
    (394, 512, 512),
    (394, 768, 768),
)
NARROW_PRODUCTS = ((32, 128), (74, 128), (74, 256), (200, 256), (200, 512), (394, 512), (394, 768))  # (rows, width)
LINEARS = ((40, 32), (74, 128), (200, 128), (200, 256), (394, 512), (394, 768))
ATTENTIONS = ((2, 2, 197), (2, 6, 197), (2, 12, 197), (1, 12, 577), (2, 12, 577))  # (images, heads, states)
R = 8


class PathPair(NamedTuple):
    """Two ways to compute the same, for one size."""

    size: int  # multiplications, or scores of an attention
    fast: Run
    other: Run


Report = Callable[[str, int, float], object]  # called with the name of a path, a size, and the ratio of the times


def tune() -> paths.PathLimits:
    """Measure this machine, and store its row in the user's cache folder. Return the row. It takes less than a minute."""
    row = measure()
    try:
        rows = paths.read(paths.tuned_file())
    except (OSError, ValueError, RecursionError):
        rows = {}
    make_folder(paths.tuned_file().parent)
    write_whole(paths.tuned_file(), paths.table(*(rows | {row.processor: row}).values()))
    return row


def silent(_name: str, _size: int, _ratio: float) -> None:
    """Report nothing."""


def measure(report: Report = silent) -> paths.PathLimits:
    """Return the row of this machine. The row that the process uses stays the same."""
    before = paths.row()
    try:
        return measured_row(replace(before, processor=paths.processor()), report)
    finally:
        paths.use(before)


def measured_row(row: paths.PathLimits, report: Report) -> paths.PathLimits:
    """Return the row with limits measured on this machine. The limits that are already measured apply to later measurements."""
    row = replace(row, onednn=paths.NEVER, onednn_narrow=paths.NEVER)
    if has_kernel():
        narrow = limit("oneDNN, A or B", [product_paths(*shape, R) for shape in NARROW_PRODUCTS], report)
        row = replace(row, onednn_narrow=narrow)
        row = replace(row, onednn=limit("oneDNN", [frozen_paths(*shape) for shape in PRODUCTS], report))
    paths.use(row)
    row = replace(row, fused=limit("fused update", [update_paths(*shape) for shape in LINEARS], report))
    row = replace(row, fused_16bit=limit("fused 16-bit attention", [attention_paths(*shape) for shape in ATTENTIONS], report))
    paths.use(row)
    return replace(row, by_heads=limit("16-bit attention by heads", [by_heads_paths(*shape) for shape in ATTENTIONS], report))


def limit(name: str, comparisons: Iterable[PathPair], report: Report) -> int:
    """Return the smallest size from which the fast path is faster for all larger sizes too, or NEVER.

    The limit lies between two measured sizes: it is their geometric mean. If the path is faster for all sizes, the limit is the
    smallest one.
    """
    gains = []
    for size, fast, other in sorted(comparisons, key=lambda each: each.size):
        relative = ratio(fast, other)
        report(name, size, relative)
        gains.append((size, relative < 1))
    losses = [number for number, (_, wins) in enumerate(gains) if not wins]
    if not losses:
        return gains[0][0]
    last = losses[-1]
    return paths.NEVER if last == len(gains) - 1 else math.isqrt(gains[last][0] * gains[last + 1][0])


def ratio(fast: Run, other: Run) -> float:
    """Return the shortest time of `fast`, relative to that of `other`. Both alternate."""
    times = max(1, int(TURN / max(1e-7, seconds(other, 2))))
    shortest = [math.inf, math.inf]
    end, turns = time.perf_counter() + SECONDS, 0
    while turns < 3 or time.perf_counter() < end:
        for number, run in enumerate((fast, other)):
            shortest[number] = min(shortest[number], seconds(run, times))
        turns += 1
    return shortest[0] / shortest[1]


def seconds(run: Run, times: int) -> float:
    """Return the mean seconds of one run."""
    started = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - started) / times


# ---------------------------------------------------------------- the two paths of each comparison


def product_paths(rows: int, width: int, features: int) -> PathPair:
    """Return a float32 product by oneDNN, and by PyTorch."""
    x, weight = torch.randn(rows, width), torch.randn(features, width)
    onednn = torch.ops.mkldnn._linear_pointwise
    return PathPair(rows * width * features, lambda: onednn(x, weight, None, "none", [], ""), lambda: F.linear(x, weight))


def frozen_paths(rows: int, width: int, features: int) -> PathPair:
    """Return forward and backward of a frozen linear, by oneDNN and by PyTorch.

    The time includes the Python code of `linear.FrozenProduct`, which PyTorch's product does not need.
    """
    linear = QuickLinear(width, features).requires_grad_(False)
    x, dy = torch.randn(rows, width, requires_grad=True), torch.randn(rows, features)

    def run(size: int) -> None:
        paths.use(replace(paths.row(), onednn=size))
        torch.autograd.grad(linear(x), x, dy)

    return PathPair((rows + ROWS_OF_WEIGHT) * width * features, lambda: run(0), lambda: run(paths.NEVER))


def update_paths(rows: int, width: int) -> PathPair:
    """Return forward and backward of a linear with an adapter, by the fused update and by `fused.short_update`."""
    model = nn.Sequential(nn.Linear(width, width))
    injection.inject(model, [Site("0", R, float(R))])
    x = torch.randn(rows, width, requires_grad=True)
    dy = torch.randn(rows, width)

    def run(size: int) -> None:
        paths.use(replace(paths.row(), fused=size))
        torch.autograd.backward(model(x), dy)
        x.grad = None
        for lora in attached.adapters(model).values():
            lora.A.grad = lora.B.grad = None

    return PathPair(rows * width * width, lambda: run(0), lambda: run(paths.NEVER))


def attention_paths(images: int, heads: int, states: int) -> PathPair:
    """Return forward and backward of an attention in bfloat16, by PyTorch's fused kernel and by separate operations."""
    q, k, v = (torch.randn(images, heads, states, 64).bfloat16().requires_grad_() for _ in range(3))
    dy = torch.randn(images, heads, states, 64).bfloat16()

    def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), dy)

    size = images * heads * states**2
    return PathPair(size, lambda: run(F.scaled_dot_product_attention), lambda: run(sdpa.separate))


def by_heads_paths(images: int, heads: int, states: int) -> PathPair:
    """Return forward and backward of an attention in bfloat16, a few heads at a time and all at once.

    "All at once" takes the faster path of `attention_paths`: the row already contains its limit.
    """
    qkv = torch.randn(images, states, 3 * heads * 64).bfloat16().requires_grad_()
    dy = torch.randn(images, states, heads * 64).bfloat16()

    def run(attend: Callable[[Tensor, int], Tensor]) -> None:
        torch.autograd.grad(attend(qkv, heads), qkv, dy)

    return PathPair(images * heads * states**2, lambda: run(vit.by_heads), lambda: run(vit.attend_at_once))
