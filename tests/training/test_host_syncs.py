"""A step waits once for the device. Tensors on the meta device have no values, so each further read raises an error.

On a GPU, a read such as `.item()`, `bool(tensor)`, `nonzero` or `tensor[mask]` waits until all queued work is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_blip.data.disk_cache import Store
from lora_blip.data.loader import CachedStates, Slot
from lora_blip.tasks import frozen_prefix
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.frozen_prefix import Prefix
from lora_blip.tasks.losses import hard_negatives
from lora_blip.training import loop
from lora_blip.training.loop import accumulate_gradients, update_parameters
from lora_blip.training.loss_scale import LossScaler
from tests.support import tiny
from tests.support.steps import EVEN, UNEVEN, Reads, host_batch, learner_on, step


class WaitError(AssertionError):
    """A GPU would make the host wait here."""


class NoWaits(TorchDispatchMode):
    """Raise WaitError for what the meta device allows and a GPU waits for: copies that block, and torch.multinomial."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().removeprefix("aten::").split(".")[0]
        to_device = name == "_to_copy" and str(kwargs.get("device")) == "meta" and args[0].device.type != "meta"
        if to_device and not kwargs.get("non_blocking"):
            raise WaitError("a copy to the device without non_blocking=True")
        if name == "multinomial" and args[0].device.type == "meta":
            raise WaitError("torch.multinomial reads its weights")
        return func(*args, **kwargs)


def no_tensor_on_meta(real: Any) -> Any:
    """Return torch.tensor with an error for a tensor on the device: its values are copied there, and the host waits."""

    def tensor(*values: Any, **named: Any) -> torch.Tensor:
        if str(named.get("device")) == "meta":
            raise WaitError("torch.tensor(…, device=…)")
        made: torch.Tensor = real(*values, **named)
        return made

    return tensor


