"""Texts packed into one row a picture, and the head's loss by a function of its own, are rows apart through all logits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.kernels.head_loss import head_loss
from lora_blip.lora import attached, injection, targets
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.base import Task
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.text_task import token_loss
from lora_blip.tasks.vqa import VqaTask
from tests.support import tiny
from tests.support.models import WHOLE, inject, twenty_steps

SAID = [
    ["a red cube", "a single blue cube on top of the table", "nothing"],
    ["two cubes"],
    ["a cube on a cube", "red", "a blue cube to the left of a red cube on the table", "a blue cube", "a cube"],
]
TASKS = [
    ("blip", "caption"),
    ("opt", "caption"),
    ("t5", "caption"),
    ("blip", "vqa"),
    ("vqa", "vqa"),
    ("opt", "vqa"),
    ("t5", "vqa"),
]


def task_of(backbone, name: str) -> Task:
    return CaptionTask(backbone, "a picture of") if name == "caption" else VqaTask(backbone)


def stack_of(name: str) -> HostBatch:
    """Three pictures: of one more, of one fewer is said."""
    examples, picture = [], []
    for number, texts in enumerate(SAID):
        for line, text in enumerate(texts):
            image = Path(f"{number}.png")
            asked = {"question": f"what is {'it ' * line}?", "answers": (text, "red", text)} if name == "vqa" else {}
            examples.append(Example(image, "" if asked else text, image.name, line + 1, **asked))
            picture.append(number)
    pixels = torch.randn(len(SAID), 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(4))
    return HostBatch(examples, pixels, picture)


def gradients(task: Task, batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = task.loss(batch) / batch.count
    loss.backward()
    found = attached.adapters(task.backbone.model)
    halves = {f"{address}.{half}": getattr(x, half).grad for address, x in found.items() for half in "AB"}
    for x in found.values():
        x.A.grad = x.B.grad = None
    return loss.item(), halves


def apart(batch: DeviceBatch) -> DeviceBatch:
    """The same batch with one padded row for each text, whose loss is computed from all logits."""
    return replace(batch, rows=replace(batch.rows.padded(), labels=None))


@pytest.mark.parametrize(("kind", "name"), TASKS)
def test_loss_and_gradients_are_those_of_rows_apart(kind, name, make):
    """One look at each picture, its texts in one row, labels alone through the head: to 1e-6 each row by itself."""
    task = task_of(make(kind), name)
    inject(task.backbone)
    together = task.batch(stack_of(name))
    loss, mine = gradients(task, together)
    plain, theirs = gradients(task, apart(together))
    assert loss == pytest.approx(plain, rel=1e-6)
    total, alone = 0.0, {key: torch.zeros_like(value) for key, value in theirs.items()}
    host_batch = stack_of(name)
    for row, example in enumerate(host_batch.examples):
        one = task.batch(HostBatch([example], host_batch.pixel_values[host_batch.image_index[row]][None]))
        part, some = gradients(task, replace(apart(one), count=together.count))
        total += part
        alone = {key: value + some[key] for key, value in alone.items()}
    assert loss == pytest.approx(total, rel=1e-6)
    largest = max(value.abs().max() for value in alone.values())
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-6 * float(largest))
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-6 * float(largest))


@pytest.mark.parametrize(("kind", "name"), TASKS)
def test_each_image_is_encoded_once(kind, name, make):
    task, seen = task_of(make(kind), name), []
    task.backbone.model.vision_model.embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    task.loss(task.batch(stack_of(name)))
    assert seen == [3]


def test_a_packed_row_contains_the_texts_of_its_image(make):
    """By hand: tokens side by side, positions from 0, labels only past the prompt, no text sees another."""
    task = CaptionTask(make("blip"), "a")
    host_batch = stack_of("caption")
    batch = task.batch(host_batch)
    packed, rows = batch.rows, batch.rows.padded()
    assert len(packed.ids) == 3 and packed.ids.shape[1] == max(
        sum(int(rows.attention_mask[i].sum()) for i, p in enumerate(host_batch.image_index) if p == number)
        for number in range(3)
    )
    assert packed.positions[0].tolist() == [p for row in range(3) for p in range(int(rows.attention_mask[row].sum()))] + [0] * (
        packed.ids.shape[1] - int(rows.attention_mask[:3].sum())
    )
    assert sorted(packed.labels.targets.tolist()) == sorted(rows.targets[rows.targets != IGNORE].tolist())
    sees = packed.mask(torch.float32)[:, 0] == 0
    for picture, row in enumerate(packed.text.tolist()):
        for i, one in enumerate(row):
            assert sees[picture, i].tolist() == [one == other and j <= i for j, other in enumerate(row)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_packed_are_twenty_apart(precision, make):
    """Losses of 20 steps of AdamW, five texts a picture: within 1e-5 of the plain way in fp32, 2 % in bf16."""
    losses = []
    for fast in (True, False):
        task = CaptionTask(make("blip"))
        found = inject(task.backbone, WHOLE["blip"], trained=False)
        task.backbone.fast = fast
        batch = task.batch(stack_of("caption"))
        assert (batch.rows.labels is not None) is fast
        losses.append(twenty_steps(found, lambda task=task, batch=batch: task.loss(batch) / batch.count, precision))
    assert losses[0][-1] < 0.97 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_head_s_loss_and_gradient_are_cross_entropy_s(weighted):
    """In float64 by finite differences, and against the logits' own loss."""
    torch.manual_seed(0)
    head = nn.Linear(5, 11).double().requires_grad_(False)
    states = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 11, (6,)), torch.rand(6).double() if weighted else None
    plain = token_loss(head(states)[:, None], targets[:, None], weights)
    torch.testing.assert_close(head_loss(states, head, targets, weights).float(), plain.float(), rtol=1e-6, atol=1e-6)
    (theirs,) = torch.autograd.grad(plain, states)
    (mine,) = torch.autograd.grad(3 * head_loss(states, head, targets, weights), states)
    torch.testing.assert_close(mine, 3 * theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**24])
