"""Our models with fast kernels and hooked adapters compute what transformers' classes with merged weights compute."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip.lora import attached, merging
from lora_blip.lora.call_batch import tensors_in
from lora_blip.models.loading import Backbone, recompute_contexts
from tests.support import tiny
from tests.support.models import WHOLE, inject

CAPTIONS = ("blip", "opt", "t5")
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "lengths": {"min_new_tokens": 3, "max_new_tokens": 5},
}


@pytest.fixture
def pair(make: Callable[..., Backbone], checkpoints: dict[str, Path]) -> Callable[[str], tuple[Any, Any]]:
    """Return our model with adapters, and transformers' classes with weights W + scale·BA and no hooks."""

    def both(kind: str) -> tuple[Any, Any]:
        ours = make(kind)
        adapters = inject(ours)
        plain = type(ours.model).from_pretrained(checkpoints[kind]).eval()
        for name, adapter in adapters.items():
            path = name.partition("[")[0]
            weight = plain.get_submodule(path).weight
            delta = adapter.scale * adapter.B.detach() @ adapter.A.detach()
            assert weight.shape == delta.shape
            weight.data += delta
        return ours.model, plain

    return both


def inputs(model: Any, kind: str, rows: int = 2) -> dict[str, torch.Tensor]:
    """Return random images and texts; the first text is padded on the left where the tower is a decoder."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, 90, (rows, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    if kind in ("opt", "t5"):
        image = torch.full((rows, tiny.QUERIES), model.config.image_token_index)
        ids, mask = torch.cat([image, ids], 1), torch.cat([torch.ones_like(image), mask], 1)
    images = torch.randn(rows, 3, tiny.SIDE, tiny.SIDE, generator=generator)
    return {"pixel_values": images, "input_ids": ids, "attention_mask": mask}


def forward_inputs(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return `inputs`, with the start of a text for T5's decoder: `generate` begins it itself."""
    start = {"decoder_input_ids": torch.tensor([[1, 20, 21], [1, 22, 23]])} if kind == "t5" else {}
    return inputs(model, kind) | start


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CAPTIONS)
def test_generation_is_transformers_own(pair, kind, mode):
    """Each generation mode gives the tokens of transformers' model with merged weights, and scores within rounding."""
    results = []
    for model in pair(kind):
        torch.manual_seed(4)
        named = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True} | MODES[mode]
        model_inputs = inputs(model, kind)
        if kind == "blip":
            model_inputs = {"pixel_values": model_inputs["pixel_values"]}
        named |= {"decoder_start_token_id": 1} if kind == "t5" else {}
        results.append(model.generate(**model_inputs, **named))
    ours, plain = results
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(ours.scores, plain.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", WHOLE)
def test_hidden_states_of_the_vision_tower_are_transformers_own(pair, kind):
    """Every hidden state of the ViT equals that of transformers, and a row of a batch equals the row alone."""
    (ours, plain), images = pair(kind), torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    one, other = (model.vision_model(pixel_values=images, output_hidden_states=True) for model in (ours, plain))
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    alone = ours.vision_model(pixel_values=images[1:2]).last_hidden_state
    torch.testing.assert_close(one.last_hidden_state[1:2], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", CAPTIONS)
def test_logits_and_the_saved_merged_model_are_transformers_own(pair, kind, tmp_path):
    """Logits of left-padded texts equal those of transformers, also after a merge and `save_pretrained`."""
    ours, plain = pair(kind)
    model_inputs = forward_inputs(ours, kind)
    expected = plain(**model_inputs).logits
    torch.testing.assert_close(ours(**model_inputs).logits, expected, rtol=1e-3, atol=1e-4)
    merging.merge(ours)
    ours.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**model_inputs).logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "recomputed", "recomputed by a reentrant autograd"])
@pytest.mark.parametrize("kind", CAPTIONS)
def test_gradients_are_autograd_s_of_the_plain_model(pair, kind, reentrant):
    """With y = (W + s·BA) x, dB = s · dW Aᵀ and dA = s · Bᵀ dW, with both kinds of gradient checkpointing too.

    The loss leaves padding out, as every loss of a task does. A padded position attends to nothing, and PyTorch's fused
    attention does not normalize its probabilities in the backward pass.
    """
    ours, plain = pair(kind)
    model_inputs = forward_inputs(ours, kind)
    adapters = attached.adapters(ours)
    counts = torch.ones(2, 3, 1) if kind == "t5" else model_inputs["attention_mask"][..., None]
    for address in adapters:
        plain.get_submodule(address).weight.requires_grad_()
    (plain(**model_inputs).logits.square() * counts).mean().backward()
    if reentrant is not None:
        context = {} if reentrant else {"context_fn": partial(recompute_contexts, ours)}
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant, **context})
        model_inputs["pixel_values"].requires_grad_()  # a reentrant checkpoint without such an input has no gradients
    ours.train()
    (ours(**model_inputs).logits.square() * counts).mean().backward()
    for address, adapter in adapters.items():
        d_weight, a, b = plain.get_submodule(address).weight.grad, adapter.A.detach(), adapter.B.detach()
        bound = {"rtol": 1e-3, "atol": 1e-5 * float(d_weight.abs().max())}
        torch.testing.assert_close(adapter.B.grad, adapter.scale * d_weight @ a.t(), **bound)
        torch.testing.assert_close(adapter.A.grad, adapter.scale * b.t() @ d_weight, **bound)


