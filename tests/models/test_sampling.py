"""Random draws: each row has its own, and they have the distribution of torch.multinomial."""

from typing import Any

import numpy as np
import pytest
import torch

from lora_blip.data.example import Example
from lora_blip.errors import ModelError
from lora_blip.models import sampling
from lora_blip.models.sampling import RowSampling, image_keys, inverse_cdf
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.vqa import VqaTask
from tests.support.hugging_face import hugging_face
from tests.support.questions import examples, pictures

SAMPLED = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 6, "min_new_tokens": 4}


@pytest.mark.parametrize("more", [{}, {"num_beams": 3, "temperature": 6.0}, {"num_return_sequences": 3}])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa"])
def test_a_draw_depends_on_seed_and_image_and_not_on_the_batch(make, kind, more):
    """Sampled texts depend on the seed and the image, and not on the batch or its order."""
    task: Any = (VqaTask if kind == "vqa" else CaptionTask)(make(kind), "", Generation.of(SAMPLED | more))
    some, images = examples(), pictures(4)

    def texts(rows: list[int]) -> list[list[str]]:
        scored = task.predict_scored(images[rows], [some[row] for row in rows])
        return [[text for text, _ in of_row] for of_row in scored]

    together = texts([0, 1, 2, 3])
    assert texts([2, 0]) == [together[2], together[0]] and texts([3, 3, 1]) == [together[3], together[3], together[1]]
    assert len({tuple(row) for row in together}) >= (2 if "num_beams" in more else 4)  # a beam search is less random
    assert task.predict(images, some) == [row[0] for row in together]
    task.generation = Generation.of(SAMPLED | more, seed=1)
    again = texts([0, 1, 2, 3])
    assert again != together and ("num_beams" in more or all(a != b for a, b in zip(again, together, strict=True)))
    if more.get("num_return_sequences"):
        assert all(len(set(row)) == 3 for row in together)


def test_draws_of_a_question_differ_from_those_of_another(make):
    task = VqaTask(make("vqa"), "", Generation.of(SAMPLED))
    keys: list[Any] = []
    real = sampling._number_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_number_of", lambda *key: (keys.append(key), real(*key))[1])
        task.predict(pictures(1)[[0, 0]], examples()[:2])
    (one, other) = keys
    assert one[:2] == other[:2] and one[2] != other[2]


def test_validation_draws_by_the_name_of_the_image(make):
    """Cached states have no pixels, so validation seeds each draw with the name of the image."""
    task, images = CaptionTask(make("blip"), "", Generation.of(SAMPLED)), pictures(3)
    some = [Example(e.image, "", e.name, 0) for e in examples()[:3]]
    with torch.no_grad():
        features = task.language.encode_images(images)
    together = task.predict_from_features(features, some)
    assert task.predict_from_features(features[[2, 0]], [some[2], some[0]]) == [together[2], together[0]]
    with pytest.raises(ValueError, match="pass `images`"):
        task.language.generate_from_features(features, [""] * 3, **SAMPLED)


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_sampled_texts_are_those_of_transformers_with_these_draws(make, kind):
    """Sampled texts equal those of transformers' `generate` inside `RowSampling`, with temperature, top-k and top-p."""
    task, images = CaptionTask(make(kind)), pictures(3)
    for more in ({"top_p": 0.7}, {"top_k": 5, "num_beams": 2}, {"num_return_sequences": 2, "min_p": 0.05}):
        options = SAMPLED | more
        keys = [(key, "") for key in image_keys(images)]
        copies = more.get("num_return_sequences", 1)
        with RowSampling(4, keys, int(copies)):
            expected = hugging_face(task, images, "", **options)
        scored = task.language.generate_scored(images, [""] * 3, seed=4, **options)
        assert [sorted(text for text, _ in row) for row in scored] == [
            sorted(expected[n : n + int(copies)]) for n in range(0, len(expected), int(copies))
        ]
        assert all(row == sorted(row, key=lambda each: -each[1]) for row in scored if not more.get("num_beams"))


def test_the_global_generator_is_not_used(make):
    task = CaptionTask(make("blip"), "", Generation.of(SAMPLED))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = task.predict(pictures(2), examples()[:2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert task.predict(pictures(2), examples()[:2]) == first


def test_draws_have_the_distribution_of_multinomial() -> None:
    """First draws follow the weights. Pairs without replacement have the probability p(i) · p(j) / (1 - p(i))."""
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    count = 40_000
    uniform = torch.from_numpy(np.random.default_rng(0).random((count, 2)))
    drawn = inverse_cdf(p.expand(count, -1), uniform)
    pairs = torch.zeros(5, 5, dtype=torch.float64).index_put(
        (drawn[:, 0], drawn[:, 1]), torch.ones(count, dtype=torch.float64), accumulate=True
    )
    expected = p[:, None] * p[None] / (1 - p[:, None]) * (1 - torch.eye(5, dtype=torch.float64))
    assert (pairs / count - expected).abs().max() < 4 * (0.25 / count) ** 0.5
    assert pairs[1].sum() == pairs[:, 1].sum() == 0


def test_edges_of_a_draw() -> None:
    """0 and nearly 1 hit tokens with a weight; if no weight is left, each token is drawn once; a sum of NaN is an error."""
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0]], dtype=torch.float64)
    largest = (sampling.RESOLUTION - 1) / sampling.RESOLUTION
    assert inverse_cdf(weights, torch.tensor([[0.0]])).tolist() == [[1]]
    assert inverse_cdf(weights, torch.tensor([[largest]], dtype=torch.float64)).tolist() == [[3]]
    assert sorted(inverse_cdf(weights, torch.full((1, 5), largest, dtype=torch.float64)).tolist()[0]) == [0, 1, 2, 3, 4]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match="not finite"):
            inverse_cdf(torch.tensor([[0.5, wrong]], dtype=torch.float64), torch.zeros(1, 1))


def test_a_library_that_samples_in_another_way_is_an_error() -> None:
    """A library that samples by another function raises an error, because draws would depend on the batch.

    Other errors pass unchanged.
    """
    with pytest.raises(ModelError, match=r"samples in a way that lora_blip does not know"), RowSampling(0, [("image", "")]):
        torch.rand(3)
    with pytest.raises(KeyError), RowSampling(0, [("image", "")]):
        raise KeyError
