"""BLIP-2 packs the texts of an image. Each text attends to itself alone. Losses and gradients equal those of padded rows."""

import random
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch
from lora_blip.lora import attached
from lora_blip.models.packing import PackedRows, as_tensors, rows_of
from lora_blip.models.precision import autocasting
from lora_blip.models.token_rows import IGNORE, PaddedRows, TokenRows, next_tokens
from lora_blip.runtime.row_selection import select_rows
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.vqa import VqaTask
from lora_blip.training.learner import Learner
from tests.support import tiny
from tests.support.models import WHOLE, inject, twenty_steps

TEXTS = [
    ["a red cube", "a single blue cube on top of the table", "nothing"],
    ["two cubes"],
    ["a cube on a cube", "red", "a blue cube to the left of a red cube on the table", "a blue cube", "a cube"],
]
QUESTIONS = [["what is it ?", "what color is it ?"], ["what is it ?"], ["how many cubes are there ?", "what is it ?"]]


def host_batch(name: str, texts: list[list[str]] = TEXTS) -> HostBatch:
    """Return a batch of images with several captions, or with questions that have three answers each."""
    lines = QUESTIONS if name == "vqa" else texts
    examples, image_index = [], []
    for number, line in enumerate(lines):
        for text in line:
            asks = {"question": text, "answers": ("a cube", "red", "a red cube")} if name == "vqa" else {}
            examples.append(Example(Path(f"{number}.png"), "" if asks else text, f"{number}.png", 1, **asks))
            image_index.append(number)
    pixels = torch.randn(len(lines), 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(4))
    return HostBatch(examples, pixels, image_index)


def task_of(backbone, name: str):
    return VqaTask(backbone) if name == "vqa" else CaptionTask(backbone, "a picture of" * (name == "prompt"))


def both(task, batch: HostBatch):
    """Return the batch with packed rows and with padded ones."""
    packed = task.batch(batch)
    task.packs = False
    padded = task.batch(batch)
    task.packs = True
    assert isinstance(packed.rows, PackedRows) and isinstance(padded.rows, PaddedRows)
    return packed, padded


