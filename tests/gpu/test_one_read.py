"""A step waits once for the device. CUDA's debug mode raises an error for each other wait.

On the CPU, the rehearsal raises an error for each operation that reads a value; see also tests/training/test_host_syncs.py.
"""

from dataclasses import replace
from typing import Any

import pytest

from lora_blip.data.disk_cache import Store
from lora_blip.data.loader import CachedStates, HostBatch
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.frozen_prefix import Prefix
from lora_blip.training.learner import Learner
from lora_blip.training.loss_scale import LossScaler
from tests.support.gpu import HALF, HostReadError, only_the_read_of_a_step, pairs
from tests.support.models import WHOLE
from tests.support.steps import UNEVEN, host_batch, learner_on, step

OF_A_STEP = [2]  # the gradient norm and the loss, in one read


def ready(learner: Learner, precision: str, batches: list[HostBatch], prefix: Prefix | None = None) -> list[HostBatch]:
    """Take a first step, which creates the state of the optimizer and of the libraries. Return the batches, pinned on CUDA."""
    learner.scaler = LossScaler(precision == "fp16", 8.0)
    on_cuda = learner.task.backbone.device.type == "cuda"
    pinned = [batch.pin_memory() if on_cuda else batch for batch in batches]
    step(learner, pinned, prefix)
    return pinned


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"variant": "dora"}], ids=["", "checkpointing", "dora"])
@pytest.mark.parametrize(("kind", "precision"), pairs([*WHOLE], ["fp32", *HALF], fast=("blip", "bf16")))
def test_a_step_waits_once(make, device, kind, precision, options):
    """A micro-batch with one text for each image, and one with several. A step is not skipped."""
    learner = learner_on(make, kind, device, precision, **options)
    several = kind not in ("itm", "itm2")  # a batch of retrieval has one line for each image
    batches = ready(learner, precision, [host_batch(kind, UNEVEN, False), host_batch(kind, UNEVEN, several)])
    with only_the_read_of_a_step(learner.task) as lengths:
        update = step(learner, batches)
    assert lengths == OF_A_STEP and not update.skipped and learner.progress.step == 2


@pytest.mark.parametrize("precision", HALF)
def test_a_step_with_the_cache_of_the_frozen_part_waits_once(make, tmp_path, device, precision):
    """One image of the batch has states in the cache. Those of the other one are computed and written."""
    learner = learner_on(make, "blip", device, precision, where="text")
    prefix, batch = Prefix(learner.task.encoder, Store(tmp_path, {}, 10**9)), host_batch("blip", UNEVEN, True)
    states = prefix.compute_states(batch.pixel_values[:1].to(device))[1].cpu()
    cached = CachedStates(states, [0], ["aa0"])
    batches = ready(learner, precision, [replace(batch, pixel_values=batch.pixel_values[1:], cached_states=cached)], prefix)
    with only_the_read_of_a_step(learner.task) as lengths:
        update = step(learner, batches, prefix)
    prefix.writer.close()
    assert lengths == OF_A_STEP and not update.skipped and len([*tmp_path.rglob("aa0*")]) == 1


READS: dict[str, Any] = {
    "item": lambda x: x.item(),
    "bool": bool,
    "float": float,
    "mask": lambda x: x.expand(2)[x.expand(2) > 0],
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_second_read_raises_an_error(make, monkeypatch, device, read):
    """The tests above can fail: each kind of read in the loss of a task raises an error."""
    learner = learner_on(make, "blip", device)
    batches = ready(learner, "fp32", [host_batch("blip", UNEVEN, True)])
    real = CaptionTask.loss
    monkeypatch.setattr(CaptionTask, "loss", lambda self, batch: (loss := real(self, batch), read(loss))[0])
    with (
        only_the_read_of_a_step(learner.task) as lengths,
        pytest.raises((HostReadError, RuntimeError), match=r"aten::|synchroniz"),
    ):
        step(learner, batches)
    assert lengths == []
