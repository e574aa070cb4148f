"""Several adapters on one backbone: each row of a mixed batch has the result of a separate batch with only its adapter."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch
from lora_blip.errors import LoRAError
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.mixed_batches import mixed as predict_mixed
from lora_blip.lora import attached, injection, merging
from lora_blip.lora.routing import checkpoint_context, disable_adapters, use_adapters
from lora_blip.lora.sites import Site
from lora_blip.models.loading import Backbone
from lora_blip.tasks.base import Generation, Task
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.vqa import VqaTask
from tests.support import tiny
from tests.support.models import EACH, KINDS, PROMPTS, batch_of, carry, inject
from tests.support.networks import line, plus

TEXTS = ["a red cube", "nothing", "a single blue cube on top of the table", "a cube", "two cubes"]


@pytest.fixture(params=KINDS)
def many(request: pytest.FixtureRequest, make: Any) -> Backbone:
    return carry(make(request.param))


def alone(batch: DeviceBatch, row: int) -> DeviceBatch:
    """Return one row as a batch with the same padding, so that sums have the same order."""
    padded = batch.rows.padded()
    rows = {key: value[row : row + 1] for key, value in vars(padded).items() if isinstance(value, torch.Tensor)}
    return DeviceBatch(batch.examples[row : row + 1], batch.pixel_values[row : row + 1], type(padded)(**rows), 1.0)


@torch.no_grad()
def mixed_and_separate(backbone: Backbone, each: list[str | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of a mixed batch, and those of each row alone with all other adapters disabled."""
    task = CaptionTask(backbone)
    batch = batch_of(task, TEXTS[: len(each)])
    with use_adapters(backbone.model, each):
        mixed = task.logits(batch)
    separate = []
    for row, name in enumerate(each):
        others = [other for other in attached.names(backbone.model) if other != name]
        with disable_adapters(backbone.model, *others):
            separate.append(task.logits(alone(batch, row)))
    return mixed, torch.cat(separate)


def test_each_row_of_a_mixed_batch_equals_a_separate_batch(many):
    mixed, separate = mixed_and_separate(many, EACH)
    torch.testing.assert_close(mixed, separate, rtol=1e-5, atol=1e-6 * float(separate.abs().max()))
    _, same = mixed_and_separate(many, ["caption"] * len(EACH))
    assert (separate - same).abs().amax((1, 2)).gt(0.01)[[0, 1, 3, 4]].all()  # the adapters differ