@contextmanager
def reading_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let `read_values` return finite numbers for tensors without values. Yield the lengths of what it read."""
    lengths: list[int] = []

    def read(values: list[torch.Tensor]) -> list[float]:
        stacked = torch.stack(values)  # they must be on one device, and have one shape
        lengths.append(len(stacked))
        return [1.0] * len(stacked)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "read_values", read)
        real = torch.autocast
        patch.setattr(torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else real(kind, *a, **k))
        enabled = torch.is_autocast_enabled
        patch.setattr(torch, "is_autocast_enabled", lambda kind=None: kind != "meta" and enabled(*filter(None, [kind])))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, no_tensor_on_meta(getattr(torch, name)))
        with NoWaits():
            yield lengths


@pytest.mark.parametrize("texts", [UNEVEN, pytest.param(EVEN, marks=pytest.mark.slow)], ids=["uneven", "even"])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa", "itm", "itm2"])
def test_a_step_reads_once_from_the_device(make, monkeypatch, kind, texts):
    """One micro-batch with one text per image, and one with several; with and without checkpointing and a loss scale."""
    several = kind not in ("itm", "itm2")  # a batch of retrieval has one line per image
    for checkpointing, precision in ((False, "fp16"), (True, "fp32")):
        learner = learner_on(make, kind, "meta", precision, checkpointing)
        with reading_once(monkeypatch) as lengths:
            update = step(learner, [host_batch(kind, texts, False), host_batch(kind, texts, several)])
        assert lengths == [2] and not update.skipped and learner.progress.step == 1


@pytest.mark.parametrize(("kind", "where"), [("blip", "vit[1:2]"), ("opt", "qformer"), ("t5", "lm")])
def test_the_cache_of_the_frozen_part_reads_nothing(make, monkeypatch, tmp_path, kind, where):
    """The states of two images are computed and stored, and those of the third come from the cache."""
    learner, stored = learner_on(make, kind, "meta", where=where), []
    prefix = Prefix(learner.task.encoder, Store(tmp_path, {}, 10**9), chunk=4)
    monkeypatch.setattr(frozen_prefix, "in_host_memory", lambda x: (stored.append(x.shape) or torch.zeros(x.shape), None))
    with torch.no_grad():
        shape = prefix.compute_states(torch.empty(1, 3, tiny.SIDE, tiny.SIDE, device="meta"))[1].shape
    batch = host_batch(kind, UNEVEN, False)
    cached = CachedStates(torch.zeros(shape, dtype=torch.float16), [1], ["aa0", "bb1"])
    batch = replace(batch, pixel_values=batch.pixel_values[:2], cached_states=cached)
    with reading_once(monkeypatch) as lengths:
        step(learner, [batch, batch], prefix)
    assert lengths == [2] and stored == [(2, *shape[1:])] * 2
    prefix.writer.close()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa"])
def test_the_computation_of_a_step_has_one_read(make, kind, precision):
    """Count the reads of a step with values, on the CPU, with autocast and the loss scaler."""
    if (kind, precision) == ("t5", "fp16"):
        precision = "bf16"  # T5 in fp16 is refused
    learner = learner_on(make, kind, "cpu", precision)
    learner.scaler = LossScaler(precision == "fp16", 8.0)
    batch = learner.task.batch(host_batch(kind, UNEVEN, True))
    step(learner, [host_batch(kind, UNEVEN, True)])  # the first step of the optimizer creates its state
    learner.begin_step([batch], [Slot(0)])
    with Reads() as reads:
        accumulate_gradients(learner, batch, Slot(0), is_last=True)
        stepped: list[int] = []
        learner.optimizer.register_step_pre_hook(lambda *_: stepped.append(len(reads.names)))
        with pytest.MonkeyPatch.context() as patch:
            real = loop.read_values
            patch.setattr(loop, "read_values", lambda values: real([*map(torch.clone, values)]))
            before = len(reads.names)
            update = update_parameters(learner, 1e-3)
    of_the_list = 2  # `tolist` of one tensor reads each of its numbers
    assert before == 0 and len(stepped) == 1 and not update.skipped
    assert reads.names == [] or reads.names == ["_local_scalar_dense"] * of_the_list


WAITS = {
    "float": float,
    "bool": bool,
    "tolist": lambda x: x.tolist(),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "a blocking copy": lambda x: torch.ones(2).to(x.device),
    "a new tensor": lambda x: torch.tensor([0, 1], device=x.device),
    "multinomial": lambda x: x.detach().new_ones(3).multinomial(1),
}


@pytest.mark.parametrize("read", WAITS.values(), ids=WAITS)
def test_a_second_read_fails(make, monkeypatch, read):
    """The test above can fail: each kind of read in the loss of a task raises an error."""
    learner = learner_on(make, "blip", "meta")
    real = CaptionTask.loss
    monkeypatch.setattr(CaptionTask, "loss", lambda self, batch: (loss := real(self, batch), read(loss))[0])
    with reading_once(monkeypatch), pytest.raises((RuntimeError, NotImplementedError, WaitError)):
        step(learner, [host_batch("blip", UNEVEN, False)])


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaled_step_follows_the_law_of_the_scaler(make, overflow):
    """As torch.amp.GradScaler: an overflow changes no parameter, halves the scale and does not advance the schedule."""
    results = []
    for ours in (True, False):
        learner = learner_on(make, "blip", "cpu", "fp16")
        learner.scaler = LossScaler(True, 1024.0, growth_interval=1)
        batch = host_batch("blip", UNEVEN, False)
        batch = replace(batch, pixel_values=torch.ones_like(batch.pixel_values))
        on_device = learner.task.batch(batch)
        learner.begin_step([on_device], [Slot(0)])
        accumulate_gradients(learner, on_device, Slot(0), is_last=True)
        parameters = list(learner.parameters.values())
        if overflow:
            parameters[3].grad.view(-1)[0] = torch.inf
        before = [p.detach().clone() for p in parameters]
        if ours:
            update = update_parameters(learner, 1e-3)
            assert (update.skipped, update.scale, learner.progress.step) == (overflow, 1024.0, int(not overflow))
            scale = learner.scaler.scale
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
            scaler.scale(torch.ones(1))  # it creates its scale at the first call
            scaler.unscale_(learner.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(learner.optimizer)
            scaler.update()
            scale = scaler.get_scale()
        assert scale == (512.0 if overflow else 2048.0)
        assert all(map(torch.equal, before, parameters)) == overflow
        results.append([p.detach().clone() for p in parameters])
    assert all(map(torch.equal, *results))


def test_negatives_are_drawn_as_multinomial_draws_them():
    """The draw equals torch.multinomial with the same seed, which reads from the device."""
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    text, image = hard_negatives(similarity, torch.eye(6, dtype=torch.bool), 1.0)
    torch.manual_seed(5)
    for drawn, logits in ((text, similarity), (image, similarity.T)):
        chances = logits.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf).softmax(1).clamp(min=1e-6).fill_diagonal_(0)
        assert torch.equal(drawn, torch.multinomial(chances, 1).squeeze(1))
