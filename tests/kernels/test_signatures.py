"""A fast module is used only if transformers has the method that it replaces. Other calls use the method of transformers."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextSelfAttention

from lora_blip.config import EvaluateConfig, InferConfig
from lora_blip.data.example import Example
from lora_blip.errors import ModelError
from lora_blip.inference.setup import open_task
from lora_blip.kernels import signatures, switch
from lora_blip.kernels.plain import plain
from lora_blip.kernels.text_attention import TextAttention, reading
from lora_blip.lora import attached
from lora_blip.models.library import call
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from tests.support.models import batch_of, inject
from tests.support.networks import used
from tests.support.questions import pictures

LINES = [Example(Path(f"{n}.png"), "", f"{n}.png", n) for n in range(3)]


def rename_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rename the cache argument of the text attention of BLIP, also in its caller, as transformers 5.24 did."""
    library = BlipTextSelfAttention.forward
    old = "cache" if "cache" in inspect.signature(library).parameters else "past_key_values"

    def inner(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, memory=None, **kwargs
    ) -> Any:  # fmt: skip
        args = hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, memory
        return library(self, *args, **kwargs)

    def outer(self: Any, hidden_states, attention_mask=None, encoder_hidden_states=None, **kwargs: Any) -> Any:
        context, probabilities = self.self(
            hidden_states, attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states, memory=kwargs.get(old)
        )
        return self.output(context, hidden_states), probabilities

    monkeypatch.setattr(BlipTextSelfAttention, "forward", inner)
    monkeypatch.setattr(BlipTextAttention, "forward", outer)


@pytest.mark.parametrize("switched", ["before", "after"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_renamed_keyword_changes_no_caption(make, monkeypatch, capsys, switched, beams):
    """If the cache gets a third name, captions stay equal, whether `fast` was called before or after the change."""
    backbone = make("blip")
    inject(backbone)
    task = CaptionTask(backbone, "a picture of", Generation(max_new_tokens=8, num_beams=beams))
    texts = task.predict(pictures(3), LINES[:3])
    if switched == "after":
        switch.fast(backbone.model, False)
    rename_cache(monkeypatch)
    monkeypatch.setattr(signatures, "REPORTED", set())
    for _ in range(2):
        switch.fast(backbone.model)
    assert task.predict(pictures(3), LINES[:3]) == texts and all(texts)
    assert capsys.readouterr().out.count("BlipTextSelfAttention is off") == (switched == "after")


@pytest.mark.parametrize("library", switch.KINDS)
def test_every_fast_class_fits_the_installed_library(library, monkeypatch, capsys):
    """With another signature, the module keeps the class of the library, and one line reports it."""
    assert signatures.fits_library(switch.KINDS[library], library)
    signature = inspect.signature(library.forward)
    more = [*list(signature.parameters.values())[:2], inspect.Parameter("more", inspect.Parameter.KEYWORD_ONLY)]

    def changed(self: nn.Module, *args: Any, **kwargs: Any) -> None: ...

    changed.__signature__ = signature.replace(parameters=more)  # type: ignore[attr-defined]
    monkeypatch.setattr(library, "forward", changed)
    module = library.__new__(library)
    nn.Module.__init__(module)
    switch.fast(module)
    assert type(module) is library and f"{library.__name__} is off" in capsys.readouterr().out


def test_a_call_with_an_unknown_argument_uses_the_library(make, monkeypatch):
    """The fast attention does not ignore an unknown argument, unless it is None."""
    vit, text = (make("blip").model.get_submodule(path) for path in (
        "vision_model.encoder.layers.0.self_attn", "text_decoder.bert.encoder.layer.0.attention.self"
    ))  # fmt: skip
    calls: list[dict[str, Any]] = []
    for kind in (BlipAttention, BlipTextSelfAttention):
        real = kind.forward
        note = lambda self, *a, real=real, new=None, **k: calls.append({"new": new}) or real(self, *a, **k)  # noqa: E731
        monkeypatch.setattr(kind, "forward", note)
    x = torch.randn(2, 3, 32)
    for module in (vit, text):
        module(x), module(x, new=None)
        assert not calls
        module(x, new=1)
        assert calls.pop() == {"new": 1}


def attentions(model: Any, **named: Any) -> list[torch.Tensor]:
    """Return outputs and attention probabilities of each tower with a fast attention."""
    pixels, ids = pictures(2), torch.tensor([[5, 6, 7], [8, 9, 3]])
    vision = model.vision_model(pixel_values=pixels, **named)
    results = [vision.last_hidden_state, *vision.attentions]
    for name in ("text_decoder", "text_encoder"):
        if hasattr(model, name):
            text = getattr(model, name)(input_ids=ids, encoder_hidden_states=vision.last_hidden_state, **named)
            results += [text[0], *text.attentions, *text.cross_attentions]
    return results


@torch.no_grad()
@pytest.mark.parametrize("how", ["argument", "configuration"])
@pytest.mark.parametrize("kind", ["blip", "vqa", "itm", "opt"])
def test_attentions_equal_those_of_transformers_eager_attention(make, kind, how):
    """`output_attentions` gives eager attention bit for bit. A call without it uses the fast attention again."""
    model = make(kind).model
    model.set_attn_implementation("eager")
    named = {"output_attentions": True} if how == "argument" else {}
    for module in model.modules() if how == "configuration" else ():
        if hasattr(module, "config"):
            module.config.output_attentions = True
    fast = attentions(model, **named)
    switch.fast(model, False)
    expected = attentions(model, **named)
    assert len(fast) == len(expected) > 2 and all(map(torch.equal, fast, expected))
    switch.fast(model)
    assert not model.vision_model(pixel_values=pictures(2), output_attentions=False).attentions


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_attentions_of_rows_that_share_an_image_are_masked(make, rows):
    """Inside `reading`, `output_attentions` returns probabilities of every state, and zero for masked states."""
    decoder = make("vqa").model.text_decoder
    ids, states, mask = torch.randint(5, 50, (2 * rows, 4)), torch.randn(2, 6, 32), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with reading(decoder, states, mask, rows) as source:
        quick = decoder(input_ids=ids, **source).logits
        output = decoder(input_ids=ids, output_attentions=True, **source)
    torch.testing.assert_close(output.logits, quick, rtol=1e-4, atol=1e-5)
    for each in output.cross_attentions:
        torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))
        assert each.shape[-1] == 6 and not each[rows:, ..., 4:].any() and each[:rows].all()


