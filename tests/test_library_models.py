"""Our models (fast kernels, hooks with adapters) compute what transformers' own classes with the merged weights compute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_blip import lora
from lora_blip.models import Backbone
from tests import tiny
from tests.conftest import WHOLE, inject

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
        found = inject(ours)
        plain = type(ours.model).from_pretrained(checkpoints[kind]).eval()
        for name, adapter in found.items():
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


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", CAPTIONS)
def test_generation_is_transformers_own(pair, kind, mode):
    """Each mode gives the tokens of the plain model, and scores within rounding."""
    results = []
    for model in pair(kind):
        torch.manual_seed(4)
        named = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True} | MODES[mode]
        given = inputs(model, kind)
        if kind == "blip":
            given = {"pixel_values": given["pixel_values"]}
        named |= {"decoder_start_token_id": 1} if kind == "t5" else {}
        results.append(model.generate(**given, **named))
    ours, plain = results
    assert torch.equal(ours.sequences, plain.sequences)
    for one, other in zip(ours.scores, plain.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", WHOLE)
def test_hidden_states_of_the_vision_tower_are_transformers_own(pair, kind):
    """Every hidden state agrees, and a row of a batch equals the row alone."""
    (ours, plain), images = pair(kind), torch.randn(3, 3, tiny.SIDE, tiny.SIDE)
    one, other = (model.vision_model(pixel_values=images, output_hidden_states=True) for model in (ours, plain))
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    alone = ours.vision_model(pixel_values=images[1:2]).last_hidden_state
    torch.testing.assert_close(one.last_hidden_state[1:2], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", CAPTIONS)
def test_logits_and_the_saved_merged_model_are_transformers_own(pair, kind, tmp_path):
    """The whole model agrees on left-padded texts; so does what `save_pretrained` writes after a merge."""
    ours, plain = pair(kind)
    given = inputs(ours, kind)
    if kind == "t5":
        given["decoder_input_ids"] = torch.tensor([[1, 20, 21], [1, 22, 23]])
    expected = plain(**given).logits
    torch.testing.assert_close(ours(**given).logits, expected, rtol=1e-3, atol=1e-4)
    lora.merge(ours)
    ours.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**given).logits, expected, rtol=1e-3, atol=1e-4)
