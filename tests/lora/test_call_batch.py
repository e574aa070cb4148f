"""Adapters chosen row by row must match the batch size of the call of the model, whatever the shape at the linear."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lora_blip.errors import LoRAError
from lora_blip.lora import injection
from lora_blip.lora.call_batch import call_batch, forget_batch, note_batch
from lora_blip.lora.routing import use_adapters
from lora_blip.tasks.caption import CaptionTask
from tests.support.models import inject
from tests.support.networks import line, plus

CLOSE = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


class Flattening(nn.Module):
    """A model whose linear gets (rows · tokens, width), as in OPT."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        return self.inner(states.flatten(0, 1)).view(*states.shape[:2], -1)


class Windows(Flattening):
    """A model whose linear gets (rows · windows, tokens, width), as in Swin."""

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        rows, tokens, width = states.shape
        return self.inner(states.reshape(rows * 3, tokens // 3, width)).reshape(rows, tokens, -1)


@pytest.mark.parametrize("shape", [(9, 4), (1, 4), (2, 4), (4, 4), (9, 5, 4), (6, 5, 4), (1, 5, 4), (9, 2, 2, 4), (0, 4), (4,)])
def test_a_batch_of_another_size_is_an_error_for_every_shape(shape):
    """A batch whose number of rows is not the number of names raises LoRAError, also if it is a multiple."""
    model, before = line("a", "b"), line("a")
    for call in (model, model[0]):
        with use_adapters(model, ["a", None, None]), pytest.raises(LoRAError, match="adapters were chosen"):
            call(torch.randn(shape))
    for names in (["a"], ["a", None, None, None]):  # one name, and one per element of the vector
        with use_adapters(before, names), pytest.raises(LoRAError, match=r"adapters were chosen.*give x\[None\]"):
            before(torch.randn(4))


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (3, 2, 2, 4)])
def test_a_batch_of_the_right_size_gets_its_adapters_for_every_shape(shape):
    model, x = line("a", "b"), torch.randn(shape)
    for call in (model, model[0]):
        with use_adapters(model, ["a", None, "b"]):
            CLOSE(call(x), torch.stack([plus(model, x[0], "a"), plus(model, x[1]), plus(model, x[2], "b")]))


@pytest.mark.parametrize("by", ["position", "keyword", "mapping"])
def test_flattened_tokens_use_the_rows_of_the_call_of_the_model(by):
    """The linear gets (rows · tokens, width). The batch size is that of a positional, keyword or mapping argument."""
    inner = line("a", "b")
    model, x = Flattening(inner), torch.randn(2, 3, 4)
    if by == "mapping":
        model.forward = lambda batch: Flattening.forward(model, **batch)  # type: ignore[method-assign]
    call: Any = {"position": model, "keyword": lambda x: model(mask=None, states=x), "mapping": lambda x: model({"states": x})}[
        by
    ]
    with use_adapters(model, ["a", None]):
        CLOSE(call(x), torch.stack([plus(inner, x[0], "a"), plus(inner, x[1])]))
        for rows, tokens in ((3, 4), (4, 1), (1, 2), (6, 2)):
            with pytest.raises(LoRAError, match=rf"a batch has {rows} rows?, but adapters were chosen for 2"):
                call(torch.randn(rows, tokens, 4))
        CLOSE(call(x), torch.stack([plus(inner, x[0], "a"), plus(inner, x[1])]))  # an error between calls has no effect
    assert call_batch() is None


def test_windows_are_not_counted_as_rows():
    """One row with three windows raises LoRAError, although there are three names."""
    model = Windows(line("a", "b"))
    with use_adapters(model, ["a", None, "b"]):
        for rows in (1, 3):
            with pytest.raises(LoRAError, match="a batch has"):
                model(torch.randn(rows, 6, 4))


