"""Test captioners in blocks of `use_adapters` and `disable_adapters`: each prediction is that of the chosen adapter alone."""

import asyncio
import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lora_blip
from lora_blip.errors import InputError, LoRAError
from lora_blip.inference.captioner import Captioner
from lora_blip.lora import attached
from lora_blip.models.loading import Backbone
from tests.support import tiny
from tests.support.models import carry

NAMES = ["vqa", None, "caption", "vqa", "caption", None, "vqa"]


@pytest.fixture
def backbone(make: Any, monkeypatch: pytest.MonkeyPatch) -> Backbone:
    """Return a base with the adapters "caption" and "vqa", whose fast path has never been checked."""
    monkeypatch.setattr("lora_blip.tasks.verification_record.is_verified", lambda _: False)
    return carry(make("blip"))


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    tiny.write_photos(tmp_path, len(NAMES))
    return sorted((tmp_path / "photos").iterdir())


def alone(backbone: Backbone, photos: list[Path], **options: Any) -> list[str]:
    """Return the text of each photo from the adapter of NAMES alone."""
    captioner, texts = Captioner.from_adapter(None, base=backbone, max_new_tokens=6, **options), []
    for photo, name in zip(photos, NAMES, strict=True):
        with lora_blip.use_adapters(backbone, name) if name else lora_blip.disable_adapters(backbone):
            texts.append(captioner(photo).text)
    assert len(set(texts)) > 3
    return texts


def ranked_alone(captioner: Captioner, photos: list[Path], names: Sequence[str | None], texts: list[str]) -> list[float]:
    """Return the probability of the first text for each photo, from the adapter of its name alone."""
    backbone, probabilities = captioner.backbone, []
    for photo, name in zip(photos, names, strict=True):
        with lora_blip.use_adapters(backbone, name) if name else lora_blip.disable_adapters(backbone):
            probabilities.append(dict(captioner.rank(photo, texts).ranking)[texts[0]])
    return probabilities


@pytest.mark.parametrize(("batch_size", "beams"), [(16, 1), (3, 1), (16, 3)])
def test_each_image_uses_the_adapter_that_is_named_for_it(backbone, photos, capsys, batch_size, beams):
    """Batches, beam search and the check of the fast path have other numbers of rows than the list of names.

    Before, the check reported a difference and switched the fast path off for all captioners of the base.
    """
    expected = alone(backbone, photos, num_beams=beams)
    capsys.readouterr()
    captioner = Captioner.from_adapter(None, base=backbone, max_new_tokens=6, batch_size=batch_size, num_beams=beams)
    with lora_blip.use_adapters(backbone, NAMES):
        assert [each.text for each in captioner(photos)] == expected
        assert [each.text for each in captioner.stream(photos)] == expected
    assert "equal up to rounding" in capsys.readouterr().err and backbone.fast


def test_a_broken_image_keeps_its_place_among_the_adapters(backbone, photos):
    expected = alone(backbone, photos)
    photos[1].write_bytes(b"broken")
    captioner = Captioner.from_adapter(None, base=backbone, max_new_tokens=6)
    with lora_blip.use_adapters(backbone, NAMES):
        predictions = captioner(photos)
    assert [each.text for each in predictions] == [expected[0], "", *expected[2:]] and predictions[1].error


def test_rankings_use_the_adapters_of_their_images(backbone, photos):
    captioner, texts = Captioner.from_adapter(None, base=backbone), ["a red picture", "a blue picture"]
    expected = ranked_alone(captioner, photos, NAMES, texts)
    with lora_blip.use_adapters(backbone, NAMES):
        found = [dict(each.ranking)[texts[0]] for each in captioner.rank(photos, texts)]
    assert found == pytest.approx(expected, abs=1e-4) and len({round(p, 3) for p in expected}) > 2