def gradients(task, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = [p for x in attached.adapters(task.backbone.model).values() for p in x.parameters()]
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def exact_loss(task, batch) -> torch.Tensor:
    """Return the loss without its cast to float32."""
    states = task.language.label_states(batch.encode_images(task.encoder), batch.rows, batch.image_index)
    labels = batch.rows.labels
    losses = F.cross_entropy(task.language.head(states), labels.targets, reduction="none")
    return (losses if labels.weights is None else losses * labels.weights).sum()


def assert_equal(one, other, bound: float) -> None:
    """Compare the losses, and the gradients relative to the largest one."""
    (loss, halves), (plain, expected) = one, other
    assert loss.item() == pytest.approx(plain.item(), rel=bound)
    largest = max(float(value.abs().max()) for value in expected)
    assert largest > 0
    for value, wanted in zip(halves, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=bound * largest)


def exact_norm(norm: T5LayerNorm, states: torch.Tensor) -> torch.Tensor:
    """Compute the norm of T5 in the dtype of the states. transformers computes the variance in float32."""
    return norm.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


CASES = [
    ("caption", "lora", "sdpa"),
    ("prompt", "dora", "sdpa"),
    ("vqa", "dora", "sdpa"),
    ("vqa", "lora", "eager"),
]


@pytest.mark.parametrize(("name", "variant", "attention"), CASES)
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_loss_and_gradients_of_packed_rows_are_exact_in_float64(make, kind, name, variant, attention, monkeypatch):
    """In float64, packed rows give the loss and the gradients of padded rows within 1e-12.

    The eager attention of OPT computes its softmax in float32.
    """
    monkeypatch.setattr(T5LayerNorm, "forward", exact_norm)
    task = task_of(make(kind), name)
    inject(task.backbone, variant=variant)
    task.backbone.model.double()
    task.backbone.model.language_model.set_attn_implementation(attention)
    batch = host_batch(name)
    batch = replace(batch, pixel_values=batch.pixel_values.double())
    results = [(loss := exact_loss(task, each), gradients(task, loss)) for each in both(task, batch)]
    assert_equal(*results, 1e-6 if (kind, attention) == ("opt", "eager") else 1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_packed_micro_batches_with_checkpointing_give_the_gradients_of_a_padded_batch(make, kind, precision):
    """Two packed micro-batches with checkpointing have the loss and the gradients of one padded batch without."""
    results = []
    for packed in (True, False):
        task = task_of(make(kind), "prompt")
        inject(task.backbone)
        task.packs, total, summed = packed, torch.zeros(()), None
        if packed:
            task.backbone.model.train()
            task.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        whole = host_batch("prompt")
        for some in ((0, 1), (2,)) if packed else ((0, 1, 2),):
            pixels = whole.pixel_values[list(some)]
            batch = task.batch(replace(host_batch("prompt", [TEXTS[number] for number in some]), pixel_values=pixels))
            assert isinstance(batch.rows, PackedRows) == packed
            with autocasting(torch.device("cpu"), precision)():
                loss = task.loss(batch)
            halves = gradients(task, loss)
            summed = halves if summed is None else [a + b for a, b in zip(summed, halves, strict=True)]
            total = total + loss.detach()
        results.append((total, summed))
    assert_equal(*results, 1e-6 if precision == "fp32" else 5e-2)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_twenty_packed_steps_have_the_losses_of_padded_rows(make, kind, precision):
    """Twenty AdamW steps on packed rows have the losses of padded rows, within 1e-5 in fp32 and 2 % in bf16."""
    losses = []
    for packs in (True, False):
        task = CaptionTask(make(kind), "a")
        adapters = inject(task.backbone, WHOLE[kind], trained=False)
        task.packs = packs
        batch = task.batch(host_batch("caption"))
        losses.append(twenty_steps(adapters, lambda task=task, batch=batch: task.loss(batch) / batch.count, precision))
    assert losses[0][-1] < 0.97 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 2e-2)


def test_each_token_attends_to_its_own_text_alone():
    """In random rows, what the tokens of a text may attend to is their own text up to themselves, at positions 0, 1, 2, …"""
    rng = random.Random(0)
    for _ in range(200):
        source = [rng.randrange(3) for _ in range(rng.randint(1, 8))]
        starts = [[9, 9, *(rng.randrange(2) for _ in range(rng.randrange(1, 4)))] for _ in source]
        inputs = [[*start, *(rng.randrange(2) for _ in range(rng.randint(1, 4)))] for start in starts]
        targets = [next_tokens(row, len(start)) for row, start in zip(inputs, starts, strict=True)]
        tokens = TokenRows(inputs, targets, list(range(len(source))), pad_id=7, weights=[1.0 + i for i in range(len(source))])
        rows = as_tensors(rows_of(tokens, source, longest=rng.choice([0, 12, 256]), share=rng.random() < 0.8), tokens)
        used = rows.source if rows.source is not None else torch.arange(len(rows.ids))
        visible = rows.visible()[:, 0]
        assert rows.label_ids() == [[target for target in row if target != IGNORE] for row in targets]
        owner = rows.text.flatten()[rows.labels.positions]
        assert rows.labels.weights.tolist() == [1.0 + int(i) for i in owner]
        for number, text in enumerate(inputs):
            row, last = ((rows.text == number).nonzero()[-1]).tolist()
            path = visible[row, last].nonzero().flatten()
            assert rows.ids[row, path].tolist() == text and rows.positions[row, path].tolist() == list(range(len(text)))
            assert int(used[row]) == source[number] and path[-1] == last
            for count, place in enumerate(path.tolist(), 1):
                assert visible[row, place].nonzero().flatten().tolist() == path[:count].tolist()
        assert visible.diagonal(dim1=1, dim2=2).all()  # also for padding: no row of the softmax is empty


def test_opt_has_what_the_texts_of_an_image_share_once(make):
    """The placeholders of an image and the words of a question are once in a row. The last token of the question is in each
    text, because it predicts the first token of the answer."""
    task, batch = task_of(make("opt"), "vqa"), host_batch("vqa")
    rows = task.batch(batch).rows
    assert (rows.ids == task.language.image_ids[0]).sum(1).tolist() == [tiny.QUERIES] * 3
    shared = len(task.language.prompt_ids(task.prompt_of(batch.examples[2]))) - 1  # the second image has one question
    own = [len(ids) - shared for ids, example in zip(rows.tokens.inputs, rows.tokens.example, strict=True) if example == 2]
    assert len(own) == 3 and int((rows.text[1] >= 0).sum()) == shared + sum(own)


def test_t5_encodes_each_prompt_of_an_image_once(make):
    """Three images have five different questions. Two lines ask one of them."""
    task, seen = task_of(make("t5"), "vqa"), []
    encoder = task.backbone.model.language_model.encoder
    encoder.block[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = host_batch("vqa")
    task.loss(task.batch(batch))
    task.loss(task.batch(replace(batch, examples=[batch.examples[0], *batch.examples], image_index=[0, *batch.image_index])))
    assert seen == [5, 5]


def test_texts_are_padded_if_packing_saves_nothing(make):
    """With one text for each image, the rows and their bits are those of padding. One long row for an image makes T5 share only
    the encoder's rows, and OPT nothing. An attention that takes no mask of 4 dimensions has padded rows."""
    one_each, uneven = [["red"], ["a red cube"], ["two cubes"]], [["a cube on a cube"] * 4, *[["a"]] * 12]
    for kind in ("opt", "t5"):
        task = task_of(make(kind), "caption")
        assert isinstance(task.batch(host_batch("caption", one_each)).rows, PaddedRows)
        rows = task.batch(host_batch("caption", uneven)).rows
        assert isinstance(rows, PaddedRows) if kind == "opt" else len(rows.ids) == 16 and len(rows.encoder.ids) == 13
        task.backbone.model.language_model.config._attn_implementation = "flash_attention_2"
        assert isinstance(task.batch(host_batch("caption")).rows, PaddedRows)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_many_texts_of_an_image_are_in_several_rows(make, kind):
    """A row has at most LONGEST tokens, if a text is not longer. Loss and gradients stay the same."""
    task = task_of(make(kind), "caption")
    inject(task.backbone)
    batch = host_batch("caption", [TEXTS[2] * 12, TEXTS[0]])
    packed, padded = both(task, batch)
    counts = torch.bincount(torch.arange(2) if packed.rows.source is None else packed.rows.source)
    assert counts[0] > 1 and counts[1] == 1 and packed.rows.ids.shape[1] <= 256
    assert_equal(*[(loss := task.loss(each), gradients(task, loss)) for each in (packed, padded)], 2e-6)


def test_a_run_that_began_without_packed_texts_resumes_without_them(make):
    """A checkpoint stores whether texts are packed. One of an earlier version stores nothing, and its texts stay padded."""
    backbone = make("opt")
    inject(backbone)
    learner = Learner(task_of(backbone, "caption"))
    tensors, values = learner.state_dict()
    learner.load_state_dict(tensors, values)
    assert values["packs"] and learner.task.packs
    del values["packs"]
    learner.load_state_dict(tensors, values)
    assert not learner.task.packs and isinstance(learner.task.batch(host_batch("caption")).rows, PaddedRows)
    assert learner.state_dict()[1]["packs"] is False


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_the_gradient_of_rows_that_are_taken_several_times_has_the_same_bits_in_each_run():
    """With several threads, `values[index]` adds in a random order. `select_rows` gives the bits of one thread."""
    values, index = torch.randn(8, 40, 512), torch.randint(0, 8, (40,), generator=torch.Generator().manual_seed(1))
    upstream, results = torch.randn(40, 40, 512), []

    def measure() -> None:
        """Run in a thread of its own: OpenMP's threads stay, and a process that later tests fork would wait for them."""
        for count in (1, *[2] * 8):
            with threads(count):
                rows = values.clone().requires_grad_()
                select_rows(rows, index).backward(upstream)
                results.append(rows.grad)

    thread = threading.Thread(target=measure)
    thread.start()
    thread.join()
    with threads(1):
        rows = values.clone().requires_grad_()
        rows[index].backward(upstream)
    assert all(torch.equal(each, rows.grad) for each in results)
