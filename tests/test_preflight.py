"""Preflight: each way in which training would be useless is refused, with the reason."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from lora_blip import preflight
from lora_blip.preflight import PreflightError
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.losses import IGNORE
from tests.conftest import batch_of, inject


def checked(task: CaptionTask, **changes: object) -> str:
    batch = batch_of(task)
    return preflight.check(task, replace(batch, rows=replace(batch.rows, **changes)), nullcontext)


def test_a_sound_model_passes_and_leaves_no_trace(backbone):
    inject(backbone, trained=False)
    task = CaptionTask(backbone)
    before = torch.get_rng_state()
    said = checked(task)
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in backbone.model.parameters())
    assert "cube" in said.splitlines()[1] and "|." in said.splitlines()[1] and "memory of a step" in said


def test_a_blip2_without_placeholders_is_refused(make):
    """It would train, silently blind: the text has no place where the image stands."""
    for kind in ("opt", "t5"):
        backbone = make(kind)
        inject(backbone, "lm", trained=False)
        task = CaptionTask(backbone)
        image = backbone.model.config.image_token_index
        ids = batch_of(task).rows.input_ids
        with pytest.raises(PreflightError, match=r"the model does not see them.*<image>"):
            checked(task, input_ids=ids.masked_fill(ids == image, 5))


def test_an_adapter_that_never_fires_is_refused(make, monkeypatch):
    backbone = make("blip")
    inject(backbone, "vit", trained=False)
    mlp = backbone.model.vision_model.encoder.layers[0].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.fc2(torch.nn.functional.linear(x, mlp.fc1.weight)))
    with pytest.raises(PreflightError, match=r"layers\.0\.mlp\.fc1' is not called"):
        checked(CaptionTask(backbone))


def test_an_adapter_without_gradient_is_refused(make, monkeypatch):
    backbone = make("blip")
    inject(backbone, "vit", trained=False)
    model = backbone.model.vision_model.encoder.layers[0]
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: forward(*a, **k).detach())
    with pytest.raises(PreflightError, match=r"4 adapter\(s\) get no gradient"):
        checked(CaptionTask(backbone))


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_labels_on_padding_or_on_the_prompt_are_refused(make, kind):
    backbone = make(kind)
    inject(backbone, trained=False)
    task = CaptionTask(backbone)
    targets = batch_of(task).rows.targets
    padded = targets.masked_fill(targets == IGNORE, backbone.tokenizer.convert_tokens_to_ids("a"))
    with pytest.raises(PreflightError, match=r"the labels of 'x\.png' read"):
        checked(task, targets=padded)
    with pytest.raises(PreflightError, match=r"the labels of 'x\.png' read ''"):
        checked(task, targets=torch.full_like(targets, IGNORE))


def test_a_loss_that_is_not_finite_names_the_first_module(make):
    backbone = make("blip")
    inject(backbone, "vit", trained=False)
    backbone.model.vision_model.encoder.layers[1].self_attn.projection.weight.data[0, 0] = torch.nan
    with pytest.raises(PreflightError, match=r"loss of the first batch is nan; .*'vision_model.*1\.self_attn\.projection'"):
        checked(CaptionTask(backbone))


def test_the_memory_estimate_counts_what_autograd_keeps(make):
    """Twice the images, about twice the activations; checkpointing keeps a fraction."""
    counted = {}
    for name, options, copies in (("one", {}, 1), ("two", {}, 2), ("frugal", {"checkpointing": True}, 1)):
        backbone = make("opt", **options)
        inject(backbone, trained=False)
        backbone.model.train()
        task = CaptionTask(backbone)
        counted[name] = preflight.check_gradients(task, batch_of(task, ["a red cube"] * 4 * copies))
    assert 1.7 < counted["two"] / counted["one"] < 2.2 and counted["frugal"] < 0.6 * counted["one"]
