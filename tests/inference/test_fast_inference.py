"""Test that fast inference changes no text: shared keys for beams, each image encoded once, and images decoded in advance."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_blip.data import prefetch
from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch
from lora_blip.data.prefetch import Lookahead
from lora_blip.errors import ImageError
from lora_blip.inference.batch_runner import Runner
from lora_blip.kernels import switch
from lora_blip.lora import merging
from lora_blip.lora.routing import use_adapters
from lora_blip.models.distinct_images import distinct
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.vqa import VqaTask
from lora_blip.training.validation import validate
from tests.support import tiny
from tests.support.hugging_face import hugging_face
from tests.support.models import EACH, PROMPTS, carry, inject
from tests.support.questions import ASKED, examples, pictures

PROMPT = "a picture of"


@pytest.mark.parametrize(
    ("beams", "prompt"),
    [
        (1, ""),
        (3, PROMPT),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, PROMPT), (3, ""), (5, ""), (5, PROMPT))),
    ],
)
def test_captions_are_those_of_hugging_face_s_generate(backbone, beams, prompt):
    """Test batches of 1 to 4, with hooks and merged. Texts end with the end token or at the largest length."""
    inject(backbone)
    task = CaptionTask(backbone, prompt)
    for batch in (1, 2, 3, 4):
        images = pictures(batch, seed=batch)
        for least in (0, 7):
            settings = {"max_new_tokens": 7, "num_beams": beams, "do_sample": False, "min_new_tokens": least}
            expected = hugging_face(task, images, prompt, **settings)
            assert task.language.generate(images, [prompt] * batch, **settings) == expected and all(expected)
        merging.merge(backbone.model) if batch == 2 else merging.restore(backbone.model)


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_answers_to_ragged_questions_are_the_same_with_either_attention(make, beams):
    """The oracle is transformers' own attention, which repeats the keys for each beam. test_vqa compares the answers."""
    task = VqaTask(make("vqa"), "", Generation(max_new_tokens=8, num_beams=beams))
    inject(task.backbone)
    some, images = examples(), pictures(len(ASKED))
    fast = task.predict(images, some)
    switch.fast(task.backbone.model, False)
    assert task.predict(images, some) == fast and any(fast)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_rows_of_several_adapters_are_the_same_with_either_attention(make, kind, beams):
    backbone = carry(make(kind))
    language, texts = CaptionTask(backbone).language, []
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    for on in (True, False):
        switch.fast(backbone.model, on)
        texts.append(language.generate(pictures(len(EACH), 5), PROMPTS, EACH, **settings))
    assert texts[0] == texts[1]
    assert texts[0] != language.generate(pictures(len(EACH), 5), PROMPTS, [None] * len(EACH), **settings)


@pytest.mark.parametrize("kind", ["blip", "vqa"])
def test_the_keys_of_an_encoded_image_are_computed_once(make, kind):
    """Test two images with five beams and all tokens, and one image with all ranked texts."""
    task = (VqaTask if kind == "vqa" else CaptionTask)(make(kind), "", Generation(max_new_tokens=6, num_beams=5))
    row_counts: list[int] = []
    for block in task.backbone.model.text_decoder.bert.encoder.layer:
        block.crossattention.self.key.register_forward_hook(lambda _m, args, _o: row_counts.append(len(args[0])))
    task.predict(pictures(2), examples()[:2])
    assert row_counts == [2] * tiny.LAYERS
    row_counts.clear()
    task.rank(pictures(1), examples()[:1], ["red", "two cubes", "nothing", "no", "yes"])
    assert row_counts == [1] * tiny.LAYERS


# ---------------------------------------------------------------- each image is encoded once


def watched(model: Any) -> list[int]:
    """Return a list that gets the number of images at each call of the ViT."""
    encoded_rows: list[int] = []
    model.vision_model.register_forward_pre_hook(
        lambda _m, _a, k: encoded_rows.append(len(k["pixel_values"])), with_kwargs=True
    )
    return encoded_rows


