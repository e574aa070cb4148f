"""Frozen weights that are cast once give the bits of autocast, which casts them at every use."""

import copy

import pytest
import torch

from lora_blip.errors import LoRAError
from lora_blip.lora import adapter_file, injection, sites
from lora_blip.lora.sites import Site
from lora_blip.models import weights
from lora_blip.models.precision import DTYPES, autocasting
from lora_blip.tasks.registry import TASKS, default_task
from tests.support.models import WHOLE, batch_of, inject


@pytest.mark.parametrize(("kind", "precision"), [(kind, "bf16") for kind in WHOLE] + [(k, "fp16") for k in WHOLE if k != "t5"])
def test_outputs_are_the_bits_of_autocast_s_own_casting(kind, precision, make):
    """Outputs and adapter gradients with weights cast once equal those of autocast, bit for bit."""
    results = []
    for cast in (False, True):
        backbone = make(kind)
        halves = inject(backbone)
        if cast:
            weights.cast_once(backbone, precision)
            weights.cast_once(backbone, precision)
        task = TASKS[default_task(backbone.architecture)](backbone)
        batch = batch_of(task) if task.name == "caption" else None
        with autocasting(backbone.device, precision)():
            if batch is not None:
                logits, loss = task.logits(batch), task.loss(batch)
            else:
                logits = task.encoder.encode_images(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
                loss = logits.float().square().mean()
        loss.backward()
        results.append([logits, loss, *(x.A.grad for x in halves.values() if x.A.grad is not None)])
    assert len(results[0]) == len(results[1]) > 2 and all(map(torch.equal, *results))


def test_modules_that_autocast_does_not_cast_stay_in_float32(make):
    """`cast_once` casts only the frozen linears to 16 bits. Adapters, other modules and parameter names do not change."""
    backbone = make("blip")
    inject(backbone)
    before = copy.deepcopy(backbone.model.state_dict())
    weights.cast_once(backbone, "bf16")
    after = backbone.model.state_dict()
    linears = {path for path, m in backbone.model.named_modules() if isinstance(m, torch.nn.Linear) and "." in path}
    assert list(after) == list(before)
    for key, value in after.items():
        cast = key.rpartition(".")[0] in linears
        assert value.dtype == (torch.bfloat16 if cast else before[key].dtype) and torch.equal(
            value, before[key].to(value.dtype)
        )
    assert not any(p.requires_grad for n, p in backbone.model.named_parameters() if ".lora." not in n)


def test_a_head_that_was_tied_before_the_cast_is_refused(make):
    """An adapter on a tied head is refused also after the cast, when the head no longer shares memory with the embeddings."""
    backbone = make("blip")
    head = "text_decoder.cls.predictions.decoder"
    assert head in sites.tied(backbone.model)
    weights.cast_once(backbone, "bf16")
    assert head in sites.tied(backbone.model)
    with pytest.raises(LoRAError, match="shares its weight"):
        injection.inject(backbone.model, [Site(head)])


def test_the_fingerprint_is_that_of_the_weights_before_the_cast(make, tmp_path):
    """The adapter's fingerprint is that of the weights before the cast, so another base is detected."""
    backbone = make("blip")
    inject(backbone)
    exact = adapter_file.save(tmp_path / "exact.safetensors", backbone)
    weights.cast_once(backbone, "bf16")
    saved = adapter_file.read(adapter_file.save(tmp_path / "cast.safetensors", backbone))
    assert saved.metadata["base"]["samples"] == adapter_file.read(exact).metadata["base"]["samples"]
    adapter_file.load(make("blip"), saved)


def test_in_fp32_and_for_weights_in_16_bits_nothing_changes(make):
    for dtype, precision in (("fp32", "fp32"), ("bf16", "bf16")):
        backbone = make("opt", dtype=dtype)
        before = {name: p for name, p in backbone.model.named_parameters() if p.dtype == DTYPES[dtype]}
        weights.cast_once(backbone, precision)
        after = dict(backbone.model.named_parameters())
        assert before and all(after[name] is p for name, p in before.items())


@pytest.mark.parametrize("kind", ["itm", "itm2"])
def test_retrieval_still_computes_its_heads_in_float32(kind, make):
    """Cosines and match scores under autocast are the same bits with and without cast weights."""
    results = []
    for cast in (False, True):
        backbone = make(kind)
        inject(backbone)
        if cast:
            weights.cast_once(backbone, "bf16")
        matcher = TASKS["retrieval"](backbone).matcher
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        texts = matcher.tokenize(["a red cube", "a blue cube on a cube"])
        with torch.no_grad(), autocasting(backbone.device, "bf16")():
            states = matcher.encode_images(pixels)
            results.append([matcher.image_features(states), matcher.text_features(texts), matcher.matching(states, texts)])
    assert all(map(torch.equal, *results)) and all(value.dtype == torch.float32 for value in results[1])