@pytest.mark.parametrize("weight", [1.0, 1e-10, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_s_gradient_is_autograd_s_under_a_loss_scale(scale, weight, dtype):
    """A gradient of 1e-10 survives fp16, because the scale of a GradScaler is applied before the cast."""
    torch.manual_seed(0)
    head = nn.Linear(16, 300).to(dtype).requires_grad_(False)
    targets, weights = torch.randint(0, 300, (6,)), torch.full((6,), weight)
    found = []
    for mine in (True, False):
        states = torch.linspace(-1, 1, 96).view(6, 16).to(dtype).requires_grad_()
        plain = weights * nn.functional.cross_entropy(head(states).float(), targets, reduction="none")
        loss = head_loss(states, head, targets, weights) if mine else plain.sum()
        (loss / 6 * scale).backward()
        found.append(states.grad.float())
    assert bool(found[1].any()) == (scale * weight > 1e-6 or (dtype == torch.bfloat16 and weight > 0))
    if found[1].isfinite().all():
        torch.testing.assert_close(*found, rtol=2e-2, atol=max(1.2e-7, 1e-2 * float(found[1].abs().max())))
    else:
        assert not found[0].isfinite().all()


@pytest.mark.parametrize("who", ["an adapter", "a weight that is trained", "a hook"])
def test_a_head_that_is_more_than_its_weight_goes_the_plain_way(who, make):
    """Flan-T5's own head may be adapted: the packed loss, and its gradients, are those of rows apart."""
    backbone, found = make("t5"), []
    head = backbone.model.language_model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # as Flan-T5's, shared with nobody
    where = "lm" + r",language_model\.lm_head" * (who == "an adapter")
    for x in injection.inject(backbone.model, targets.find(backbone.model, where, 4, 8.0)).values():
        x.B.data.normal_(std=0.05)
    if who == "a hook":
        head.register_forward_hook(lambda _module, _args, output: output * 2)
    head.weight.requires_grad_(who == "a weight that is trained")
    for fast in (True, False):
        backbone.fast = fast
        task = CaptionTask(backbone)
        batch = task.batch(stack_of("caption"))
        assert (batch.rows.labels is not None) == fast
        loss, halves = gradients(task, batch)
        found.append([torch.tensor(loss), *halves.values(), *([] if head.weight.grad is None else [head.weight.grad])])
        head.weight.grad = None
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_no_logits_are_kept():
    """Of (labels, vocabulary) nothing is left for the backward pass."""
    head = nn.Linear(5, 1000).requires_grad_(False)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        head_loss(torch.randn(6, 5, requires_grad=True), head, torch.randint(0, 1000, (6,)))
    assert sum(kept) == 6 * 5
