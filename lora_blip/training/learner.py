"""What a step changes: the adapters, AdamW, the loss scaler, and how far the run is. All of it can be kept and restored."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from lora_blip.data.loader import Slot
from lora_blip.errors import CheckpointError
from lora_blip.lora import attached
from lora_blip.runtime.distributed import ALONE, Ranks, keep_alive
from lora_blip.tasks.base import DeviceBatch, Task
from lora_blip.training.checkpoint import REMEDY, take

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Update:
    loss: float  # mean over the label tokens of the whole step
    grad_norm: float  # before clipping
    skipped: bool  # nothing was changed, because a gradient was not finite
    scale: float  # of the GradScaler; 1 without it


@dataclass
class Progress:
    """The progress of a run, to the micro-batch."""

    epoch: int = 0
    group: int = 0  # steps of this epoch that were tried
    slot: int = 0  # micro-batches of the next step whose gradients are summed up already
    step: int = 0  # updates that were made
    skipped: int = 0  # steps in a row that were not
    validated: int = -1  # the step that was last validated
    total: int = 0  # updates to make


class Objective(nn.Module):
    """What DistributedDataParallel wraps: its parameters are what is trained, so that nothing else is ever synchronised."""

    def __init__(self, task: Task, trained: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.task = task
        self.trained = nn.ParameterList(trained)

    def forward(self, batch: DeviceBatch) -> Tensor:
        return self.task.loss(batch)


class Learner:
    """Sums up gradients over the micro-batches of a step, then updates: exactly what one batch of all their rows would do.

    Each label token (of retrieval: each row) weighs the same, in every micro-batch of every rank.
    """

    def __init__(
        self, task: Task, lr: float = 1e-3, weight_decay: float = 0.0, max_grad_norm: float = 0.0, precision: str = "fp32",
        autocast: Autocast = nullcontext, seed: int = 0, ranks: Ranks = ALONE, optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        self.task, self.max_grad_norm, self.autocast, self.seed, self.ranks = task, max_grad_norm, autocast, seed, ranks
        halves = {f"{a}.lora_{h}": getattr(x, h) for a, x in attached.adapters(task.backbone.model).items() for h in "AB"}
        beside = {f"task.{number}": parameter for number, parameter in enumerate(task.parameters())}
        self.parameters: dict[str, nn.Parameter] = halves | beside
        groups = [
            {"params": [*halves.values()], "weight_decay": weight_decay},
            {"params": [*beside.values()], "weight_decay": 0.0},
        ]
        kernel = task.backbone.device.type in ("cpu", "cuda")
        groups = [group for group in groups if group["params"]]
        self.optimizer = optimizer or torch.optim.AdamW(groups, lr=lr, fused=kernel)  # one kernel for all the small tensors
        self.scaler = torch.amp.GradScaler(task.backbone.device.type, enabled=precision == "fp16")
        self.objective: nn.Module = Objective(task, self.parameters.values())
        self.traffic = 0  # bytes of gradients that a rank hands to the others in a step
        if ranks.count > 1:
            self.objective = self._among_ranks(self.objective)
        self.progress = Progress()
        self.inconsistent = False  # see `transaction`
        self.images, self.count = 0, 1.0  # of the current step, over all ranks: images, and the divisor of the summed loss
        self.loss = torch.zeros((), device=task.backbone.device)  # of this rank's micro-batches so far

    # ---------------------------------------------------------------- a step

    def begin(self, micro_batches: list[DeviceBatch], slots: list[Slot]) -> None:
        """Count the label tokens and images of a step, before its first gradient. A resumed step has the counts already."""
        if self.progress.slot:
            return
        mine = [batch for batch, slot in zip(micro_batches, slots, strict=True) if not slot.is_filler]
        count, images = self.ranks.sum(sum(b.count for b in mine), sum(b.images for b in mine))
        self.count, self.images = count or 1.0, int(images)  # 0: no label in this step
        self.loss = torch.zeros_like(self.loss)

    def scaled_loss(self, batch: DeviceBatch, slot: Slot, last: bool) -> Tensor:
        """Return the share of a micro-batch in the loss of the step, times the loss scale of fp16.

        Dropout and drawn negatives depend on the slot alone, not on the micro-batches before. `last`: processes exchange
        gradients once, in the last micro-batch of a step.
        """
        reseed(self.loss.device, random.Random(f"{self.seed} {self.progress.epoch} {slot.number}").getrandbits(63))
        unsynced = isinstance(self.objective, DistributedDataParallel) and not last
        with self.objective.no_sync() if unsynced else nullcontext(), self.autocast():  # type: ignore[operator]
            share = self.objective(batch) / self.count
        share = share * 0.0 if slot.is_filler else share
        self.loss += share.detach()
        return cast(Tensor, self.scaler.scale(share))

    def backward(self, scaled_loss: Tensor) -> None:
        """Add the gradients of a micro-batch."""
        scaled_loss.backward()  # type: ignore[no-untyped-call]
        self.progress.slot += 1

    def unscale_and_clip(self) -> Tensor:
        """Divide the gradients by the loss scale, then clip their norm. Return the norm before clipping, a scalar."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm or math.inf)

    def step(self, grad_norm: Tensor, rate: float) -> Update:
        """Update the parameters at this learning rate if all is finite, and set the gradients to zero."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        norm, own = torch.stack([grad_norm, self.loss]).tolist()  # the only wait for the device in a step
        (loss,) = self.ranks.sum(own)
        finite = math.isfinite(norm) and math.isfinite(loss)
        scale = self.scaler.get_scale()
        if finite or self.scaler.is_enabled():  # the scaler itself skips the step, and then lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
        update = Update(loss, norm, not finite or self.scaler.get_scale() < scale, scale)
        self.progress.step += not update.skipped  # a skipped step does not move the schedule
        self.progress.skipped = self.progress.skipped + 1 if update.skipped else 0
        self.progress.group += 1
        self.rewind()
        return update

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Mark the state inconsistent while the block runs, and after an error in it, so that no checkpoint is made of it."""
        self.inconsistent = True
        yield
        self.inconsistent = False

    def rewind(self) -> None:
        """Return to the start of the unfinished step."""
        self.progress.slot = 0
        self.optimizer.zero_grad(set_to_none=True)

    # ---------------------------------------------------------------- kept and restored

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All tensors, on the CPU, and all numbers, of all ranks: every rank calls this at the same place."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            kept = self.optimizer.state.get(parameter, {})
            tensors |= {f"optimizer/{key}/{name}": value for key, value in kept.items()}
        step: dict[str, Any] = {}
        progress = asdict(self.progress)
        if self.progress.slot:  # the ranks' sums differ until the last micro-batch of the step
            mine = {name: p.grad.cpu() for name, p in self.parameters.items() if p.grad is not None}
            everyone = self.ranks.all_gather((mine, float(self.loss)))
            if all(math.isfinite(loss) for _, loss in everyone):
                for rank, (gradients, loss) in enumerate(everyone):
                    tensors |= {f"gradient/{rank}/{name}": value for name, value in gradients.items()}
                    step[f"loss.{rank}"] = loss
                step |= {"count": self.count, "images": self.images}
            else:
                progress["slot"] = 0  # from its start again, so that the micro-batch to blame is met again
        about = {"progress": progress, "scaler": self.scaler.state_dict(), "step": step}
        return {name: value.cpu().contiguous() for name, value in tensors.items()}, about

    def load_state_dict(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Load what `state_dict` returned. Raise CheckpointError, before anything is changed, if it is not of such a run."""
        parameters = {name: take(tensors, f"parameter/{name}", p) for name, p in self.parameters.items()}
        others = [key for key in tensors if key.startswith("parameter/") and key.removeprefix("parameter/") not in parameters]
        if others:
            raise CheckpointError(f"the checkpoint has adapters on other modules too, {others[0]!r} among them; {REMEDY}")
        try:
            progress = Progress(**about["progress"])
            step, scaler = dict(about["step"]), dict(about["scaler"])
            loss, count = float(step.get(f"loss.{self.ranks.rank}", 0)), float(step.get("count", 1))
            images = int(step.get("images", 0))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint's state.json is not understood ({type(error).__name__}: {error})") from None
        gradients = {name: tensors.get(f"gradient/{self.ranks.rank}/{name}") for name in self.parameters}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                gradient = gradients[name] if progress.slot else None
                parameter.copy_(parameters[name])
                parameter.grad = None if gradient is None else gradient.to(parameter.device)
        self.optimizer.load_state_dict(self._moments(tensors))
        if scaler:
            self.scaler.load_state_dict(scaler)
        self.progress, self.count, self.images = progress, count, images
        self.loss = torch.tensor(loss, dtype=torch.float32, device=self.task.backbone.device)

    def _moments(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The optimizer's state_dict with what a checkpoint holds of it."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        order = {names[id(p)]: number for number, p in enumerate(p for g in self.optimizer.param_groups for p in g["params"])}
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            kind, _, rest = path.partition("/")
            if kind == "optimizer":
                key, _, name = rest.partition("/")
                state.setdefault(order[name], {})[key] = value
        return {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}

    # ---------------------------------------------------------------- many ranks

    def _among_ranks(self, objective: nn.Module) -> DistributedDataParallel:
        some = self.task.needs_negatives  # its batches without a wrong pair do not reach every adapter
        wrapped = DistributedDataParallel(objective, find_unused_parameters=some)
        wrapped.register_comm_hook(self.ranks, add_up)
        gradients = sum(p.numel() * p.element_size() for p in self.parameters.values())
        self.traffic = 2 * gradients * (self.ranks.count - 1) // self.ranks.count
        return wrapped


def reseed(device: torch.device, seed: int) -> None:
    """Seed the generators that a step on this device uses. `torch.manual_seed` is slower: it seeds every kind of device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):  # it seeds the current GPU, which need not be this one
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def add_up(ranks: Ranks, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
    """Σ over the ranks of their gradients, always in the order of the ranks: the bits do not hang on the network's shape.

    Each rank sums up its share and hands it to all, 2 (ranks − 1) / ranks times the gradients' bytes, as a ring does.
    None is averaged: each gradient is divided already by what all ranks count.
    """
    own = bucket.buffer()
    shares = F.pad(own, (0, -len(own) % ranks.count))
    mine = torch.empty_like(shares)
    keep_alive(shares, mine)
    distributed.all_to_all_single(mine, shares)  # every rank's summands of my share
    total, *parts = keep_alive(reduce(torch.add, mine.chunk(ranks.count)), *shares.chunk(ranks.count))
    distributed.all_gather(parts, total)
    own.copy_(shares[: len(own)])
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(own)
    return done