@pytest.mark.parametrize("kind", ["vqa", "blip", "opt", "t5"])
def test_several_questions_about_an_image_encode_it_once(make, kind):
    """The questions have different lengths, also in separate groups. The answers equal those to single questions."""
    task = VqaTask(make(kind), "", Generation(max_new_tokens=6))
    some, images = examples(), pictures(2)[[0, 1, 0, 0]]
    alone = [task.predict(images[n : n + 1], some[n : n + 1])[0] for n in range(4)]
    encoded_rows = watched(task.backbone.model)
    assert task.predict(images, some) == alone and encoded_rows == [2]
    texts = ["red", "no", "two cubes"]
    rankings = task.rank(images, some, texts)
    assert encoded_rows == [2, 2]
    for n in range(4):
        torch.testing.assert_close(task.rank(images[n : n + 1], some[n : n + 1], texts)[0], rankings[n], rtol=1e-4, atol=1e-6)


def test_an_image_in_rows_of_two_adapters_is_encoded_by_each(make):
    backbone = carry(make("blip"))
    language: Any = CaptionTask(backbone).language
    images, each = pictures(1)[[0, 0, 0, 0]], ["vqa", None, "vqa", "caption"]
    settings = {"max_new_tokens": 8, "do_sample": False}
    separate = [language.generate(images[:1], [""], [name], **settings)[0] for name in each]
    encoded_rows = watched(backbone.model)
    assert language.generate(images, [""] * 4, each, **settings) == separate and encoded_rows == [3] and len(set(separate)) == 3
    with use_adapters(backbone.model, each):  # in a block with adapters by row, each row is encoded
        assert language.generate(images, [""] * 4, **settings) == separate and encoded_rows == [3, 4]


