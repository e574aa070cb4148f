"""Compare the fast path with the plain one before its first use on a machine.

The fast modules compute the same results as transformers, in another order of sums. A new version of a library, another device
or another base can break that without an error. So each new combination is checked once on each machine, with one real
micro-batch. Before training, both paths compute logits, loss and the gradients of the adapters. Before prediction, they compute
tokens and their logits, ranked texts and features. If results differ by more than rounding, the fast path is off for the run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_blip.data.loader import DeviceBatch
from lora_blip.kernels import switch
from lora_blip.kernels.plain import plain
from lora_blip.lora import attached
from lora_blip.lora.layer import LoRA
from lora_blip.models.compilation import uncompiled
from lora_blip.models.finite import is_invalid
from lora_blip.models.library import first_line
from lora_blip.models.precision import DTYPES, autocasting
from lora_blip.runtime.distributed import ALONE, Ranks
from lora_blip.runtime.limits import is_out_of_memory
from lora_blip.tasks import verification_record
from lora_blip.tasks.base import BaseTask, Generation, PredictionTask, Task, TrainingTask
from lora_blip.tasks.differences import (
    Difference,
    difference_per_call,
    distance,
    failure,
    gradient_difference,
    is_texts,
    numbers,
    relative,
    texts,
)

# The largest relative difference that counts as rounding: many times the measured ones (1e-6 in float32, 1e-3 in float16,
# 2e-2 in bfloat16, over all kinds of models), and much less than the effect of a wrong mask, cache or scale.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Gradients pass through the model twice, and a small temperature enlarges differences of probabilities.
LOOSER = 4  # so gradients and predictions may differ four times as much
ROWS = 4  # examples of a batch that are predicted both ways
TOKENS = 16  # the most tokens of each generated text
TEXTS = 8  # texts that are ranked
SIZE_OF_B = 0.02  # standard deviation of B during the check: if B were zero, the gradient of A would be zero too
LOSS_SCALE = 1024.0  # keeps fp16 gradients above zero

Autocast = Callable[[], AbstractContextManager[Any]]
Report = Callable[[str], object]  # prints a line


class UncheckedError(Exception):
    """The comparison cannot be made, for example because the device has too little memory for the plain path."""


# ---------------------------------------------------------------- before training, before prediction


def before_training(
    task: Task, batch: DeviceBatch, precision: str, autocast: Autocast, settings: dict[str, Any], ranks: Ranks = ALONE,
    predicts: bool = True,
) -> None:  # fmt: skip
    """Check the logits, loss, gradients and predictions of a batch. Every rank calls this with the same batch.

    settings: other settings that affect the computation; `verification_record` stores them. predicts: check predictions too.
    """
    if not task.backbone.fast:
        return
    own = {"of": "training", "predicts": predicts} | (
        {"beams": task.generation.num_beams} if predicts and task.writes_text else {}
    )
    key = verification_record.key_of(task, verification_record.base_of(task.backbone), precision, settings | own)

    def compare() -> list[Difference]:
        differences = training_differences(task, batch, autocast, bound_of(task, precision))
        if predicts and not any(each.too_large for each in differences):
            rows = list(range(min(ROWS, len(batch.examples))))
            pixel_values, examples = batch.per_example(batch.pixel_values)[rows], batch.examples[: len(rows)]
            with evaluating(task), uncompiled(task.backbone.model):
                differences += prediction_differences(task, lambda: task.predict(pixel_values, examples), precision, autocast)
        return differences

    check(task, key, compare, ranks)


def before_prediction(
    task: PredictionTask, base: str, precision: str, run: Callable[[], Any], what: str, report: Report = print
) -> None:
    """Check the predictions that `run` makes for a few examples.

    base: `base_of` the backbone without its adapter. what: the kind of prediction, for the record.
    """
    beams = task.generation.num_beams if task.writes_text else 1
    key = verification_record.key_of(task, base, precision, {"of": what, "beams": beams})
    autocast = autocasting(task.backbone.device, precision)
    check(task, key, lambda: prediction_differences(task, run, precision, autocast), report=report)


def check(
    task: BaseTask, key: dict[str, Any], compare: Callable[[], list[Difference]], ranks: Ranks = ALONE, report: Report = print
) -> None:
    """Compare once per key on this machine. If the difference is too large, switch the fast path off on every rank."""
    if ranks.broadcast(verification_record.is_verified(key) if ranks.main else None):
        return
    report("comparing the fast path with transformers' own computation on one batch, once for these settings on this machine")
    start, differences, problem = time.perf_counter(), list[Difference](), ""
    with restored_random_state(task.backbone.device):
        try:
            differences = compare()
        except UncheckedError as error:
            problem = str(error)
        except Exception as error:  # the other ranks wait for the result of this one
            if is_out_of_memory(error):
                problem = first_line(error)
            else:
                differences = [failure(error)]
    wrong = [each for each in differences if each.too_large]
    bad, unchecked = ranks.sum(len(wrong), bool(problem))  # over all processes
    seconds = f"{time.perf_counter() - start:.1f} s"
    if bad:
        disable(task)
        worst = f"{wrong[0]}, and {wrong[0].bound:.0e} is allowed" if wrong else "on another process"
        report(f"WARNING: they differ ({worst}; {seconds}); this run continues without the fast path, more slowly\n")
    elif unchecked:
        report(f"they could not be compared ({problem or 'on another process'}; {seconds}); the fast path stays on\n")
    else:
        report(f"they are equal up to rounding ({', '.join(map(str, differences))}; {seconds})\n")
        if ranks.main:
            verification_record.remember(key, differences)


def disable(task: BaseTask) -> None:
    """Use transformers' own computation and the plain LoRA hook from now on, uncompiled."""
    model = task.backbone.model
    switch.fast(model, False)
    attached.fast(model, False)
    task.backbone.fast = False
    for module in model.modules():
        module._compiled_call_impl = None