@pytest.mark.parametrize("kind", ["itm", "itm2"])
def test_texts_are_encoded_by_the_adapter_of_each_image(make, photos, kind):
    """Before, the adapter of the first image encoded the texts for all."""
    backbone, texts = make(kind), ["a red picture", "a blue picture", "one cube"]
    names: list[str | None] = ["one", None, "two", "one", None, "two", "one"]
    for name in ("one", "two"):
        for lora in lora_blip.inject(backbone, "qformer" if kind == "itm2" else "vit,text", name=name).values():
            torch.nn.init.normal_(lora.B, std=0.3)
    captioner = Captioner.from_adapter(None, base=backbone, batch_size=2)
    expected = ranked_alone(captioner, photos, names, texts)
    with lora_blip.use_adapters(backbone, names):
        found = [dict(each.ranking)[texts[0]] for each in captioner.rank(photos, texts)]
    assert found == pytest.approx(expected, abs=1e-4) and len({round(p, 2) for p in expected}) > 2
    stream = captioner.stream(iter(photos), texts=texts)  # each batch follows the block in which it is computed
    found = []
    for start in range(0, len(photos), 2):
        with lora_blip.use_adapters(backbone, "one" if start % 4 else "two"):
            found += [dict(each.ranking)[texts[0]] for each in itertools.islice(stream, 2)]
    for start in range(0, len(photos), 2):
        with lora_blip.use_adapters(backbone, "one" if start % 4 else "two"):
            alone = [dict(captioner.rank(photo, texts).ranking)[texts[0]] for photo in photos[start : start + 2]]
        assert found[start : start + 2] == pytest.approx(alone, abs=1e-4)


def test_a_captioner_with_its_own_adapter_does_not_disturb_lists_with_none(photos, tmp_path, backbone):
    """Before, a list with None was an error while another captioner with an adapter was open on the base."""
    expected = alone(backbone, photos)
    path = lora_blip.save_adapter(tmp_path / "adapter.safetensors", backbone, name="vqa", task={"name": "caption"})
    captioner = Captioner.from_adapter(None, base=backbone, max_new_tokens=6)
    own = Captioner.from_adapter(path, base=backbone, max_new_tokens=6)
    with lora_blip.use_adapters(backbone, NAMES):
        assert [each.text for each in captioner(photos)] == expected
        with lora_blip.disable_adapters(backbone):  # a block inside a block with a list
            base = [each.text for each in captioner(photos)]
    with lora_blip.disable_adapters(backbone):
        assert [each.text for each in captioner(photos)] == base
    assert own(photos[0]).text == expected[0]


def test_a_task_that_keeps_the_block_of_a_removed_adapter_raises_an_error(backbone, photos):
    """A task that was started in a block keeps the block. Before, its prediction was that of the base."""
    captioner = Captioner.from_adapter(None, base=backbone, max_new_tokens=6)

    async def handle(ready: asyncio.Event) -> str:
        await ready.wait()
        return (await asyncio.to_thread(captioner, photos[0])).text

    async def serve(remove: bool) -> str:
        ready = asyncio.Event()
        with lora_blip.use_adapters(backbone, "vqa"):
            task = asyncio.create_task(handle(ready))
        await asyncio.sleep(0)
        if remove:
            lora_blip.eject(backbone)
        ready.set()
        return await task

    with lora_blip.use_adapters(backbone, "vqa"):
        expected = captioner(photos[0]).text
    assert asyncio.run(serve(remove=False)) == expected
    with pytest.raises(LoRAError, match="the model has no adapter 'vqa'"):
        asyncio.run(serve(remove=True))
    assert captioner(photos[0]).text


@pytest.mark.parametrize("beams", ["x", 0, 1.5, True, None])
def test_a_wrong_number_of_beams_is_an_error(backbone, beams):
    with (
        pytest.raises(LoRAError, match="expected a whole number of at least 1, such as beams=3"),
        lora_blip.use_adapters(backbone, ["vqa"], beams=beams),
    ):
        pass


@pytest.mark.parametrize("count", [1, 6, 8])
def test_a_wrong_number_of_names_is_an_error_before_the_first_image(backbone, photos, count):
    captioner = Captioner.from_adapter(None, base=backbone, max_new_tokens=6)
    with (
        lora_blip.use_adapters(backbone, (NAMES * 2)[:count]),
        pytest.raises(InputError, match=rf"use_adapters names {count} adapters?, but .*; name one for each image"),
    ):
        captioner(photos)
    assert backbone.fast


