"""Packed rows and the fused head loss equal one padded row for each text with a loss from all logits."""

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
    """Return a batch of three images with 3, 1 and 5 texts. For VQA, each text is an answer to a question."""
    examples, picture = [], []
    for number, texts in enumerate(SAID):
        for line, text in enumerate(texts):
            image = Path(f"{number}.png")
            question = {"question": f"what is {'it ' * line}?", "answers": (text, "red", text)} if name == "vqa" else {}
            examples.append(Example(image, "" if question else text, image.name, line + 1, **question))
            picture.append(number)
    pixels = torch.randn(len(SAID), 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(4))
    return HostBatch(examples, pixels, picture)


def gradients(task: Task, batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = task.loss(batch) / batch.count
    loss.backward()
    adapters = attached.adapters(task.backbone.model)
    halves = {f"{address}.{half}": getattr(x, half).grad for address, x in adapters.items() for half in "AB"}
    for x in adapters.values():
        x.A.grad = x.B.grad = None
    return loss.item(), halves


def apart(batch: DeviceBatch) -> DeviceBatch:
    """Return the batch with one padded row for each text. Its loss is computed from all logits."""
    return replace(batch, rows=replace(batch.rows.padded(), labels=None))


@pytest.mark.parametrize(("kind", "name"), TASKS)
def test_packed_loss_and_gradients_equal_those_of_padded_rows(kind, name, make):
    """Loss and gradients of packed rows equal those of padded rows and the sum over single rows, within 1e-6."""
    task = task_of(make(kind), name)
    inject(task.backbone)
    together = task.batch(stack_of(name))
    loss, gradients_packed = gradients(task, together)
    plain, gradients_padded = gradients(task, apart(together))
    assert loss == pytest.approx(plain, rel=1e-6)
    total, alone = 0.0, {key: torch.zeros_like(value) for key, value in gradients_padded.items()}
    host_batch = stack_of(name)
    for row, example in enumerate(host_batch.examples):
        one = task.batch(HostBatch([example], host_batch.pixel_values[host_batch.image_index[row]][None]))
        part, some = gradients(task, replace(apart(one), count=together.count))
        total += part
        alone = {key: value + some[key] for key, value in alone.items()}
    assert loss == pytest.approx(total, rel=1e-6)
    largest = max(value.abs().max() for value in alone.values())
    for key, value in gradients_packed.items():
        torch.testing.assert_close(value, gradients_padded[key], rtol=1e-4, atol=1e-6 * float(largest))
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-6 * float(largest))


@pytest.mark.parametrize(("kind", "name"), TASKS)
def test_each_image_is_encoded_once(kind, name, make):
    """A batch of nine texts about three images encodes three images."""
    task, image_counts = task_of(make(kind), name), []
    task.backbone.model.vision_model.embeddings.register_forward_pre_hook(lambda _, args: image_counts.append(len(args[0])))
    task.loss(task.batch(stack_of(name)))
    assert image_counts == [3]


