"""Attention of the ViT: the fast kinds are transformers' own, in value and gradient, and leave the model what it was."""

import copy
import io

import pytest
import torch
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention

from lora_blip.kernels import switch
from lora_blip.kernels.vit import attend_at_once, by_heads, split_qkv
from lora_blip.lora import attached, injection
from lora_blip.lora import fused as fused_update
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.caption import CaptionTask
from tests.support.models import WHOLE, batch_of, inject, logits_of, twenty_steps


def by_hand(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(q kᵀ / √d) v by the book, in the dtype given."""
    q, k, v = split_qkv(qkv, heads).unbind(0)
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_computed_by_heads_equals_the_formula(threads):
    """`by_heads` and its gradient in float64, with head widths whose root is not a whole number and uneven parts."""
    torch.set_num_threads(threads)
    qkv = torch.randn(2, 7, 3 * 4 * 6, dtype=torch.float64, requires_grad=True)
    found, expected = by_heads(qkv, 4), by_hand(qkv, 4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weights).sum(), qkv)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    small = torch.randn(1, 3, 3 * 4 * 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: by_heads(x, 4), (small,), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_close_as_transformers_own_are(dtype):
    """Against float64, the error is at most half as large again as that of the eager arithmetic; so is the gradient's."""
    torch.manual_seed(0)
    qkv = (2 * torch.randn(2, 50, 3 * 64)).to(dtype)
    weights = torch.randn(2, 50, 64)

    def run(attend, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        y = attend(x, 4)
        (y.double() * weights).sum().backward()
        return [y.detach().double(), x.grad.double()]

    truth = run(by_hand, qkv.double())
    errors = [
        [(a - b).abs().max() for a, b in zip(run(f, qkv), truth, strict=True)] for f in (by_heads, attend_at_once, by_hand)
    ]
    for fast in errors[:2]:
        assert all(mine <= 1.5 * theirs for mine, theirs in zip(fast, errors[2], strict=True))


@pytest.mark.parametrize("kind", list(WHOLE))
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_with_it_are_twenty_of_transformers_own(kind, precision, make):
    """Losses of 20 steps of AdamW over the ViT: within 1e-5 in fp32 and 2 % in bf16; switched off, the bits come back."""
    backbone = make(kind)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    state = copy.deepcopy(backbone.model.vision_model.state_dict())

    def loss_of() -> torch.Tensor:
        states = backbone.model.vision_model(pixel_values=pixels).last_hidden_state
        return states.float().square().sub(1).square().mean()

    losses = []
    for on in (True, False):
        found = inject(backbone, "vit", trained=False)
        switch.fast(backbone.model, on)
        kinds = {type(m) for m in backbone.model.vision_model.modules()}
        assert bool(kinds & {BlipAttention, Blip2Attention}) is not on
        losses.append(twenty_steps(found, loss_of, precision, rate=1e-2))
        injection.eject(backbone.model)
    assert losses[0][-1] < 0.99 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-2)
    assert all(map(torch.equal, state.values(), backbone.model.vision_model.state_dict().values()))


def test_only_the_class_of_a_module_changes(make, checkpoints):
    """Names and weights stay; copies and pickles are fast too; off is transformers' own, to the bit; twice is once."""
    backbone, plain = make("blip"), load_backbone(str(checkpoints["blip"]), "cpu", fast=False)
    assert list(backbone.model.state_dict()) == list(plain.model.state_dict())
    quick = {type(m).__name__ for m in backbone.model.modules()}
    assert {"BlipVitAttention", "TextAttention"} <= quick and not quick & {"BlipAttention", "BlipTextSelfAttention"}
    inject(backbone), inject(plain)
    assert torch.allclose(logits_of(backbone), logits_of(plain), rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.save(backbone.model, file)
    file.seek(0)
    for model in (copy.deepcopy(backbone.model), torch.load(file, weights_only=False)):
        assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in backbone.model.modules()}
    switch.fast(backbone.model, False)
    switch.fast(backbone.model, False)
    attached.fast(backbone.model, False), attached.fast(plain.model, False)
    assert torch.equal(logits_of(backbone), logits_of(plain))


def test_no_scores_are_kept(make):
    """What autograd keeps of a ViT grows with the number of patches, not with its square."""
    from lora_blip.tasks.caption import CaptionTask

    config = make("blip").model.config.vision_config
    patches = (config.image_size // config.patch_size) ** 2 + 1

    def kept(on: bool) -> int:
        backbone = make("blip")
        inject(backbone, "vit")
        switch.fast(backbone.model, on)
        task, seen, total = CaptionTask(backbone), set(), 0

        def note(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            if tensor.ndim >= 3 and tensor.shape[-2:] == (patches, patches) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            task.loss(batch_of(task)).backward()
        return total

    assert kept(True) == 0 < kept(False)


def test_a_vit_with_dropout_runs_the_method_of_transformers(make):
    """A ViT that was given attention dropout draws it, which the fast kinds would not."""
    model = make("blip").model.train()
    layer = model.vision_model.encoder.layers[0].self_attn
    layer.dropout.p = 0.5
    x = torch.randn(1, 5, layer.embed_dim)
    assert not torch.equal(layer(x)[0], layer(x)[0]) and layer(x)[1] is not None


def test_the_output_of_a_hooked_gelu_is_kept(make, monkeypatch):
    """fc2 computes its input again from fc1's output only where that is all there is between them."""
    monkeypatch.setattr(fused_update, "SMALL", 0)
    found = []
    for on in (True, False):
        backbone = make("blip")
        adapted = inject(backbone, "vit")
        attached.fast(backbone.model, on)
        for block in backbone.model.vision_model.encoder.layers:
            block.mlp.activation_fn.register_forward_hook(lambda _m, _a, y: 3 * y)
        task = CaptionTask(backbone)
        task.loss(batch_of(task)).backward()
        found.append([half.grad for x in adapted.values() for half in (x.A, x.B)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