def test_a_captioner_with_its_own_adapter_ignores_the_adapters_of_rows(make, photos, tmp_path, backbone):
    source = make("blip")
    for lora in lora_blip.inject(source, "vit").values():
        torch.nn.init.normal_(lora.B, std=0.1)
    path = lora_blip.save_adapter(tmp_path / "adapter.safetensors", source, task={"name": "caption"})
    captioner = Captioner.from_adapter(path, base=backbone, max_new_tokens=6)
    expected = captioner(photos)
    with lora_blip.use_adapters(backbone, ["vqa", None]):
        assert captioner(photos) == expected


def test_a_disabled_block_is_the_base_also_if_an_adapter_is_loaded_in_it(make, photos, backbone, tmp_path):
    """Another thread may load an adapter while the block is active. It acts for others, and not in the block."""
    path = lora_blip.save_adapter(tmp_path / "adapter.safetensors", backbone, name="vqa", task={"name": "caption"})
    base = make("blip")
    captioner = Captioner.from_adapter(None, base=base, max_new_tokens=6)
    expected = captioner(photos)
    lora_blip.load_adapter(base, path, name="first")
    with lora_blip.disable_adapters(base):
        assert captioner(photos) == expected
        thread = threading.Thread(target=lora_blip.load_adapter, args=(base, path), kwargs={"name": "second"})
        thread.start()
        thread.join()
        assert captioner(photos) == expected
        with lora_blip.use_adapters(base, "second"):  # an adapter stays disabled in a block that is inside
            assert captioner(photos) == expected
    assert attached.names(base.model) == ["first", "second"] and captioner(photos) != expected


@pytest.mark.parametrize("eject_first", [False, True])
def test_a_disabled_block_of_a_model_without_adapters_disables_a_later_adapter(make, photos, backbone, tmp_path, eject_first):
    """The block begins before the first adapter, or the last adapter is removed in it."""
    path = lora_blip.save_adapter(tmp_path / "adapter.safetensors", backbone, name="vqa", task={"name": "caption"})
    base = make("blip")
    captioner = Captioner.from_adapter(None, base=base, max_new_tokens=6)
    expected = captioner(photos)
    if eject_first:
        lora_blip.load_adapter(base, path, name="first")
    with lora_blip.disable_adapters(base):
        if eject_first:
            lora_blip.eject(base)
        lora_blip.load_adapter(base, path, name="second")
        assert captioner(photos) == expected
    assert captioner(photos) != expected


@pytest.mark.parametrize(("names", "beams"), [(["vqa", "caption"], 3), (["vqa"] * 3 + ["caption"] * 3, 3)])
def test_a_beam_search_with_adapters_by_row_names_the_argument_to_give(backbone, names, beams):
    """The first list needs `beams`. The second names each row of the search, which does not work either."""
    pixels = torch.zeros(2, 3, backbone.image_size, backbone.image_size)
    with (
        lora_blip.use_adapters(backbone, names),
        pytest.raises(LoRAError, match=rf"use_adapters\(model, names, beams={beams}\)"),
    ):
        backbone.model.generate(pixels, num_beams=beams, max_new_tokens=3)
    with lora_blip.use_adapters(backbone, ["vqa", "caption"], beams=beams):
        assert len(backbone.model.generate(pixels, num_beams=beams, max_new_tokens=3)) == 2


def test_restore_after_bake_is_an_error(make):
    backbone = make("blip")
    lora_blip.restore(backbone)  # nothing was merged
    for lora in lora_blip.inject(backbone, "vit").values():
        torch.nn.init.normal_(lora.B, std=0.1)
    lora_blip.bake(backbone)
    with pytest.raises(LoRAError, match=r"merged permanently .* restored; load the base again"):
        lora_blip.restore(backbone)


@pytest.mark.parametrize("kind", ["array", "float array", "tensor", "gray", "pil"])
def test_an_image_with_too_many_pixels_keeps_its_place_with_an_error(make, monkeypatch, kind):
    monkeypatch.setattr("lora_blip.inference.image_inputs.LARGEST", 40 * 30)
    pixels = np.zeros((40, 31, 3), np.uint8)
    images = {
        "array": pixels, "float array": pixels / 255, "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
        "gray": pixels[..., 0], "pil": Image.fromarray(pixels),
    }  # fmt: skip
    captioner = Captioner.from_adapter(None, base=make("blip"), max_new_tokens=3)
    small, large = captioner([pixels[:, :30], images[kind]])
    assert small.text and large.error.endswith("has 31 × 40 pixels; expected 1 to 1,200") and not large.text