def test_each_beam_of_a_row_uses_the_adapter_of_the_row():
    """With beams=2, rows 0 and 1 use the first adapter and rows 2 and 3 the second, also if tokens are flattened."""
    inner = line("a", "b")
    model, x = Flattening(inner), torch.randn(4, 3, 4)
    with use_adapters(model, ["a", None], beams=2):
        CLOSE(model(x), torch.stack([plus(inner, x[0], "a"), plus(inner, x[1], "a"), plus(inner, x[2]), plus(inner, x[3])]))
        CLOSE(model(x[:2]), torch.stack([plus(inner, x[0], "a"), plus(inner, x[1])]))  # calls before the beam search
        with pytest.raises(LoRAError, match="a batch has 3 rows"):
            model(x[:3])
    with pytest.raises(LoRAError, match="beams"), use_adapters(model, ["a", None], beams=0):
        pass


class PixelModel(nn.Module):
    """A model that gets images and flattens them to patches, as in the forward of BLIP."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.inner = linear

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values.flatten(1)[:, :20].view(len(pixel_values), 5, 4))


def test_a_beam_search_does_not_repeat_images():
    """Nine images with three names raise LoRAError also with beams=3, but nine texts are allowed."""
    inner = line("a", "b")
    model = PixelModel(inner)
    with use_adapters(model, ["a", None, "b"], beams=3):
        assert model(torch.randn(3, 3, 4, 4)).shape == (3, 5, 3)
        assert inner(torch.randn(9, 5, 4)).shape == (9, 5, 3)
        for call in (model, lambda pixels: model(pixel_values=pixels)):
            with pytest.raises(LoRAError, match="a batch has 9 rows, but adapters were chosen for 3"):
                call(torch.randn(9, 3, 4, 4))


@pytest.mark.parametrize("part", ["the model", "its encoder", "its text", "ViT", "Q-Former"])
@pytest.mark.parametrize("kind", ["opt", "blip"])
@torch.no_grad()
def test_every_part_of_a_backbone_refuses_another_batch_size(make, kind, part):
    """Nine or two rows with three names raise LoRAError in the ViT, the Q-Former, the language model and `generate`."""
    backbone = make(kind)
    inject(backbone)
    model, language = backbone.model, CaptionTask(backbone).language
    for rows in (9, 2):
        images = torch.randn(rows, 3, 32, 32)
        ids = torch.full((rows, 3), language.end_id)
        calls: dict[str, Any] = {
            "the model": lambda images=images, rows=rows: language.generate(images, [""] * rows, max_new_tokens=2),
            "its encoder": lambda images=images: language.encode_images(images),
            "ViT": lambda images=images: model.vision_model(images),
        }
        if kind == "opt":
            calls["its text"] = lambda ids=ids: model.language_model.model.decoder(ids)
            calls["Q-Former"] = lambda rows=rows: model.qformer(
                query_embeds=model.query_tokens.expand(rows, -1, -1),
                encoder_hidden_states=torch.randn(rows, 5, tiny_width(model)),
            )
        else:
            calls["its text"] = lambda ids=ids: model.text_decoder(ids)
            calls["Q-Former"] = lambda images=images, ids=ids: model(images, ids)
        with use_adapters(model, ["default", None, None]), pytest.raises(LoRAError, match=f"a batch has {rows} rows"):
            calls[part]()


def tiny_width(model: Any) -> int:
    return model.config.vision_config.hidden_size


def test_batch_hooks_are_added_once_and_removed_with_the_adapters():
    model, x = Flattening(line("a")), torch.randn(2, 3, 4)

    def count_hooks() -> list[int]:
        hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
        return [hooks.count(note_batch), hooks.count(forget_batch)]

    assert count_hooks() == [0, 0]
    for _ in range(2):
        with use_adapters(model, ["a", None]):
            model(x)
    assert count_hooks() == [2, 2]
    injection.eject(model)
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called]
    assert count_hooks() == [0, 0] and not left


def test_an_interrupted_call_does_not_affect_the_next_block():
    """After KeyboardInterrupt in a call, the next block does not use the batch size of that call."""

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.stop = line("a"), True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.stop:
                raise KeyboardInterrupt
            return self.inner(x)

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt), use_adapters(model, ["a", None, None]):
        model(torch.randn(3, 4))
    model.stop, x = False, torch.randn(2, 4)
    with use_adapters(model, ["a", None]):
        CLOSE(model.inner(x), torch.cat([plus(model.inner, x[:1], "a"), plus(model.inner, x[1:])]))