@torch.no_grad()
@pytest.mark.parametrize("kind", WHOLE)
def test_every_tensor_of_the_output_is_transformers_own(pair, kind):
    """Hidden states of all towers, scores, embeddings and losses equal those of transformers."""
    ours, plain = pair(kind)
    model_inputs = forward_inputs(ours, kind)
    forms: list[dict[str, Any]] = [{}]
    if kind in ("vqa", "blip"):
        forms = [{"labels": model_inputs["input_ids"]}]
    elif kind in ("itm", "itm2"):
        head = "use_itm_head" if kind == "itm" else "use_image_text_matching_head"
        forms = [{head: True}, {head: False}]
    for form in forms:
        one, other = (
            [*tensors_in(m(**model_inputs, **form, output_hidden_states=True, return_dict=True))] for m in (ours, plain)
        )
        assert len(one) == len(other) > 1
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_answers_are_transformers_own(pair):
    results = []
    for model in pair("vqa"):
        results.append(model.generate(**inputs(model, "vqa"), max_new_tokens=6, num_beams=2))
    assert torch.equal(*results)


@torch.no_grad()
def test_a_padded_row_is_the_row_alone(pair):
    """Logits and generated tokens of a left-padded OPT prompt equal those of the prompt without padding."""
    ours, _ = pair("opt")
    both = inputs(ours, "opt")
    at = tiny.QUERIES
    keep = torch.cat([both["input_ids"][:1, :at], both["input_ids"][:1, at + 2 :]], 1)  # the first text has two paddings
    alone = {"pixel_values": both["pixel_values"][:1], "input_ids": keep, "attention_mask": torch.ones_like(keep)}
    padded = {**both, "input_ids": both["input_ids"].clone(), "attention_mask": both["attention_mask"].clone()}
    padded["input_ids"][0] = torch.cat([torch.full((2,), ours.config.text_config.pad_token_id), keep[0]])
    padded["attention_mask"][0] = torch.cat([torch.zeros(2, dtype=torch.long), torch.ones_like(keep[0])])
    torch.testing.assert_close(ours(**padded).logits[:1, -3:], ours(**alone).logits[:, -3:], rtol=1e-3, atol=1e-4)
    one, other = (ours.generate(**model_inputs, max_new_tokens=6, min_new_tokens=6) for model_inputs in (padded, alone))
    assert torch.equal(one[0, -6:], other[0, -6:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "dtype"),  # T5 overflows in fp16, and `refuse_t5_fp16` refuses it
    [*((kind, torch.bfloat16) for kind in CAPTIONS), ("blip", torch.float16), ("opt", torch.float16)],
)
def test_16_bits_are_as_close_to_float32_as_transformers_own_are(pair, kind, dtype):
    """In 16 bits, the largest error of the logits is at most twice that of the plain model in the same dtype."""
    ours, plain = pair(kind)
    model_inputs = forward_inputs(ours, kind)
    truth = plain(**model_inputs).logits
    model_inputs["pixel_values"] = model_inputs["pixel_values"].to(dtype)
    merging.merge(ours)
    our_error, plain_error = ((model.to(dtype)(**model_inputs).logits.float() - truth).abs().max() for model in (ours, plain))
    assert 0 < our_error <= 2 * plain_error


@torch.no_grad()
@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_a_merged_model_exports_as_the_plain_model_does(pair, kind):
    """torch.export captures the merged model, and the exported program gives the same logits."""
    ours, plain = pair(kind)
    merging.merge(ours)
    model_inputs: dict[str, Any] = inputs(ours, kind) | ({"use_cache": False} if kind == "opt" else {})  # a cache is no tensor
    program = torch.export.export(ours, (), model_inputs, strict=False)
    torch.testing.assert_close(program.module()(**model_inputs).logits, plain(**model_inputs).logits, rtol=1e-3, atol=1e-4)
