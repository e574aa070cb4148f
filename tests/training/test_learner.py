"""Test the step of the learner: skipped steps, the content of a checkpoint, and resuming with changed settings."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip.config import TrainConfig
from lora_blip.data.loader import Slot
from lora_blip.errors import CheckpointError
from lora_blip.tasks.caption import CaptionTask
from lora_blip.training import checkpoint, resume
from lora_blip.training.checkpoint import Saved
from lora_blip.training.learner import Learner, Progress, reseed
from lora_blip.training.loop import accumulate_gradients, update_parameters
from tests.support.models import batch_of, inject


@pytest.fixture
def learner(make: Callable[..., Any]) -> Learner:
    return learner_of(make)


def learner_of(make: Callable[..., Any], **options: Any) -> Learner:
    backbone = make("blip")
    inject(backbone, "vit")
    return Learner(CaptionTask(backbone), **options)


def accumulate(learner: Learner, count: int = 1, total: int = 1) -> None:
    """Accumulate the first `count` micro-batches of a step with `total` micro-batches."""
    batches = [batch_of(learner.task, seed=number) for number in range(total)]
    slots = [Slot(number) for number in range(total)]
    learner.begin_step(batches, slots)
    for batch, slot in list(zip(batches, slots, strict=True))[:count]:
        accumulate_gradients(learner, batch, slot, is_last=slot is slots[-1])


def values(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.parameters.values()]


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_skips_a_step_with_finite_gradients(learner, loss):
    before = values(learner)
    accumulate(learner)
    learner.loss.fill_(loss)
    update = update_parameters(learner, 1e-2)
    assert update.skipped and math.isfinite(update.grad_norm)
    assert (learner.progress.skipped, learner.progress.step, learner.progress.group) == (1, 0, 1)
    assert all(map(torch.equal, before, values(learner)))


def test_a_gradient_that_is_not_finite_skips_a_step_with_a_finite_loss(learner):
    before = values(learner)
    accumulate(learner)
    next(iter(learner.parameters.values())).grad.fill_(math.inf)
    update = update_parameters(learner, 1e-2)
    assert update.skipped and math.isfinite(update.loss) and all(map(torch.equal, before, values(learner)))


def test_only_skipped_steps_in_a_row_are_counted(learner):
    """After two skipped steps, one update and one skipped step, the count is 1, not 3."""
    counts = []
    for loss in (math.nan, math.nan, None, math.nan):
        accumulate(learner)
        if loss is not None:
            learner.loss.fill_(loss)
        update_parameters(learner, 1e-3)
        counts.append(learner.progress.skipped)
    assert counts == [1, 2, 0, 1] and (learner.progress.step, learner.progress.group) == (1, 4)


def test_the_loss_of_an_update_is_that_of_its_step_alone(learner):
    """The loss is the mean over the label tokens of the step. The next step starts from 0, with its own rate."""
    accumulate(learner, 2, total=2)
    batches = [batch_of(learner.task, seed=number) for number in range(2)]
    with torch.no_grad():
        expected = float(sum(learner.task.loss(batch) for batch in batches)) / sum(batch.count for batch in batches)
    assert learner.images == 6 and learner.progress.slot == 2
    update = update_parameters(learner, 3e-4)
    assert update.loss == pytest.approx(expected, rel=1e-5) and (update.skipped, update.scale) == (False, 1.0)
    assert [group["lr"] for group in learner.optimizer.param_groups] == [3e-4]
    assert all(parameter.grad is None for parameter in learner.parameters.values()) and learner.progress.slot == 0
    accumulate(learner)
    with torch.no_grad():
        second = float(learner.task.loss(batches[0])) / batches[0].count
    assert learner.images == 3 and update_parameters(learner, 0.0).loss == pytest.approx(second, rel=1e-5)


def test_idle_slots_of_a_rank_add_nothing(learner):
    """A rank without a micro-batch takes part in the step, but changes neither the loss nor the gradients."""
    batches = [batch_of(learner.task, seed=1), batch_of(learner.task, seed=2)]
    learner.begin_step(batches, [Slot(0), Slot(0, is_filler=True)])
    assert learner.label_count == batches[0].count and learner.images == batches[0].images
    accumulate_gradients(learner, batches[0], Slot(0), is_last=False)
    loss, gradients = float(learner.loss), [parameter.grad.clone() for parameter in learner.parameters.values()]
    accumulate_gradients(learner, batches[1], Slot(0, is_filler=True), is_last=True)
    assert float(learner.loss) == loss
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, learner.parameters.values(), strict=True))


def test_gradients_are_clipped_only_if_max_grad_norm_is_set(make):
    """Without max_grad_norm, a step of plain SGD subtracts the full gradient."""
    for most in (0.0, 1e-3):
        learner = learner_of(make, max_grad_norm=most)
        learner.optimizer = torch.optim.SGD(learner.parameters.values(), lr=1.0)
        before = values(learner)
        accumulate(learner)
        update = update_parameters(learner, 1.0)
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, values(learner), strict=True)])
        assert float(moved.norm()) == pytest.approx(most or update.grad_norm, rel=1e-3) and update.grad_norm > 0.01


def test_weight_decay_shrinks_the_adapters(make):
    """AdamW at rate lr shrinks every adapter by lr · weight_decay, however small its gradient."""
    learner = learner_of(make, weight_decay=0.5, lr=0.1)
    (group,) = learner.optimizer.param_groups
    assert (group["weight_decay"], group["lr"], len(group["params"])) == (0.5, 0.1, len(learner.parameters))


# ---------------------------------------------------------------- the state is saved and restored


def restored(make: Callable[..., Any], state: tuple[dict, dict]) -> Learner:
    other = learner_of(make)
    other.load_state_dict(*state)
    return other


def test_a_learner_resumes_bit_for_bit_in_the_middle_of_a_step(make, learner):
    """The state is saved after one of two micro-batches. After the step, adapters, moments and loss are the same."""
    accumulate(learner)
    update_parameters(learner, 1e-2)
    accumulate(learner, 1, total=2)
    state = learner.state_dict()
    other = restored(make, ({key: value.clone() for key, value in state[0].items()}, state[1]))
    assert (other.progress, other.label_count, other.images) == (learner.progress, learner.label_count, learner.images)
    assert other.progress.slot == 1 and float(other.loss) == float(learner.loss)
    updates = []
    for each in (learner, other):
        each.begin_step([batch_of(each.task, seed=n) for n in range(2)], [Slot(0), Slot(1)])  # not counted again
        accumulate_gradients(each, batch_of(each.task, seed=1), Slot(1), is_last=True)
        updates.append(update_parameters(each, 1e-2))
    assert updates[0] == updates[1] and all(map(torch.equal, values(learner), values(other)))
    one, two = learner.state_dict(), other.state_dict()
    assert one[0].keys() == two[0].keys() and all(torch.equal(one[0][key], two[0][key]) for key in one[0])
    assert one[1] == two[1] and {key.split("/")[1] for key in one[0] if key.startswith("optimizer/")} == {
        "step", "exp_avg", "exp_avg_sq"
    }  # fmt: skip


def test_between_two_steps_no_gradient_is_kept(make, learner):
    accumulate(learner)
    update_parameters(learner, 1e-2)
    tensors, state = learner.state_dict()
    assert not any(key.startswith("gradient/") for key in tensors) and state["step"] == {}
    other = restored(make, (tensors, state))
    assert all(parameter.grad is None for parameter in other.parameters.values())
    assert (other.label_count, other.images, float(other.loss)) == (1.0, 0, 0.0)


def test_a_new_learner_has_no_progress(learner):
    assert learner.progress == Progress(epoch=0, group=0, slot=0, step=0, skipped=0, validated=-1, total=0)
    assert not learner.inconsistent and (learner.images, learner.label_count, learner.traffic, float(learner.loss)) == (
        0,
        1.0,
        0,
        0.0,
    )


def test_a_step_without_a_label_divides_by_one(learner):
    """If no micro-batch of the step belongs to this rank, there is no label and no division by zero."""
    learner.begin_step([batch_of(learner.task)], [Slot(0, is_filler=True)])
    assert (learner.label_count, learner.images) == (1.0, 0)
    accumulate_gradients(learner, batch_of(learner.task), Slot(0, is_filler=True), is_last=True)
    update = update_parameters(learner, 1e-2)
    assert (update.loss, update.grad_norm, update.skipped) == (0.0, 0.0, False)


def test_a_step_whose_loss_is_not_finite_is_saved_at_its_start(make, learner):
    """The gradients and the loss so far are not written, so the resumed run computes the faulty micro-batch again."""
    accumulate(learner, 1, total=2)
    learner.loss.fill_(math.nan)
    tensors, state = learner.state_dict()
    assert state["progress"]["slot"] == 0 and state["step"] == {} and learner.progress.slot == 1
    assert not any(key.startswith("gradient/") for key in tensors)
    other = restored(make, (tensors, state))
    assert float(other.loss) == 0 and other.progress.slot == 0


def test_a_checkpoint_of_other_adapters_is_refused_before_anything_changes(make, learner):
    tensors, state = learner.state_dict()
    some = next(key for key in tensors if key.startswith("parameter/"))
    broken = [
        (
            {**tensors, "parameter/vision_model.other.lora_A": torch.zeros(1)},
            state,
            "also has tensors that this run does not have",
        ),
        ({key: value for key, value in tensors.items() if key != some}, state, "is missing in the checkpoint"),
        ({**tensors, some: torch.zeros(1, 3)}, state, r"has the shape \(1, 3\) in the checkpoint"),
        (tensors, {**state, "progress": {"epoch": 1, "dance": 2}}, r"state.json has an invalid entry \(TypeError"),
        (tensors, {key: value for key, value in state.items() if key != "step"}, r"state.json has an invalid entry \(KeyError"),
        (tensors, {**state, "step": {"count": "many"}}, r"state.json has an invalid entry \(ValueError"),
    ]
    other = learner_of(make)
    for parameter in other.parameters.values():
        parameter.data.fill_(0.5)
    for wrong_tensors, wrong_state, message in broken:
        with pytest.raises(CheckpointError, match=message):
            other.load_state_dict(wrong_tensors, wrong_state)
        assert all((parameter == 0.5).all() for parameter in other.parameters.values()) and other.progress == Progress()


def test_an_error_in_a_transaction_leaves_the_learner_inconsistent(learner):
    with learner.transaction():
        assert learner.inconsistent
    assert not learner.inconsistent
    with pytest.raises(ZeroDivisionError), learner.transaction():
        raise ZeroDivisionError
    assert learner.inconsistent


def test_reseed_determines_the_random_numbers_of_the_cpu():
    reseed(torch.device("cpu"), 5)
    first = torch.rand(4)
    reseed(torch.device("cpu"), 6)
    assert not torch.equal(torch.rand(4), first)
    reseed(torch.device("cpu"), 5)
    assert torch.equal(torch.rand(4), first)


def test_dropout_depends_on_the_place_of_a_micro_batch_alone(make):
    """The same slot, epoch and seed give the same random numbers. Another slot, epoch or seed gives others."""

    def loss(seed: int = 0, epoch: int = 0, number: int = 3, before: int = 0) -> float:
        learner = learner_of(make, seed=seed)
        for module in learner.task.backbone.model.modules():
            if hasattr(module, "site"):
                module.dropout = 0.5
        learner.task.backbone.model.train()
        learner.progress.epoch = epoch
        torch.rand(before)
        batch = batch_of(learner.task)
        learner.begin_step([batch], [Slot(number)])
        accumulate_gradients(learner, batch, Slot(number), is_last=True)
        return float(learner.loss)

    assert loss() == loss(before=7)
    assert len({loss(), loss(seed=1), loss(epoch=1), loss(number=4)}) == 4


# ---------------------------------------------------------------- a changed run


def resumed(make: Callable[..., Any], learner: Learner, folder: Path, now: dict[str, Any]) -> Learner:
    """Return a new learner that resumes from a checkpoint of `learner`, in a run with the identity `now`."""
    then = {"batch_size": 2, "accumulation": 3, "processes": 1, "lr": 0.1}
    tensors, state = learner.state_dict()
    run = folder / "lora_x"
    path = checkpoint.write(run, 1, tensors, {**state, "identity": then, "run": {"name": run.name}}, run / "none", 1)
    other = learner_of(make)
    changed = {"epochs": now.get("epochs", 6), "max_steps": now.get("max_steps", 0)}
    resume.resume_from(other, Saved(path, checkpoint.read(path).state), {**then, **now}, TrainConfig(**changed), 30)
    return other


def test_the_same_run_continues_in_the_middle_of_its_step(make, learner, tmp_path):
    accumulate(learner, 1, total=2)
    learner.progress.group, learner.progress.total = 8, 50
    other = resumed(make, learner, tmp_path, {})
    assert (other.progress.slot, other.progress.group, other.progress.total) == (1, 8, 50)
    assert any(parameter.grad is not None for parameter in other.parameters.values())


@pytest.mark.parametrize(
    ("now", "group"),
    [
        ({"lr": 0.2}, 8),
        ({"batch_size": 4}, 4),
        ({"accumulation": 1}, 24),
        ({"processes": 4}, 2),
        ({"batch_size": 3, "accumulation": 5, "processes": 2}, 1),
    ],
)
def test_a_run_with_changed_settings_continues_after_the_same_number_of_images(make, learner, tmp_path, now, group):
    """8 steps of 2 · 3 · 1 images are 48 images. The unfinished step is discarded. `total` counts the steps that are done.

    Before, it was that of a new run: with half the steps per epoch, a run ended without its last epochs.
    """
    accumulate(learner, 1, total=2)
    learner.progress.group, learner.progress.total, learner.progress.epoch, learner.progress.step = 8, 50, 4, 88
    learner.progress.validated = 80
    other = resumed(make, learner, tmp_path, now)
    assert (other.progress.slot, other.progress.group, other.progress.total) == (0, group, 88 + 2 * 30 - group)
    assert all(parameter.grad is None for parameter in other.parameters.values()) and other.progress.validated == 80
    assert resumed(make, learner, tmp_path / "2", {**now, "max_steps": 90}).progress.total == 90
    for less, message in (({"max_steps": 88}, r"in 4 epochs; set MAX_STEPS to a.*\(--max-steps\)"), ({"epochs": 4}, "EPOCHS")):
        with pytest.raises(CheckpointError, match=message):
            resumed(make, learner, tmp_path / message[:9], {**now, **less})
