"""Check the first batch before the first step.

It checks that every hook fires, that the logits depend on the image, that every B gets a gradient, and that the labels are
the texts to learn.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_blip.data.loader import DeviceBatch
from lora_blip.errors import PreflightError
from lora_blip.lora import attached
from lora_blip.lora.layer import LoRA
from lora_blip.models.finite import first_nonfinite, nonfinite_weight
from lora_blip.models.quantized import scale_bytes
from lora_blip.models.sharding import local_part
from lora_blip.runtime.counts import counted
from lora_blip.tasks.base import Task

UNITS = {"MiB": 2**20, "GiB": 2**30}
ONLY_GRADIENTS = "in a second forward, the outputs of all modules are finite, so only the gradients overflowed"
LOSS_SCALE = 1024.0  # keeps fp16 gradients of a mean loss above zero, and far below overflow


def check(task: Task, batch: DeviceBatch, autocast: Callable[[], AbstractContextManager[Any]]) -> str:
    """Return the label table and a memory estimate, to print. Raise PreflightError if a check fails."""
    model = task.backbone.model
    state = torch.get_rng_state()
    if problem := task.wrong_labels(batch):
        raise PreflightError(problem)
    with autocast():
        check_hooks(model, lambda: task.logits(batch))
        check_image_matters(task, batch)
    activations = check_gradients(task, batch, autocast)
    torch.set_rng_state(state)
    return f"{task.label_table(batch)}\n\n{memory_estimate(model, activations)}"


def check_hooks(model: nn.Module, forward: Callable[[], object]) -> None:
    """Raise PreflightError if the hook of an adapter does not fire in `forward`."""
    with torch.no_grad():
        silent = attached.unfired(model, forward)
    if silent:
        raise PreflightError(
            f"{counted(len(silent), 'adapter')} would have no effect, such as that of {silent[0]!r}: the model's forward does "
            "not call this module (it uses the module's weight directly, or not at all); remove the module from TARGETS"
        )


@torch.no_grad()
def check_image_matters(task: Task, batch: DeviceBatch) -> None:
    """Raise PreflightError if the logits do not change when the images change and the texts stay the same."""
    batch = replace(batch, cached_states=None)  # otherwise the cache would store states under the keys of other images
    reversed_images = batch.pixel_values.flip(0)
    other_images = reversed_images if not torch.equal(reversed_images, batch.pixel_values) else -batch.pixel_values
    swapped = replace(batch, pixel_values=other_images)
    if torch.equal(task.logits(batch), task.logits(swapped)):
        raise PreflightError(
            "other images give the same logits, so the model ignores the images. For a BLIP-2, check that image_token_index "
            "in its config.json is the id of <image> in its tokenizer"
        )


def check_gradients(task: Task, batch: DeviceBatch, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext) -> int:
    """Raise PreflightError if a B gets no gradient from this batch. Return the number of bytes that autograd saves.

    With CHECKPOINTING, a block is computed again in the backward pass, so the largest block is added.
    """
    adapters = [m for m in task.backbone.model.modules() if isinstance(m, LoRA) and m.B.requires_grad]
    kept = KeptBytes(task.backbone.model)
    saved = torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack)
    with autocast(), largest_block(task.backbone.model) as block_bytes, saved:
        loss = task.loss(batch) / batch.count
    if not torch.isfinite(loss):
        start = f"the loss of the first batch is {loss.item()}: "
        if weight := nonfinite_weight(task.backbone.model):
            raise PreflightError(f"{start}the weight {weight!r} contains NaN or infinity; copy or download the base again")
        with autocast():
            reason = first_nonfinite(task.backbone.model, lambda: task.logits(batch)) or ONLY_GRADIENTS
        raise PreflightError(
            f'{start}{reason}. With PRECISION = "fp16", try "bf16" or "fp32". If PRECISION is already "bf16" or "fp32", check '
            "the weights of the base model"
        )
    (loss * LOSS_SCALE).backward()  # type: ignore[no-untyped-call]
    without_gradient = [lora.site.address for lora in adapters if lora.B.grad is None or not lora.B.grad.any()]
    for parameter in (*task.backbone.model.parameters(), *task.parameters()):
        parameter.grad = None
    if without_gradient:
        raise PreflightError(
            f"{counted(len(without_gradient), 'adapter', 'get')} no gradient, such as {without_gradient[0]!r}: the loss "
            "does not depend on this module. Remove it from TARGETS, or check that no detach() or no_grad() comes between the "
            "module and the loss"
        )
    return kept.bytes + max(block_bytes, default=0)


@contextmanager
def largest_block(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list that gets the bytes that each kind of checkpointed block saves if it is computed without checkpointing."""
    block_bytes: list[int] = []
    measured: set[type] = set()

    def measure(block: Any, args: Any, kwargs: Any) -> None:
        if type(block) in measured or not (block.training and torch.is_grad_enabled()):
            return
        measured.add(type(block))
        kept = KeptBytes(block)
        block.gradient_checkpointing = False
        try:
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
                block.forward(*args, **kwargs)
        finally:
            block.gradient_checkpointing = True
        block_bytes.append(kept.bytes)

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    handles = [block.register_forward_pre_hook(measure, with_kwargs=True) for block in blocks if block.gradient_checkpointing]
    try:
        yield block_bytes
    finally:
        for handle in handles:
            handle.remove()


class KeptBytes:
    """Count the bytes that autograd saves for the backward pass: each storage once, without parameters.

    A weak reference keeps the identity of a storage from being used again, but not its memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.counted: dict[int, Any] = {}
        self.bytes = 0
        for parameter in model.parameters():
            self._is_new(parameter.untyped_storage())

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if self._is_new(storage):
            self.bytes += storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor

    def _is_new(self, storage: Any) -> bool:
        is_new = storage._cdata not in self.counted
        if is_new:
            self.counted[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return is_new


def frozen_bytes(model: nn.Module) -> int:
    """Return the bytes of the frozen weights on this rank, with the scales of quantized ones."""
    return sum(local_part(p).numel() * p.element_size() for p in model.parameters() if not p.requires_grad) + scale_bytes(model)


def memory_estimate(model: nn.Module, activations: int) -> str:
    """Return a line with the memory of a training step. Raise PreflightError if the GPU has too little.

    The memory is the sum of the frozen weights, the adapters (weights, gradients and AdamW's two moments), and the
    activations that autograd saves.
    """
    weights = frozen_bytes(model)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    total = weights + 4 * trained + activations
    unit = "GiB" if total >= UNITS["GiB"] else "MiB"
    parts = [f"{size / UNITS[unit]:.2f}" for size in (total, weights, 4 * trained, activations)]
    text = (
        f"a step needs about {parts[0]} {unit} of memory: frozen weights {parts[1]}, adapters with gradients and AdamW's state "
        f"{parts[2]}, activations for the backward pass {parts[3]}"
    )
    device = next(model.parameters()).device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        available = free + torch.cuda.memory_reserved(device)
        if total > available:
            memory = f"{available / UNITS[unit]:.2f} {unit}"
            raise PreflightError(
                f"{text}; {device} has {memory}. Lower BATCH_SIZE and raise ACCUMULATION by the same factor, or set "
                "CHECKPOINTING = True"
            )
    return text
