"""Proofs before the first step: every hook fires, the image matters, every B learns, only answers are labels."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.errors import PreflightError
from lora_blip.lora import attached
from lora_blip.lora.layer import LoRA
from lora_blip.lora.sites import is_linear
from lora_blip.models.sharding import local_part
from lora_blip.tasks.base import DeviceBatch, Task

GIB = 2**30
LOSS_SCALE = 1024.0  # keeps fp16 gradients of a mean loss above zero, and far below overflow


def check(task: Task, batch: DeviceBatch, autocast: Callable[[], AbstractContextManager[Any]]) -> str:
    """Raise PreflightError, or return what was seen, for the user to read: a label table and a memory estimate."""
    model = task.backbone.model
    state = torch.get_rng_state()
    if wrong := task.wrong_labels(batch):
        raise PreflightError(wrong)
    with autocast():
        check_hooks(model, lambda: task.logits(batch))
        check_image_matters(task, batch)
    activations = check_gradients(task, batch, autocast)
    torch.set_rng_state(state)
    return f"{task.label_table(batch)}\n\n{memory_estimate(model, activations)}"


def check_hooks(model: nn.Module, forward: Callable[[], object]) -> None:
    with torch.no_grad():
        silent = attached.unfired(model, forward)
    if silent:
        raise PreflightError(
            f"{len(silent)} adapter(s) would do nothing: {silent[0]!r} is not called in the model's forward "
            "(its weight is used directly, or never); leave it out of the targets"
        )


@torch.no_grad()
def check_image_matters(task: Task, batch: DeviceBatch) -> None:
    """With other images, the logits of the same texts differ."""
    batch = replace(batch, cached_states=None)  # else states of other pictures might be kept as theirs
    turned = batch.pixel_values.flip(0)
    others = turned if not torch.equal(turned, batch.pixel_values) else -batch.pixel_values
    swapped = replace(batch, pixel_values=others)
    if torch.equal(task.logits(batch), task.logits(swapped)):
        raise PreflightError(
            "other images give the same logits: the model does not see them. A BLIP-2 needs its <image> placeholders: "
            "image_token_index in its config must be the id of the tokenizer's <image>"
        )


def check_gradients(task: Task, batch: DeviceBatch, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
    """Every B gets a gradient from this batch; returns the bytes that the backward pass kept."""
    found = [module for module in task.backbone.model.modules() if isinstance(module, LoRA)]
    kept = KeptBytes(task.backbone.model)
    with autocast(), torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        loss = task.loss(batch) / batch.count
    if not torch.isfinite(loss):
        with autocast():
            culprit = first_nonfinite(task.backbone.model, lambda: task.logits(batch))
        raise PreflightError(f"the loss of the first batch is {loss.item()}; {culprit}")
    (loss * LOSS_SCALE).backward()  # type: ignore[no-untyped-call]
    dead = [x.site.address for x in found if x.B.grad is None or not x.B.grad.any()]
    for parameter in (*task.backbone.model.parameters(), *task.parameters()):
        parameter.grad = None
    if dead:
        raise PreflightError(
            f"{len(dead)} adapter(s) get no gradient, {dead[0]!r} among them: the loss does not depend on it; "
            "leave it out of the targets, or check that nothing between it and the loss detaches"
        )
    return kept.bytes


class KeptBytes:
    """Counts what autograd keeps for the backward pass, each storage once, parameters not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor


def first_nonfinite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Names the first module, in the order of execution, whose output is not finite."""
    found: list[str] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            tensors = [x for x in outputs if isinstance(x, Tensor)]
            if not found and any(not torch.isfinite(t).all() for t in tensors if t.is_floating_point()):
                kind = f"{type(module).__name__}, {tensors[0].dtype}"
                found.append(f"the first output that is not finite is that of {path!r} ({kind})")

        return hook

    leaves = [(path, m) for path, m in model.named_modules() if not list(m.children()) or is_linear(m)]
    handles = [module.register_forward_hook(watch(path)) for path, module in leaves if ".lora" not in path]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "every module's output is finite in a second forward, so only the gradients overflowed"


def memory_estimate(model: nn.Module, activations: int) -> str:
    """Bytes of a training step: weights, adapters with gradient and two AdamW moments, kept activations."""
    weights = sum(local_part(p).numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    total = weights + 4 * trained + activations
    text = (
        f"memory of a step, about {total / GIB:.2f} GiB: frozen weights {weights / GIB:.2f}, adapters with gradients and "
        f"AdamW's state {4 * trained / GIB:.2f}, activations kept for the backward pass {activations / GIB:.2f}"
    )
    device = next(model.parameters()).device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        if total > free + held:
            raise PreflightError(
                f"{text}; the device has {(free + held) / GIB:.2f} GiB: lower batch_size, or set checkpointing"
            )
    return text