def test_a_packed_row_contains_the_texts_of_its_image(make):
    """A packed row has the tokens of its image's texts, positions from 0 for each text, and a block mask between texts."""
    task = CaptionTask(make("blip"), "a")
    host_batch = stack_of("caption")
    batch = task.batch(host_batch)
    packed_rows, rows = batch.rows, batch.rows.padded()
    assert len(packed_rows.ids) == 3 and packed_rows.ids.shape[1] == max(
        sum(int(rows.attention_mask[i].sum()) for i, p in enumerate(host_batch.image_index) if p == number)
        for number in range(3)
    )
    assert packed_rows.positions[0].tolist() == [p for row in range(3) for p in range(int(rows.attention_mask[row].sum()))] + [
        0
    ] * (packed_rows.ids.shape[1] - int(rows.attention_mask[:3].sum()))
    assert sorted(packed_rows.labels.targets.tolist()) == sorted(rows.targets[rows.targets != IGNORE].tolist())
    sees = packed_rows.mask(torch.float32)[:, 0] == 0
    for picture, row in enumerate(packed_rows.text.tolist()):
        for i, one in enumerate(row):
            assert sees[picture, i].tolist() == [one == other and j <= i for j, other in enumerate(row)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_packed_steps_have_the_losses_of_padded_rows(precision, make):
    """Twenty AdamW steps on packed rows have the losses of padded rows, within 1e-5 in fp32 and 2 % in bf16."""
    losses = []
    for fast in (True, False):
        task = CaptionTask(make("blip"))
        adapters = inject(task.backbone, WHOLE["blip"], trained=False)
        task.backbone.fast = fast
        batch = task.batch(stack_of("caption"))
        assert (batch.rows.labels is not None) is fast
        losses.append(twenty_steps(adapters, lambda task=task, batch=batch: task.loss(batch) / batch.count, precision))
    assert losses[0][-1] < 0.97 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("weighted", [False, True])
def test_head_loss_and_its_gradient_equal_cross_entropy(weighted):
    """`head_loss` and its gradient equal cross-entropy on the head's logits."""
    torch.manual_seed(0)
    head = nn.Linear(5, 11).double().requires_grad_(False)
    states = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(0, 11, (6,)), torch.rand(6).double() if weighted else None
    plain = token_loss(head(states)[:, None], targets[:, None], weights)
    torch.testing.assert_close(head_loss(states, head, targets, weights).float(), plain.float(), rtol=1e-6, atol=1e-6)
    (expected,) = torch.autograd.grad(plain, states)
    (gradient,) = torch.autograd.grad(3 * head_loss(states, head, targets, weights), states)
    torch.testing.assert_close(gradient, 3 * expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 2.0**24])
@pytest.mark.parametrize("weight", [1.0, 1e-10, 0.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_s_gradient_is_autograd_s_under_a_loss_scale(scale, weight, dtype):
    """A gradient of 1e-10 survives fp16, because the scale of a GradScaler is applied before the cast."""
    torch.manual_seed(0)
    head = nn.Linear(16, 300).to(dtype).requires_grad_(False)
    targets, weights = torch.randint(0, 300, (6,)), torch.full((6,), weight)
    results = []
    for fused in (True, False):
        states = torch.linspace(-1, 1, 96).view(6, 16).to(dtype).requires_grad_()
        plain = weights * nn.functional.cross_entropy(head(states).float(), targets, reduction="none")
        loss = head_loss(states, head, targets, weights) if fused else plain.sum()
        (loss / 6 * scale).backward()
        results.append(states.grad.float())
    assert bool(results[1].any()) == (scale * weight > 1e-6 or (dtype == torch.bfloat16 and weight > 0))
    if results[1].isfinite().all():
        torch.testing.assert_close(*results, rtol=2e-2, atol=max(1.2e-7, 1e-2 * float(results[1].abs().max())))
    else:
        assert not results[0].isfinite().all()


@pytest.mark.parametrize("who", ["an adapter", "a weight that is trained", "a hook"])
def test_an_adapted_trained_or_hooked_head_computes_full_logits(who, make):
    """A head with an adapter, a trained weight or a hook computes full logits. The packed loss equals the padded one."""
    backbone, results = make("t5"), []
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
        results.append([torch.tensor(loss), *halves.values(), *([] if head.weight.grad is None else [head.weight.grad])])
        head.weight.grad = None
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_head_loss_saves_no_logits_for_backward():
    """`head_loss` saves only (labels, hidden) values for the backward pass, and no logits."""
    head = nn.Linear(5, 1000).requires_grad_(False)
    saved_sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved_sizes.append(x.numel()) or x, lambda x: x):
        head_loss(torch.randn(6, 5, requires_grad=True), head, torch.randint(0, 1000, (6,)))
    assert sum(saved_sizes) == 6 * 5