def test_images_are_equal_only_if_all_bits_are_equal():
    """Compare with a comparison of all pairs. Images that differ in one value, at any position, are different."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 40, 40, generator=generator)[[0, 1, 0, 2, 1, 0]]
    images[2, 1, 7, 9] += 1e-6
    first, index = distinct(images)
    assert first == [0, 1, 2, 3] and index == [0, 1, 2, 3, 1, 0]
    assert distinct(images, ["a", "b", "a", "a", "c", "a"]) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0])
    for place in range(0, images[0].numel(), 101):
        twins = images[[0, 0]]
        twins[1].view(-1)[place] += 1e-6
        assert distinct(twins)[0] == [0, 1]


@pytest.mark.parametrize("kind", ["vqa", "blip", "opt", "t5"])
def test_validation_encodes_each_image_once_with_the_same_scores(make, kind):
    task = VqaTask(make(kind), "", Generation(max_new_tokens=5))
    some, images = examples(), pictures(4)
    host_batches = [HostBatch(some[:3], images[:3]), HostBatch(some[3:], images[3:])]
    batches = [task.batch(host_batch) for host_batch in host_batches]
    with torch.no_grad():
        loss = sum(float(task.loss(batch)) for batch in batches) / sum(batch.count for batch in batches)
    predicted = {task.subject(e): text for e, text in zip(some, task.predict(images, some), strict=True)}
    encoded_rows = watched(task.backbone.model)
    loader: Any = Loader(host_batches, some)
    scores = validate(task, loader, torch.no_grad)
    assert encoded_rows == [3, 1]
    assert (
        scores["loss"] == pytest.approx(loss, rel=1e-5)
        and scores["vqa_accuracy"] == task.scores(predicted, some)["vqa_accuracy"]
    )


class Loader(list):
    """Batches as a loader returns them."""

    def __init__(self, host_batches: list[HostBatch], some: list[Example]) -> None:
        super().__init__(host_batches)
        self.batch_sampler, self.dataset = SimpleNamespace(), SimpleNamespace(examples=some)


def test_a_question_with_many_answers_is_encoded_once(make):
    task = VqaTask(make("t5"))
    some = examples()
    batch = task.batch(HostBatch(some, pictures(len(some))))
    read: list[int] = []
    encoder = task.backbone.model.language_model.encoder
    encoder.register_forward_pre_hook(lambda _m, _a, k: read.append(len(k["inputs_embeds"])), with_kwargs=True)
    task.logits(batch)
    assert read == [len(some)] and len(batch.rows.padded().targets) > len(some)


# ---------------------------------------------------------------- decoded ahead


@pytest.fixture
def photos(tmp_path: Path) -> list[Example]:
    tiny.write_photos(tmp_path, 11)
    return [Example(tmp_path / "photos" / f"{n}.png", "", f"{n}.png", n) for n in range(11)]


def runner(size: int) -> Runner:
    model = torch.nn.Linear(1, 1)
    backbone = SimpleNamespace(model=model, device=torch.device("cpu"), image_processor=tiny.image_processor())
    task: Any = SimpleNamespace(backbone=backbone, output_modules=list)
    return Runner(task, size)


def opened(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Callable[[str], bool]]:
    """Return the list of opened images, and a function that waits until an image is opened."""
    real, names, change = prefetch.open_example, [], threading.Condition()

    def noting(example: Example) -> Any:
        with change:
            names.append(example.image.stem)
            change.notify_all()
        return real(example)

    def wait(name: str) -> bool:
        with change:
            return change.wait_for(lambda: name in names, timeout=20)

    monkeypatch.setattr(prefetch, "open_example", noting)
    return names, wait


def test_only_the_next_batch_is_decoded_while_the_model_computes(photos, monkeypatch):
    """Each batch waits until the last image of the next batch is opened, before that batch is requested."""
    names, wait = opened(monkeypatch)
    most: list[int] = []

    def work(_task: Any, _pictures: Any, some: list[Example]) -> list[str]:
        last = some[-1].image.stem
        assert last == "10" or wait(str(min(10, int(last) + 3)))
        most.append(len(names) - int(last) - 1)
        return [e.image.stem for e in some]

    predictions = [predicted for _, predicted in runner(3).run(iter(photos), work)]
    assert predictions == [str(n) for n in range(11)] and max(most) == 3 and sorted(names, key=int) == predictions


def test_a_picture_of_two_batches_is_decoded_once(photos, monkeypatch):
    names, _ = opened(monkeypatch)
    some = [photos[n] for n in (0, 1, 1, 1, 2, 1, 0)]
    results = runner(2).run(some, lambda _t, pictures, _s: [float(p.sum()) for p in pictures])
    sums = [value for _, value in results]
    assert sums[1] == sums[2] == sums[3] == sums[5] != sums[4] and sums[0] == sums[6]
    assert sorted(names) == ["0", "0", "1", "2"]  # image 0 was discarded between the first batch and the last


def test_an_error_of_the_source_is_raised_after_the_examples_before_it(photos):
    """All examples before the error have results, also if the model raises the error. No thread remains."""

    def source() -> Iterator[Example]:
        yield from photos[:5]
        raise OSError("the list ends here")

    encoded_rows = []
    with pytest.raises(OSError, match="the list ends here"):
        for example, _ in runner(2).run(source(), lambda _t, _p, some: some):
            encoded_rows.append(example.image.stem)
    assert encoded_rows == ["0", "1", "2", "3", "4"]
    with pytest.raises(KeyError):
        list(runner(2).run(photos, lambda *_: {}["x"]))
    for thread in threading.enumerate():
        if thread.name.startswith("pictures"):
            thread.join(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]


def test_images_prefetched_for_the_next_call_are_used_by_it(photos, monkeypatch):
    """Call the runner once per block, as a run over many images does."""
    names, wait = opened(monkeypatch)
    one = runner(4)

    def work(_task: Any, _pictures: Any, some: list[Example]) -> list[Example]:
        assert some[0].image.stem != "0" or wait("7")
        return some

    for block, following in ((photos[:4], photos[4:8]), (photos[4:8], [])):
        assert [predicted for _, predicted in one.run_with_errors(block, work, following)] == block
    assert sorted(names, key=int) == [str(n) for n in range(8)] and one.prefetcher.pool is None


def test_lookahead_returns_the_items_in_order():
    numbers = Lookahead(iter(range(7)))
    assert numbers.peek(3) == [0, 1, 2] and numbers.take(2) == [0, 1] and numbers.peek(4) == [2, 3, 4, 5]
    assert numbers.take(3) == [2, 3, 4] and numbers.take(9) == [5, 6] and numbers.take(1) == [] == numbers.peek(2)


def test_an_error_of_a_prefetched_image_keeps_its_position(photos):
    photos[2] = replace(photos[2], image=photos[2].image.with_name("gone.png"))
    results = list(runner(2).run_with_errors(photos[:5], lambda _t, _p, some: [e.image.stem for e in some]))
    assert [predicted for _, predicted in results if isinstance(predicted, str)] == ["0", "1", "3", "4"]
    assert isinstance(results[2][1], ImageError) and results[2][0] == photos[2]
