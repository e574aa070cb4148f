"""The state that a training step changes: adapters, AdamW, loss scaler and progress. A checkpoint contains all of it.

The step itself is in `loop.py`.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lora_blip.data.loader import DeviceBatch, Slot
from lora_blip.errors import CheckpointError
from lora_blip.kernels import paths
from lora_blip.lora import attached
from lora_blip.lora.adapter_tensors import parameters_of
from lora_blip.runtime.distributed import ALONE, Ranks, keep_alive
from lora_blip.tasks.base import Task
from lora_blip.training.checkpoint import REMEDY, checked_tensor
from lora_blip.training.loss_scale import LossScaler

Autocast = Callable[[], AbstractContextManager[Any]]
LAST_SKIPPED = 3  # a run fails if its last 3 steps or more were skipped: its adapter is probably useless


@dataclass(frozen=True)
class Update:
    """The result of one step."""

    loss: float  # mean over the label tokens of the step
    grad_norm: float  # before clipping
    skipped: bool  # no parameter was changed, because the loss or a gradient was not finite
    scale: float  # the loss scale of fp16; otherwise 1


@dataclass
class Progress:
    """The position of a run in its data, as a number of epochs, steps and micro-batches."""

    epoch: int = 0
    group: int = 0  # finished steps of this epoch, including skipped ones
    slot: int = 0  # micro-batches of the unfinished step whose gradients are accumulated (this number is no `loader.Slot`)
    step: int = 0  # updates so far, without skipped steps
    skipped: int = 0  # skipped steps since the last update
    validated: int = -1  # the step of the last validation; -1: none
    total: int = 0  # updates of the whole run

    def count_step(self, skipped: bool) -> None:
        """Count a finished step. A skipped step does not advance the learning rate schedule."""
        self.step += not skipped
        self.skipped = self.skipped + 1 if skipped else 0
        self.group += 1
        self.slot = 0

    def fails(self, max_skipped: int, epochs: int) -> bool:
        """Return True if too many steps in a row were skipped: `max_skipped`, or LAST_SKIPPED at the end of the run."""
        return self.skipped >= (max_skipped if self.epoch < epochs else min(max_skipped, LAST_SKIPPED))


class Objective(nn.Module):
    """A module that computes the loss of a task. DistributedDataParallel can wrap it.

    DistributedDataParallel synchronizes all parameters of its module. This module has only the trained parameters, so the
    frozen backbone is not synchronized.
    """

    def __init__(self, task: Task, trained: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.task = task
        self.trained = nn.ParameterList(trained)

    def forward(self, batch: DeviceBatch) -> Tensor:
        """Return the sum of the losses of the batch's label tokens (for retrieval: of its rows)."""
        return self.task.loss(batch)


