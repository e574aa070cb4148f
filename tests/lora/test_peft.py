"""Law 12: with the same A and B, logits, gradients and the losses of twenty AdamW steps equal those of `peft`."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BlipForConditionalGeneration

import lora_blip
from lora_blip import find_targets
from lora_blip.errors import LoraBlipError, LoRAError, ModelError
from lora_blip.kernels import switch
from lora_blip.lora import attached, merging
from lora_blip.models.loading import Backbone, as_backbone
from lora_blip.tasks.caption import CaptionTask
from tests.support.models import batch_of, inject, kind_of

peft = pytest.importorskip("peft")


def our_and_peft_tasks(make, kind: str, variant: str = "lora", dtype: torch.dtype = torch.float32):
    """Return a task with our adapters, a task with those of peft, and pairs (our tensor, tensor of peft) of equal tensors."""
    ours, theirs = make(kind), make(kind)
    ours.model.to(dtype), theirs.model.to(dtype)
    adapters = inject(ours, r=4, alpha=8.0, variant=variant)
    ours.model.to(dtype)
    modules = list(adapters)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, lora_dropout=0.0, use_dora=variant == "dora", use_rslora=variant == "rslora"
    )
    wrapped = peft.get_peft_model(theirs.model, config, autocast_adapter_dtype=False)
    pairs = []
    for address, x in adapters.items():
        layer = wrapped.base_model.model.get_submodule(address)
        for our, other in ((x.A, layer.lora_A["default"].weight), (x.B, layer.lora_B["default"].weight)):
            other.data.copy_(our.data)
            pairs.append((our, other))
        if variant == "dora":
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.data.copy_(x.magnitude.data)
            pairs.append((x.magnitude, magnitude))
    theirs.model = wrapped.base_model.model
    return CaptionTask(ours), CaptionTask(theirs), pairs


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("fast", "bound"), [(False, 1e-6), (True, 5e-6)])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_logits_and_gradients_equal_those_of_peft(make, kind, fast, bound):
    """The relative difference of each tensor in fp32 is at most 1e-6, and 5e-6 with the fast paths (another order of sums)."""
    ours, theirs, pairs = our_and_peft_tasks(make, kind)
    for task, on in ((ours, fast), (theirs, False)):
        task.backbone.fast = on
        switch.fast(task.backbone.model, on)
    attached.fast(ours.backbone.model, fast)
    a, b = ours.logits(batch_of(ours)), theirs.logits(batch_of(theirs))
    assert kind_of(ours.backbone) == kind and relative(a, b) <= bound
    for task in (ours, theirs):
        task.loss(batch_of(task)).backward()
    assert all(our.grad.any() for our, _ in pairs)
    assert max(relative(our.grad, other.grad) for our, other in pairs) <= bound


@pytest.mark.parametrize(("fast", "bound"), [(False, 1e-6), (True, 5e-6)])
def test_on_a_trained_base_all_gradients_together_equal_those_of_peft(fast, bound):
    """Single gradients that are small differ more on the fast paths, because the order of the sums differs."""

    def load(kind: str) -> Backbone:
        backbone = lora_blip.load_backbone("assets/tiny-blip", "cpu")
        backbone.name = kind
        return backbone

    ours, theirs, pairs = our_and_peft_tasks(load, "blip")
    for task, on in ((ours, fast), (theirs, False)):
        switch.fast(task.backbone.model, on)
    attached.fast(ours.backbone.model, fast)
    a, b = ours.logits(batch_of(ours)), theirs.logits(batch_of(theirs))
    for task in (ours, theirs):
        task.loss(batch_of(task)).backward()
    own, others = (torch.cat([pair[side].grad.flatten() for pair in pairs]) for side in (0, 1))
    assert relative(a, b) <= bound and relative(own, others) <= bound


@pytest.mark.parametrize("variant", ["rslora", "dora"])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_logits_and_gradients_of_the_variants_equal_those_of_peft(make, kind, variant):
    """The relative difference of each tensor is at most 1e-13 in float64, and 1e-6 in float32; of gradients 1e-5."""
    for dtype, bound, of_gradients in ((torch.float64, 1e-13, 1e-13), (torch.float32, 1e-6, 1e-5)):
        ours, theirs, pairs = our_and_peft_tasks(make, kind, variant, dtype)
        batches = [replace(b, pixel_values=b.pixel_values.to(dtype)) for b in (batch_of(ours), batch_of(theirs))]
        for task in (ours, theirs):
            task.backbone.fast = False
            switch.fast(task.backbone.model, False)
        attached.fast(ours.backbone.model, False)
        a, b = ours.logits(batches[0]), theirs.logits(batches[1])
        assert a.dtype == dtype and relative(a, b) <= bound
        for task, batch in zip((ours, theirs), batches, strict=True):
            task.loss(batch).backward()
        assert all(our.grad.any() for our, _ in pairs)
        assert max(relative(our.grad, other.grad) for our, other in pairs) <= of_gradients


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_gradients_of_dora_are_as_near_to_float64_as_those_of_peft(make, kind):
    """Both round float32 sums in another order, which T5 amplifies: they differ by 3e-6, and each from float64 by as much."""
    gradients = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        ours, theirs, pairs = our_and_peft_tasks(make, kind, "dora")
        for task in (ours, theirs):
            task.backbone.model.to(dtype)
            task.backbone.fast = False
            switch.fast(task.backbone.model, False)
            batch = batch_of(task)
            task.loss(replace(batch, pixel_values=batch.pixel_values.to(dtype))).backward()
        gradients.append([(our.grad.double(), other.grad.double()) for our, other in pairs])
    exact = [other for _, other in gradients[0]]
    ours, theirs = ([relative(pair[side], right) for pair, right in zip(gradients[1], exact, strict=True)] for side in (0, 1))
    assert 0 < sum(ours) <= 1.2 * sum(theirs) and max(ours) <= 5e-6


@pytest.mark.parametrize("kind", ["blip", "opt", pytest.param("t5", marks=pytest.mark.slow)])
def test_twenty_adamw_steps_give_the_losses_of_peft(make, kind):
    ours, theirs, pairs = our_and_peft_tasks(make, kind)
    losses = []
    for task, parameters in ((ours, [p for p, _ in pairs]), (theirs, [p for _, p in pairs])):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        step_losses = []
        for step in range(20):
            batch = batch_of(task, seed=step)
            loss = task.loss(batch) / batch.count
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step_losses.append(loss.item())
        losses.append(torch.tensor(step_losses))
    assert losses[0][-1] < losses[0][0] and relative(*losses) <= 1e-5


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_merged_logits_equal_those_of_a_merged_peft_model(make, variant):
    ours, theirs, _ = our_and_peft_tasks(make, "blip", variant)
    merging.merge(ours.backbone.model)
    for module in theirs.backbone.model.modules():
        if hasattr(module, "get_delta_weight"):
            module.merge()
    a, b = ours.logits(batch_of(ours)), theirs.logits(batch_of(theirs))
    assert relative(a, b) <= 1e-6


@pytest.mark.parametrize(
    "use",
    [
        lambda model, _: lora_blip.inject(model, "vit"),
        lambda model, _: lora_blip.inject(model, find_targets(model, "text")),
        lambda model, _: lora_blip.find_targets(model, "vit"),
        lora_blip.load_adapter,
        lambda model, _: as_backbone(model, None),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_peft_has_changed_is_refused(make, tmp_path, use, merged):
    """peft changes a model in place, so a second adapter would be added to the first. `unload` makes it plain again."""
    source = make("blip")
    for lora in inject(source, "vit").values():
        torch.nn.init.normal_(lora.B, std=0.1)
    path = lora_blip.save_adapter(tmp_path / "adapter.safetensors", source, task={"name": "caption"})
    model = make("blip").model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv", "fc1"]))
    if merged:
        wrapped.merge_adapter()
    layer = r"vision_model\.encoder\.layers\.0\.self_attn\.qkv"
    with pytest.raises(LoraBlipError, match=rf"peft has changed this model: {layer} is .* model = peft_model\.unload\(\)"):
        use(model, path)
    assert not attached.names(model)
    with pytest.raises(LoRAError, match="peft has changed this model: the model is"):
        lora_blip.inject(wrapped, "vit")
    assert lora_blip.load_adapter(wrapped.unload(), path)


def test_a_merged_model_of_peft_is_a_base_after_its_processor_is_saved(tmp_path):
    """The steps are those of the message. Without the second, the error is a command that writes the processor."""
    base, folder = Path(__file__).parents[2] / "assets" / "tiny-blip", tmp_path / "merged's base"
    model = BlipForConditionalGeneration.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"]))
    wrapped.merge_and_unload().save_pretrained(folder)
    with pytest.raises(ModelError, match="write those of its base into the folder: python -c") as error:
        lora_blip.load_backbone(str(folder), "cpu")
    _, _, command = str(error.value).partition("folder: ")
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    subprocess.run([sys.executable, option, code.replace("BASE", base.as_posix())], check=True, timeout=240)
    assert lora_blip.Captioner.from_adapter(None, base=str(folder))(base.parents[1] / "image_test" / "000.png").text