def test_rows_without_an_adapter_equal_the_base_bit_for_bit(many):
    """Adapters of other rows do not change a row without an adapter."""
    task = CaptionTask(many)
    batch = batch_of(task, TEXTS)
    with torch.no_grad():
        with disable_adapters(many.model):
            base = task.logits(batch)
        with use_adapters(many.model, EACH):
            mixed = task.logits(batch)
        with use_adapters(many.model, [None] * len(EACH)):
            assert torch.equal(task.logits(batch), base)
    assert torch.equal(mixed[1], base[1]) and not torch.equal(mixed[0], base[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_each_text_of_a_mixed_batch_equals_that_of_a_separate_batch(many, beams):
    """Prompts of different lengths give the text of each image generated alone, greedily and with beam search."""
    language: Any = CaptionTask(many).language
    images = torch.randn(len(EACH), 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(5))
    settings = {"max_new_tokens": 8, "num_beams": beams, "do_sample": False}
    with torch.no_grad():
        mixed = language.generate(images, PROMPTS, adapters=EACH, **settings)
        separate = []
        for row, name in enumerate(EACH):
            with disable_adapters(many.model, *(other for other in attached.names(many.model) if other != name)):
                separate += language.generate(images[row : row + 1], [PROMPTS[row]], **settings)
    assert mixed == separate
    assert mixed != language.generate(images, PROMPTS, adapters=[None] * len(EACH), **settings)


@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_mixed_batches_predict_captions_and_answers_in_one_call(make, tmp_path, kind):
    """`mixed` returns the predictions of `Captioner` with one adapter at a time, in the order of the requests."""
    backbone = carry(make(kind))
    generation = Generation(max_new_tokens=6)
    vqa, plain = VqaTask(backbone, "Question: {question} Answer:", generation), CaptionTask(backbone, "", generation)
    tasks: dict[str, Task] = {"vqa": vqa, "third": CaptionTask(backbone, "a photo of", generation), "": plain}
    tiny.write_photos(tmp_path, 4)
    photos = [tmp_path / "photos" / f"{n}.png" for n in (0, 1, 2, 3, 0)]
    rows = [("vqa", "what is it?"), ("", ""), ("third", ""), ("vqa", "what colour is the cube?"), ("third", "")]
    requests = [(photo, name, question) for photo, (name, question) in zip(photos, rows, strict=True)]
    predictions = list(predict_mixed(tasks, iter(requests), batch_size=3))
    expected = []
    for photo, name, question in requests:
        with use_adapters(backbone.model, name) if name else disable_adapters(backbone.model):
            captioner = Captioner(tasks[name])
            expected.append(captioner.answer(photo, question) if question else captioner(photo))
    assert (
        predictions == [replace(prediction, score=None) for prediction in expected] and len({p.text for p in predictions}) > 2
    )
    for wrong, message in (
        ({**tasks, "caption": CaptionTask(backbone)}, "the same `task.generation`"),
        ({**tasks, "caption": CaptionTask(make(kind), "", generation)}, "need the same backbone"),
        ({"vqa": tasks["vqa"]}, "names the adapter ''"),
        ({**tasks, "none": plain}, "no adapter 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(predict_mixed(wrong, [*requests, (photos[0], "none", "")]))


def test_gradients_reach_only_the_adapters_of_their_rows(many):
    """Gradients of a mixed batch are the sums over separate rows. An adapter that no row uses has no gradient."""
    task = CaptionTask(many)
    each = ["vqa", "caption", None]
    batch = batch_of(task, TEXTS[:3])

    def gradients(step: Any) -> dict[str, torch.Tensor | None]:
        step()
        result = {n: p.grad for n, p in many.model.named_parameters() if p.requires_grad}
        many.model.zero_grad(set_to_none=True)
        return result

    def mixed() -> None:
        with use_adapters(many.model, each):
            loss = task.loss(batch)
        loss.backward()  # outside of the block, as loops do

    def separate() -> None:
        for row, name in enumerate(each[:2]):
            with disable_adapters(many.model, *(other for other in attached.names(many.model) if other != name)):
                task.loss(alone(batch, row)).backward()

    actual, expected = gradients(mixed), gradients(separate)
    for name, gradient in actual.items():
        owner = name.split(".lora.")[1].split(".")[0].split(":")[0]
        assert (gradient is None) == (owner == "third"), name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_a_switch_reads_no_file_and_copies_no_weight(many, monkeypatch):
    """`use_adapters` opens no file, copies or clones no tensor, and changes no entry of the state_dict."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a switch opened a file or copied a tensor")

    before = {name: value.data_ptr() for name, value in many.model.state_dict().items()}
    versions = {name: value._version for name, value in many.model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", forbidden)
        patch.setattr(torch.Tensor, "copy_", forbidden)
        patch.setattr(torch.Tensor, "clone", forbidden)
        for name in ("vqa", "caption", "third"):
            with use_adapters(many.model, name):
                assert {n: v.data_ptr() for n, v in many.model.state_dict().items()} == before
    assert {name: value._version for name, value in many.model.state_dict().items()} == versions


def test_each_thread_has_its_own_adapters():
    """Two threads inside `use_adapters` at the same time each use their own adapter. Afterwards both adapters act again."""
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4)
    for name in ("a", "b"):
        injection.inject(model, [Site("0", 2)], name=name)["0"].B.data.normal_()
    alone, both = {}, model(x)
    for name in ("a", "b"):
        with use_adapters(model, name):
            alone[name] = model(x)
    both_inside, first_left = threading.Barrier(2, timeout=20), threading.Event()

    def request(name: str) -> torch.Tensor:
        with use_adapters(model, name):
            both_inside.wait()
            output = model(x)
            if name == "b":
                assert first_left.wait(20)
        first_left.set()
        return output

    with ThreadPoolExecutor(2) as pool:
        outputs = dict(zip("ab", pool.map(request, "ab"), strict=True))
    assert all(torch.equal(outputs[name], alone[name]) for name in "ab") and not torch.equal(alone["a"], alone["b"])
    assert torch.equal(model(x), both)


def test_the_innermost_of_nested_blocks_applies():
    """The innermost block applies until it ends, then the block around it. A disabled adapter stays disabled inside."""
    model, x = line("a", "b"), torch.randn(2, 4)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(model(x), plus(model, x, "a", "b"))
    with use_adapters(model, "a"):
        close(model(x), plus(model, x, "a"))
        with use_adapters(model, ["b", None]):
            close(model(x), torch.cat([plus(model, x[:1], "b"), plus(model, x[1:])]))
            with use_adapters(model, "b"), use_adapters(model, None):
                close(model(x), plus(model, x, "b"))
            with disable_adapters(model, "b"):
                close(model(x), plus(model, x))
            with pytest.raises(KeyError), use_adapters(model, ["a", "a"]):
                raise KeyError
            close(model(x), torch.cat([plus(model, x[:1], "b"), plus(model, x[1:])]))
        close(model(x), plus(model, x, "a"))
    with disable_adapters(model, "a"), use_adapters(model, ["a", "b"]):  # a disabled adapter stays disabled
        close(model(x), torch.cat([plus(model, x[:1]), plus(model, x[1:], "b")]))
    close(model(x), plus(model, x, "a", "b"))


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        ("typo", 2, "no adapter 'typo'; it has a, b"),
        (["a", "typo"], 2, "no adapter 'typo'; it has a, b"),
        ("", 2, "no adapter ''"),
        (["a", ""], 2, "no adapter ''"),
        ([], 2, "name one for every row"),
        (["a", "b"], 3, "a batch has 3 rows, but adapters were chosen for 2; name one for every row"),
        (["a", None, "b"], 2, "a batch has 2 rows, but adapters were chosen for 3"),
        ([None, None], 3, "a batch has 3 rows"),
        (["a", "b"], 0, "a batch has 0 rows"),
    ],
)
def test_an_invalid_choice_of_adapters_raises_lora_error(names, rows, message):
    """An unknown name or a wrong number of names raises LoRAError. After it, the output is that before the block."""
    model = line("a", "b")
    x = torch.randn(rows, 4)
    before = model(x)
    with pytest.raises(LoRAError, match=message), use_adapters(model, names):
        model(x)
    assert torch.equal(model(x), before)


def test_rows_are_repeated_only_for_declared_beams():
    """Four rows with two names raise LoRAError unless beams=2 is passed, with and without gradients."""
    model, x = line("a", "b"), torch.randn(4, 5, 4)
    with use_adapters(model, ["a", "b"]):
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), pytest.raises(LoRAError, match="a batch has 4 rows"):
                model(x)
    with torch.no_grad(), use_adapters(model, ["a", "b"], beams=2):
        torch.testing.assert_close(model(x), torch.cat([plus(model, x[:2], "a"), plus(model, x[2:], "b")]))


def test_ranking_with_a_list_of_adapters_is_refused(make):
    """The rows of `rank` are the texts of one image, so adapters cannot be chosen row by row."""
    backbone = make("blip")
    inject(backbone, "vit,text")
    task, some = CaptionTask(backbone), [Example(Path(f"{n}.png"), "", f"{n}.png", 1) for n in range(2)]
    pictures = torch.randn(2, 3, 32, 32)
    with use_adapters(backbone.model, ["default", None]), pytest.raises(LoRAError, match="name one for every row"):
        task.rank(pictures, some, ["a", "b", "c", "d"])


def test_a_merged_adapter_cannot_be_chosen_and_a_chosen_one_cannot_be_merged():
    """`use_adapters` raises LoRAError on a merged model. `merge` and `bake` raise LoRAError inside a block."""
    model = line("a", "b")
    merging.merge(model, "a")
    for names in ("b", ["a", None]):
        with pytest.raises(LoRAError, match="restore"), use_adapters(model, names):
            pass
    merging.restore(model)
    weight = model[0].weight.clone()
    for block in (use_adapters(model, "a"), use_adapters(model, ["a"]), disable_adapters(model, "a")):
        for write in (merging.merge, merging.bake):
            with (
                pytest.raises(LoRAError, match="leave that block first"),
                block if write is merging.merge else use_adapters(model, "b"),
            ):
                write(model)
    assert torch.equal(model[0].weight, weight)
    merging.merge(model)


def test_a_copy_of_a_model_has_its_own_routing(many):
    """A deepcopy or pickle made inside a block starts with all adapters active. Its choices do not affect the original."""
    task = CaptionTask(many)
    batch = batch_of(task, TEXTS[:2])
    stored = io.BytesIO()
    with torch.no_grad():
        everything = task.logits(batch)
        with use_adapters(many.model, ["vqa", "caption"]):
            chosen = task.logits(batch)
            pickle.dump(many.model, stored)
            twins = [copy.deepcopy(many.model), pickle.loads(stored.getvalue())]
            original = many.model
            for twin in twins:
                many.model = task.language.model = twin
                assert torch.equal(task.logits(batch), everything)
                with use_adapters(twin, "third"):
                    many.model = task.language.model = original
                    assert torch.equal(task.logits(batch), chosen)
                many.model = task.language.model = original
    assert not torch.equal(chosen, everything)


def test_a_choice_on_a_model_applies_to_parts_that_were_injected_separately():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)))
    for part in model:
        injection.inject(part, [Site("0", r=2)], name="a")["0"].B.data.normal_()
    x = torch.randn(3, 4)
    with use_adapters(model, [None] * 3):
        assert torch.equal(model(x), nn.functional.linear(
            nn.functional.linear(x, model[0][0].weight, model[0][0].bias), model[1][0].weight, model[1][0].bias
        ))  # fmt: skip


def test_an_adapter_injected_inside_a_block_is_not_active_in_it():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    injection.inject(model, [Site("0", r=2)], name="a")["0"].B.data.normal_()
    with use_adapters(model, ["a", None]):
        before = model(x)
        injection.inject(model, [Site("1", r=2)], name="b")["1"].B.data.normal_()
        assert torch.equal(model(x), before)
    assert not torch.equal(model(x), before)


def test_dropout_applies_only_to_rows_with_an_adapter(make):
    backbone = carry(make("blip"), dropout=0.5)
    task = CaptionTask(backbone)
    batch = batch_of(task, TEXTS[:3])
    backbone.model.train()
    with torch.no_grad(), use_adapters(backbone.model, ["vqa", None, "third"]):
        one, two = task.logits(batch), task.logits(batch)
    assert [torch.equal(a, b) for a, b in zip(one, two, strict=True)] == [False, True, False]


def test_mixed_and_separate_batches_agree_within_bf16_rounding_under_autocast(many):
    with torch.autocast("cpu", torch.bfloat16):
        mixed, separate = mixed_and_separate(many, EACH)
        other, _ = mixed_and_separate(many, [None] * len(EACH))
    far = (mixed - separate).abs().max()
    assert far <= 0.03 * separate.abs().max() and (mixed - other).abs().max() > 3 * far


def test_checkpointed_layers_are_recomputed_with_the_adapters_of_the_forward(make):
    """A backward pass outside the blocks gives the gradients of a model without checkpointing."""
    for kind in KINDS:
        gradients = []
        for checkpointing in (False, True):
            backbone = carry(make(kind, checkpointing=checkpointing))
            backbone.model.train()
            task = CaptionTask(backbone)
            batch = batch_of(task, TEXTS[:3])
            loss = task.loss(batch)
            for names in ("caption", ["vqa", None, "third"], "vqa"):
                with use_adapters(backbone.model, names):
                    loss = loss + task.loss(batch)
            with disable_adapters(backbone.model, "vqa"):
                loss = loss + task.loss(batch)
            with use_adapters(backbone.model, "third"):
                loss.backward()
            gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad})
        copy.deepcopy(backbone.model), pickle.dumps(backbone.model)
        for name, plain in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], plain, rtol=1e-3, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_with_other_adapters_is_refused(reentrant):
    """Without `context_fn`, a backward pass in another block raises LoRAError. With it, the adapters of the forward act."""
    model, x = line("a", "b"), torch.randn(2, 4, requires_grad=True)
    with use_adapters(model, "a"):
        y = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.raises(LoRAError, match="context_fn"), use_adapters(model, "b"):
        y.sum().backward()
    with use_adapters(model, "a"):
        y = checkpoint(model, x, use_reentrant=False, context_fn=partial(checkpoint_context, model))
    y.sum().backward()
    assert attached.adapters(model, "a")["0"].B.grad.any() and attached.adapters(model, "b")["0"].B.grad is None