@torch.no_grad()
def test_attentions_of_generate_equal_those_of_transformers(make):
    decoder = make("blip").model.text_decoder
    named = {"encoder_hidden_states": torch.randn(2, 6, 32), "max_new_tokens": 4, "min_new_tokens": 4}
    named |= {
        "output_attentions": True,
        "return_dict_in_generate": True,
        "do_sample": False,
        "eos_token_id": 3,
        "pad_token_id": 0,
    }
    ids, outputs = torch.full((2, 1), 4), []
    for on in (True, False):
        switch.fast(decoder, on)
        outputs.append(decoder.generate(input_ids=ids, **named))
    fast, expected = outputs
    assert torch.equal(fast.sequences, expected.sequences) and len(fast.attentions) == 4
    for one, other in zip(fast.attentions, expected.attentions, strict=True):
        assert len(one) == len(other) > 0 and all(map(torch.equal, one, other))


# ---------------------------------------------------------------- the switches


def test_plain_equals_transformers_bit_for_bit_and_ends_with_its_block(make):
    """Inside `plain`, logits and texts equal those of a model without fast. After the block, the model is fast again."""
    backbone = make("blip")
    inject(backbone)
    slow = copy.deepcopy(backbone)
    switch.fast(slow.model, False), attached.fast(slow.model, False)
    task, other = CaptionTask(backbone), CaptionTask(slow)
    attached.fast(backbone.model, False)
    batch = batch_of(task)
    fast = task.logits(batch)
    with plain():
        assert torch.equal(task.logits(batch), other.logits(batch))
        texts = task.predict(pictures(2), LINES[:2])
    assert torch.equal(task.logits(batch), fast) and not torch.equal(fast, other.logits(batch))
    assert texts == other.predict(pictures(2), LINES[:2])


def test_plain_reaches_the_recomputation_of_a_checkpoint(make):
    """A backward pass outside `plain` recomputes the layers as inside it, so the gradients are those of the plain model."""
    gradients = []
    for on in (True, False):
        backbone = make("blip", checkpointing=True, fast=on)
        backbone.fast = False  # both models encode texts in the same way
        adapters = inject(backbone)
        attached.fast(backbone.model, False)
        task = CaptionTask(backbone)
        backbone.model.train()
        with plain():
            loss = task.loss(batch_of(task))
        loss.backward()
        gradients.append([x.A.grad for x in adapters.values()])
    assert all(map(torch.equal, *gradients))


def test_fast_off_disables_fast_modules_and_the_fused_update(checkpoints, monkeypatch):
    """After load_backbone(fast=False), no module is fast, and adapters injected later do not use the fused update."""
    fused_linears = used(monkeypatch)
    backbone = load_backbone(str(checkpoints["blip"]), "cpu", fast=False)
    inject(backbone)
    assert not {type(module) for module in backbone.model.modules()} & set(switch.KINDS.values())
    task = CaptionTask(backbone)
    batch = batch_of(task)
    task.loss(batch).backward()
    assert batch.rows.labels is None and not fused_linears
    attached.fast(backbone.model)
    task.loss(batch).backward()
    assert fused_linears


@pytest.mark.parametrize("kind", [InferConfig, EvaluateConfig])
@pytest.mark.parametrize("on", [True, False])
def test_infer_and_evaluate_pass_fast_to_the_backbone(checkpoints, kind, on):
    """FAST applies to the backbone, its modules and the hooks of an adapter that is not merged."""
    config = kind(**{"references": "x.jsonl"} if kind is EvaluateConfig else {}, model=str(checkpoints["blip"]), adapter="none",
                  fast=on, device="cpu")  # fmt: skip
    backbone = open_task(config, None)[0].backbone
    inject(backbone)
    kinds = {type(module) for module in backbone.model.modules()}
    assert backbone.fast is on and (TextAttention in kinds) is on and attached.share_routing(backbone.model).fast is on


def test_an_argument_that_a_model_does_not_have_is_an_error(make):
    """`call` raises ModelError, because `**kwargs` of transformers would ignore the argument."""
    model = make("blip").model
    with pytest.raises(ModelError, match=r"BlipVisionModel of transformers 5\.\d+\.\d+ has no argument 'pictures'"):
        call(model.vision_model, pixel_values=pictures(1), pictures=1)