class Learner:
    """The parameters, optimizer, loss scaler and progress of a run.

    A step of several micro-batches equals a step with one batch of all their rows. There are two exceptions: in retrieval, the
    negatives come from the micro-batch, and dropout draws a mask for each micro-batch. Each label token (for retrieval: each
    row) has the same weight, in every micro-batch of every process. In VQA, this weight is multiplied by that of its answer.
    """

    def __init__(
        self, task: Task, lr: float = 1e-3, weight_decay: float = 0.0, max_grad_norm: float = 0.0, precision: str = "fp32",
        autocast: Autocast = nullcontext, seed: int = 0, ranks: Ranks = ALONE, optimizer: torch.optim.Optimizer | None = None,
        lr_ratio: float = 1.0,
    ) -> None:  # fmt: skip
        self.task, self.max_grad_norm, self.autocast, self.seed, self.ranks = task, max_grad_norm, autocast, seed, ranks
        adapters = attached.adapters(task.backbone.model)
        adapter_parameters = {key: p for name, lora in adapters.items() for key, p in parameters_of(name, lora).items()}
        task_parameters = {f"task.{number}": parameter for number, parameter in enumerate(task.parameters())}
        self.parameters: dict[str, nn.Parameter] = adapter_parameters | task_parameters
        groups = [
            *adapter_groups(adapter_parameters, weight_decay, lr_ratio),
            {"params": [*task_parameters.values()], "weight_decay": 0.0},
        ]
        fused = task.backbone.device.type in ("cpu", "cuda")  # one kernel updates all the small tensors
        groups = [group for group in groups if group["params"]]
        self.optimizer = optimizer or torch.optim.AdamW(groups, lr=lr, fused=fused)
        self.scaler = LossScaler(enabled=precision == "fp16")
        self.objective: nn.Module = Objective(task, self.parameters.values())
        self.traffic = 0  # bytes of gradients that a process sends in a step
        if ranks.count > 1:
            self.objective = self._distributed(self.objective)
        self.progress = Progress()
        self.inconsistent = False  # see `transaction`
        self.label_count = 1.0  # label tokens (for retrieval: rows) of the current step, over all processes
        self.images = 0  # images of the current step, over all processes
        self.loss = torch.zeros((), device=task.backbone.device)  # sum of the losses of this process in the current step

    # ---------------------------------------------------------------- a step

    def begin_step(self, micro_batches: list[DeviceBatch], slots: list[Slot]) -> None:
        """Count the label tokens and images of a step. The counts of a resumed step are in the checkpoint."""
        if self.progress.slot:
            return
        counted = [batch for batch, slot in zip(micro_batches, slots, strict=True) if not slot.is_filler]
        label_count, images = self.ranks.sum(sum(b.count for b in counted), sum(b.images for b in counted))
        self.label_count, self.images = label_count or 1.0, int(images)  # 1 avoids a division by 0 in a step without labels
        self.loss = torch.zeros_like(self.loss)

    @contextmanager
    def forward_context(self, slot: Slot, is_last: bool) -> Iterator[None]:
        """Seed the random numbers of a micro-batch, and run the block with autocast.

        Dropout and the sampled negatives depend only on the seed, the epoch and the slot, not on earlier micro-batches.
        Processes exchange their gradients once in a step, in the backward pass of the last micro-batch.
        """
        reseed(self.loss.device, random.Random(f"{self.seed} {self.progress.epoch} {slot.number}").getrandbits(63))
        exchange_later = isinstance(self.objective, DistributedDataParallel) and not is_last
        with self.objective.no_sync() if exchange_later else nullcontext(), self.autocast():  # type: ignore[operator]
            yield

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Mark the state inconsistent while the block runs, and after an error in the block. No checkpoint is written then."""
        self.inconsistent = True
        yield
        self.inconsistent = False

    def rewind(self) -> None:
        """Discard the gradients of the unfinished step, and return to its start."""
        self.progress.slot = 0
        self.optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors, on the CPU, and the other values, for JSON. All processes must call this at the same time.

        If the loss of an unfinished step is not finite, return the state at the start of the step. The resumed run then
        repeats the micro-batch that caused this, and can report it.
        """
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            moments = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{key}/{name}": value for key, value in moments.items()}
        step: dict[str, Any] = {}
        progress = asdict(self.progress)
        if self.progress.slot:  # each process has its own gradients until the last micro-batch
            gradients_here = {name: p.grad.cpu() for name, p in self.parameters.items() if p.grad is not None}
            of_ranks = self.ranks.all_gather((gradients_here, float(self.loss)))
            if all(math.isfinite(loss) for _, loss in of_ranks):
                for rank, (gradients, loss) in enumerate(of_ranks):
                    tensors |= {f"gradient/{rank}/{name}": value for name, value in gradients.items()}
                    step[f"loss.{rank}"] = loss
                step |= {"count": self.label_count, "images": self.images}
            else:
                progress["slot"] = 0
        values: dict[str, Any] = {"progress": progress, "scaler": self.scaler.state_dict(), "step": step}
        values |= {"paths": paths.as_json(paths.row()), "packs": self.task.packs}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, values

    def load_state_dict(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Load the results of `state_dict`. Raise CheckpointError, and change nothing, if they do not fit this run."""
        parameters = {name: checked_tensor(tensors, f"parameter/{name}", p) for name, p in self.parameters.items()}
        others = [key for key in tensors if key.startswith("parameter/") and key.removeprefix("parameter/") not in parameters]
        if others:
            raise CheckpointError(
                f"the checkpoint also has tensors that this run does not have, such as {others[0]!r}; {REMEDY}"
            )
        try:
            progress = Progress(**values["progress"])
            step, scaler = dict(values["step"]), LossScaler(self.scaler.enabled)
            if values["scaler"] and self.scaler.enabled:
                scaler.load_state_dict(values["scaler"])
            loss, label_count = float(step.get(f"loss.{self.ranks.rank}", 0)), float(step.get("count", 1))
            images = int(step.get("images", 0))
            row = paths.from_json(values["paths"]) if "paths" in values else paths.row()  # older checkpoints have none
            packs = bool(values.get("packs"))  # older versions of lora_blip did not pack the texts of BLIP-2
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's state.json has an invalid entry ({type(error).__name__}: {error}); start a new run with "
                'RESUME = "off" (--resume off)'
            ) from None
        gradients = {name: tensors.get(f"gradient/{self.ranks.rank}/{name}") for name in self.parameters}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                gradient = gradients[name] if progress.slot else None
                parameter.copy_(parameters[name])
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.optimizer.load_state_dict(self._optimizer_state(tensors))
        self.task.packs = packs
        paths.use(row)  # the rounding of the paths, also on a machine on which others are faster
        self.scaler = scaler
        self.progress, self.label_count, self.images = progress, label_count, images
        self.loss = torch.tensor(loss, dtype=torch.float32, device=self.task.backbone.device)

    def _optimizer_state(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Return the state_dict of the optimizer with the tensors of a checkpoint."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        in_order = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        index_of = {names[id(parameter)]: index for index, parameter in enumerate(in_order)}
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            kind, _, rest = path.partition("/")
            if kind == "optimizer":
                key, _, name = rest.partition("/")
                state.setdefault(index_of[name], {})[key] = value
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}

    # ---------------------------------------------------------------- several processes

    def _distributed(self, objective: nn.Module) -> DistributedDataParallel:
        """Return the objective wrapped in DistributedDataParallel, with `sum_gradients` as its communication hook."""
        unused = self.task.needs_negatives  # a batch without negatives does not use every adapter
        wrapped = DistributedDataParallel(objective, find_unused_parameters=unused)
        wrapped.register_comm_hook(self.ranks, sum_gradients)
        gradient_bytes = sum(p.numel() * p.element_size() for p in self.parameters.values())
        self.traffic = 2 * gradient_bytes * (self.ranks.count - 1) // self.ranks.count
        return wrapped


def adapter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, lr_ratio: float) -> list[dict[str, Any]]:
    """Return the groups of the optimizer for the adapters: A and B, B alone with LoRA+, and DoRA's magnitudes.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354) gives B `lr_ratio` times the learning rate of A. A magnitude has no weight
    decay, because it starts at the norm of a weight, and not at 0.
    """
    parts: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "magnitude": []}
    for key, parameter in parameters.items():
        part = key.rpartition(".")[2]
        parts.setdefault("lora_A" if part == "lora_B" and lr_ratio == 1 else part, []).append(parameter)
    decays, factors = {"magnitude": 0.0}, {"lora_B": lr_ratio}
    return [
        {"params": own, "weight_decay": decays.get(part, weight_decay), "lr_factor": factors.get(part, 1.0)}
        for part, own in parts.items()
    ]


def reseed(device: torch.device, seed: int) -> None:
    """Seed the random generators of the CPU and of this device. `torch.manual_seed` seeds all of them, which is slower."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):  # `torch.cuda.manual_seed` seeds the current GPU
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def sum_gradients(ranks: Ranks, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """Replace the gradients of a bucket by their sum over the ranks. A communication hook of DistributedDataParallel.

    The ranks are always added in the same order, so the bits of the sum do not depend on the network. Each rank
    sums one chunk and sends the sum to the others. It sends 2 (ranks − 1) / ranks times the size of the gradients in total,
    as a ring all-reduce does. The sum is not divided by the number of ranks, because the loss is already divided by the label
    tokens of all ranks.
    """
    gradients = bucket.buffer()
    chunks = F.pad(gradients, (0, -len(gradients) % ranks.count))
    received = torch.empty_like(chunks)  # (ranks · chunk length,): this rank's chunk from every rank
    keep_alive(chunks, received)
    distributed.all_to_all_single(received, chunks)
    total, *parts = keep_alive(reduce(torch.add, received.chunk(ranks.count)), *chunks.chunk(ranks.count))
    distributed.all_gather(parts, total)
    gradients.copy_(chunks[: len(gradients)])
    result: torch.futures.Future[Tensor] = torch.futures.Future()
    result.set_result(gradients)
    return result