# ---------------------------------------------------------------- both ways


def both_ways(task: BaseTask, run: Callable[[], Any]) -> tuple[Any, Any]:
    """Return the results of `run` by the fast path and by the plain one."""
    fast = run()
    with uncompiled(task.backbone.model), plain():
        return fast, run()


def training_differences(task: TrainingTask, batch: DeviceBatch, autocast: Autocast, bound: float) -> list[Difference]:
    """Compare the logits, the loss and the adapters' gradients of a batch, with values in B and without dropout."""
    batch = replace(batch, cached_states=None)
    adapters = [module for module in task.backbone.model.modules() if isinstance(module, LoRA)]
    trained = [*(parameter for each in adapters for parameter in each.parameters()), *task.parameters()]

    def run() -> tuple[Tensor, Tensor, list[Tensor]]:
        with torch.no_grad(), autocast():
            logits = task.logits(batch).float()
        with autocast():
            loss = task.repeatable_loss(batch) / batch.count
        (loss * LOSS_SCALE).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        for p in trained:
            p.grad = None
        return logits, loss.detach(), gradients

    with nonzero_b(adapters), without_gradients(trained):
        fast, slow = both_ways(task, run)
    if not torch.isfinite(slow[1]):
        raise UncheckedError("the loss is not finite")
    return [
        Difference("logits", relative(fast[0], slow[0]), bound),
        Difference("loss", float((fast[1] - slow[1]).abs() / slow[1].abs().clamp_min(0.1)), bound),
        Difference("gradients", gradient_difference(fast[2], slow[2]), LOOSER * bound),
    ]


@torch.no_grad()
def prediction_differences(
    task: PredictionTask, run: Callable[[], Any], precision: str, autocast: Autocast
) -> list[Difference]:
    """Compare predictions: logits of the tokens of greedy texts, texts by beam search, probabilities and features."""
    bound, differences = bound_of(task, precision), []
    heads = task.output_modules()

    def recorded() -> tuple[list[Tensor], Any]:
        outputs: list[Tensor] = []
        handles = [head.register_forward_hook(lambda _m, _a, output: outputs.append(output.float())) for head in heads]
        try:
            with autocast():
                return outputs, run()
        finally:
            for handle in handles:
                handle.remove()

    beams = task.generation.num_beams if task.writes_text else 1
    with short(task, 1):
        fast, slow = both_ways(task, recorded)
    if any(map(is_invalid, slow[0])):
        raise UncheckedError("an output is not finite")
    generated = is_texts(slow[1])
    if slow[0]:
        what = "logits" if task.writes_text else "features"
        differences.append(Difference(f"{what} of a prediction", difference_per_call(fast[0], slow[0], generated), bound))
    if not generated:
        one, other = (torch.from_numpy(np.concatenate(numbers(each[1]) or [np.zeros(1)])) for each in (fast, slow))
        differences.append(Difference("predictions", distance(one, other), LOOSER * bound))
    elif beams > 1:
        with short(task, beams):
            pair = [texts(results) for results in both_ways(task, lambda: recorded()[1])]
        different = sum(a != b for a, b in zip(*pair, strict=True)) / len(pair[0])
        # rounding decides between beams of nearly equal scores: half of the texts may differ; in 16 bits, both of two may
        most = 0.5 if len(pair[0]) > 2 or bound <= BOUNDS[torch.float32] else 1.0
        differences.append(Difference("different texts of the beam search", different, most))
    return differences


# ---------------------------------------------------------------- the state is restored after the check


@contextmanager
def restored_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random generators after the block."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def nonzero_b(adapters: list[LoRA]) -> Iterator[None]:
    """Give every B small values, the same on every rank, and set the dropout to 0. Restore both after the block."""
    before = [(each.B.detach().clone(), each.dropout) for each in adapters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for each in adapters:
            each.B.copy_(SIZE_OF_B * torch.randn(each.B.shape, generator=generator))
            each.dropout = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for each, (b, dropout) in zip(adapters, before, strict=True):
                each.B.copy_(b)
                each.dropout = dropout


@contextmanager
def without_gradients(parameters: list[Any]) -> Iterator[None]:
    """Remove the gradients of the parameters inside the block. Restore them after it."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient


@contextmanager
def evaluating(task: BaseTask) -> Iterator[None]:
    """Put the model into eval mode inside the block. Restore the mode of each module after it."""
    training = [module for module in task.backbone.model.modules() if module.training]
    task.backbone.model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def short(task: PredictionTask, beams: int) -> Iterator[None]:
    """Generate short texts inside the block, without sampling and without other options."""
    before = task.generation
    most = min(TOKENS, before.max_new_tokens)
    task.generation = Generation(most, beams)
    try:
        yield
    finally:
        task.generation = before


def bound_of(task: BaseTask, precision: str) -> float:
    """Return the bound for the coarsest dtype of the computation."""
    dtypes = [DTYPES[precision], *{p.dtype for p in task.backbone.model.parameters() if p.dtype in BOUNDS}]
    if task.backbone.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest":
        dtypes.append(torch.float16)  # TF32 has the same number of bits
    return max(BOUNDS[dtype] for dtype in dtypes)
