"""Adapters that threads, asyncio tasks and rows choose compute on a device what they compute on the CPU in float32."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from lora_blip.data.loader import DeviceBatch
from lora_blip.lora import attached, merging
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.models.loading import load_backbone
from lora_blip.models.precision import autocasting
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from tests.support.gpu import BOUND, HALF, assert_near, pairs
from tests.support.models import EACH, TEXTS, batch_of, carry, inject
from tests.support.steps import EVEN, UNEVEN, host_batch

KINDS, FAST = ["blip", "opt", "t5"], ("blip", "bf16")
NAMES = ["caption", "vqa", "third"]


def task_on(checkpoints: Any, kind: str, device: str, fast: bool = True, checkpointing: bool = False) -> CaptionTask:
    """Return a task whose model has the three adapters of `carry`."""
    backbone = load_backbone(str(checkpoints[kind]), device, checkpointing=checkpointing, fast=fast)
    return CaptionTask(carry(backbone))


def logits_of(task: CaptionTask, batch: DeviceBatch, precision: str, names: Any) -> torch.Tensor:
    with torch.no_grad(), autocasting(task.backbone.device, precision)(), use_adapters(task.backbone.model, names):
        return task.logits(batch).float()


@pytest.fixture
def truth(checkpoints) -> Any:
    """Return the logits of each adapter on the CPU in float32, for a kind."""

    def of(kind: str) -> dict[str, torch.Tensor]:
        task = task_on(checkpoints, kind, "cpu", fast=False)
        return {name: logits_of(task, batch_of(task), "fp32", name) for name in NAMES}

    return of


@pytest.mark.parametrize(("kind", "precision"), pairs(KINDS, fast=FAST))
def test_each_thread_computes_with_its_own_adapter(checkpoints, device, truth, kind, precision):
    """Three threads compute at the same time, five times each. Each result has the bits of the first one."""
    task, together = task_on(checkpoints, kind, device), Barrier(len(NAMES))
    batch = batch_of(task)

    def request(name: str) -> torch.Tensor:
        together.wait(60)
        results = [logits_of(task, batch, precision, name) for _ in range(5)]
        assert all(torch.equal(results[0], each) for each in results)
        return results[0]

    with ThreadPoolExecutor(len(NAMES)) as pool:
        results = dict(zip(NAMES, pool.map(request, NAMES), strict=True))
    expected = truth(kind)
    for name in NAMES:
        assert_near([results[name]], [expected[name]], BOUND[precision])
    merging.merge(task.backbone.model)  # no choice is left


@pytest.mark.parametrize(("kind", "precision"), pairs(KINDS, fast=FAST))
def test_each_asyncio_task_computes_with_its_own_adapter(checkpoints, device, truth, kind, precision):
    """Tasks of one thread are inside `use_adapters` at the same time. Each also computes in a thread of its own."""
    task = task_on(checkpoints, kind, device)
    batch = batch_of(task)

    async def request(name: str, together: asyncio.Barrier) -> list[torch.Tensor]:
        with use_adapters(task.backbone.model, name):
            await together.wait()
            return [compute(), await asyncio.to_thread(compute)]

    def compute() -> torch.Tensor:
        with torch.no_grad(), autocasting(task.backbone.device, precision)():  # of the thread, not of the asyncio task
            return task.logits(batch).float()

    async def serve() -> list[list[torch.Tensor]]:
        together = asyncio.Barrier(len(NAMES))
        return await asyncio.gather(*(request(name, together) for name in NAMES))

    expected = truth(kind)
    for name, results in zip(NAMES, asyncio.run(serve()), strict=True):
        for result in results:
            assert_near([result], [expected[name]], BOUND[precision])


def gradients(task: CaptionTask, precision: str, batch: DeviceBatch, names: Any) -> list[torch.Tensor]:
    """Return the gradients of the adapters that act. The backward pass runs outside of the block of `use_adapters`."""
    model = task.backbone.model
    with autocasting(task.backbone.device, precision)(), use_adapters(model, names):
        loss = task.loss(batch) / batch.count
    (loss * 64).backward()
    halves = [half.grad for name in NAMES for x in attached.adapters(model, name).values() for half in (x.A, x.B)]
    return [half for half in halves if half is not None]


@pytest.mark.parametrize("names", ["caption", ["caption", None, "vqa"]], ids=["one", "rows"])
@pytest.mark.parametrize(("kind", "precision"), pairs(KINDS, fast=FAST))
def test_a_recomputation_uses_the_adapters_of_the_forward(checkpoints, device, kind, precision, names):
    """With checkpointing, autograd computes the blocks again in the backward pass, on CUDA in another thread."""
    results = []
    runs = ((device, precision, True, True), (device, precision, True, False), ("cpu", "fp32", False, False))
    for where, how, fast, checkpointing in runs:
        task = task_on(checkpoints, kind, where, fast, checkpointing)
        task.backbone.model.train()
        results.append(gradients(task, how, batch_of(task), names))
    recomputed, kept, truth = results
    assert_near(recomputed, kept, 2 * BOUND[precision])
    assert_near(recomputed, truth, 3 * BOUND[precision])


@pytest.mark.parametrize("several", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize(("kind", "precision"), [*pairs(["blip", "t5"], ["fp32", *HALF], fast=FAST), *pairs(["opt"], ["fp32"])])
def test_gradients_are_those_of_padded_rows_on_the_cpu(checkpoints, device, kind, precision, variant, several):
    """The fast path with one text for each image, and with packed rows. The oracle is transformers' own computation.

    OPT is compared only in float32: in 16 bits, the gradients of some batches differ by a tenth. Its losses are compared in
    `test_training.py`.
    """
    results = []
    for where, how, fast in ((device, precision, True), ("cpu", "fp32", False)):
        backbone = load_backbone(str(checkpoints[kind]), where, fast=fast)
        task = CaptionTask(backbone)
        loras = inject(backbone, variant=variant)
        torch.manual_seed(2)
        batch = task.batch(host_batch(kind, UNEVEN if several else EVEN, several))
        with autocasting(backbone.device, how)():
            loss = task.loss(batch) / batch.count
        (loss * 64).backward()
        results.append([p.grad for lora in loras.values() for p in lora.parameters()])
    assert_near(*results, 3 * BOUND[precision])


@pytest.mark.parametrize("kind", ["blip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("opt", "t5"))])
@pytest.mark.parametrize(("beams", "names"), [(1, EACH), (3, ["caption"] * len(EACH))], ids=["greedy, by row", "beams"])
def test_texts_are_those_of_the_cpu(checkpoints, device, kind, beams, names):
    """In float32, with adapters chosen for each row, or with beams. The oracle is transformers on the CPU, row by row."""
    task, plain = (task_on(checkpoints, kind, *where) for where in ((device, True), ("cpu", False)))
    for each in (task, plain):
        each.generation = Generation(max_new_tokens=6, num_beams=beams)
    batch, alone = (batch_of(each, [*TEXTS, *TEXTS][: len(names)]) for each in (task, plain))
    with torch.no_grad(), use_adapters(task.backbone.model, names if beams == 1 else names[0]):
        texts = task.predict(batch.pixel_values, batch.examples)
    for number, name in enumerate(names):
        with torch.no_grad(), use_adapters(plain.backbone.model, name) if name else disable_adapters(plain.backbone.model):
            assert plain.predict(alone.pixel_values[number : number + 1], alone.examples[:1]) == texts[number : number + 1]
    assert len(texts) == len(names) and len({str(text) for text in texts}) > 1


def test_a_new_adapter_has_the_same_numbers_on_each_device(checkpoints, device):
    """A is drawn on the CPU, so the same seed gives the same adapter."""
    ours, theirs = (inject(load_backbone(str(checkpoints["blip"]), where)) for where in (device, "cpu"))
    assert all(torch.equal(ours[name].A.cpu(), theirs[name].A) for name in theirs)
