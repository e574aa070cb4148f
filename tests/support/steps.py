"""One training step on any device, with batches of three lines, and what it reads from the device."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch, Slot
from lora_blip.models.precision import autocasting
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.tasks.vqa import VqaTask
from lora_blip.training.learner import Learner
from lora_blip.training.loop import accumulate_gradients, update_parameters
from tests.support import tiny
from tests.support.models import inject

TASKS: dict[str, Any] = {"blip": CaptionTask, "opt": CaptionTask, "t5": CaptionTask, "vqa": VqaTask}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "item", "unique_dim", "_unique2"}
UNEVEN = ["a red cube", "a single blue cube on top of the table", "nothing"]
EVEN = ["a red cube", "a blue cube", "a green cube"]


def host_batch(kind: str, texts: list[str], several: bool) -> HostBatch:
    """Return a batch of three lines. several: the first two lines have one image."""
    index = [0, 0, 1] if several else None
    names = [f"{number}.png" for number in index or range(3)]
    asks: Any = {"question": "what is it ?", "answers": ("a cube", "a red cube")} if kind == "vqa" else {}
    examples = [Example(Path(name), text, name, 1, **asks) for name, text in zip(names, texts, strict=True)]
    return HostBatch(examples, torch.randn(2 if several else 3, 3, tiny.SIDE, tiny.SIDE), index)


def learner_on(
    make: Any, kind: str, device: str, precision: str = "fp32", checkpointing: bool = False, variant: str = "lora",
    where: str = "",
) -> Learner:  # fmt: skip
    backbone = make(kind)
    inject(backbone, where, variant=variant)
    backbone.model.to(device).train()
    if checkpointing:
        backbone.model.vision_model.gradient_checkpointing_enable({"use_reentrant": False})
    task = TASKS.get(kind, RetrievalTask)(replace(backbone, device=torch.device(device)))
    autocast = nullcontext if device == "meta" else autocasting(torch.device(device), precision)
    return Learner(task, max_grad_norm=1.0, precision=precision, autocast=autocast)


def step(learner: Learner, host_batches: list[HostBatch], prefix: Any = None) -> Any:
    """Run the code of a step, from the batches in CPU memory to the update."""
    batches = [learner.task.batch(batch, prefix) for batch in host_batches]
    slots = [Slot(number) for number in range(len(batches))]
    learner.begin_step(batches, slots)
    for batch, slot in zip(batches, slots, strict=True):
        accumulate_gradients(learner, batch, slot, slot is slots[-1])
    return update_parameters(learner, 1e-3)


def reads_a_value(func: Any, args: Any) -> bool:
    """True if an operation reads a value, or if the shape of its result depends on values."""
    name = func.name().removeprefix("aten::").split(".")[0]
    masks = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
    return name in READS or masks


class Reads(TorchDispatchMode):
    """Record the operations that read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if reads_a_value(func, args):
            self.names.append(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))
