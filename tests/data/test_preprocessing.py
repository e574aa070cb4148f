"""Test that pixel values equal those of the checkpoint's processor, bit for bit, for all images and settings."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lora_blip.data.images import to_rgb
from lora_blip.data.loader import pixel_values
from lora_blip.data.preprocessing import WHOLE, Pixels, pixels_of, planes_of, visible_part

PROCESSORS = {
    "tiny-blip": lambda: AutoImageProcessor.from_pretrained("assets/tiny-blip", backend="pil"),
    "BLIP, 384": BlipImageProcessorPil,
    "BLIP-2, 224": lambda: BlipImageProcessorPil(size={"height": 224, "width": 224}),
    "BLIP-2, 364, as it resizes": lambda: BlipImageProcessorPil(size={"height": 364, "width": 364}, resample=2),
    "out of square": lambda: BlipImageProcessorPil(size={"height": 40, "width": 72}),
    "other means": lambda: BlipImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[1] * 3),
}
UNUSUAL = {  # settings under which the bytes of a resized picture do not say everything, or not in this way
    "another scale": {"rescale_factor": 1 / 128},
    "no scale": {"do_rescale": False},
    "no mean": {"do_normalize": False},
    "as large as it is": {"do_resize": False},
    "a crop": {"do_center_crop": True, "crop_size": {"height": 20, "width": 20}},
    "the shortest edge": {"size": {"shortest_edge": 32}},
    "one mean for all": {"image_mean": 0.5, "image_std": 0.5},
}
SIZES = [(1, 1), (7, 3), (3, 7), (32, 32), (96, 96), (384, 384), (500, 333), (33, 1000), (1200, 900)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(processor: BlipImageProcessorPil, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixel_values_are_the_processor_s_to_the_last_bit(name):
    """This holds for enlarged, reduced and distorted images, and for one pixel. The fast path is used."""
    processor = PROCESSORS[name]()
    pixels = Pixels(processor)
    assert pixels.exact
    for size in SIZES:
        image = noise(*size)
        values = pixels(image)
        assert torch.equal(values, theirs(processor, image)) and values.dtype == torch.float32 and values.is_contiguous()
        assert torch.equal(pixel_values(image, processor), values)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1", "I;16", "F"])
def test_every_mode_comes_out_as_the_processor_makes_it(mode):
    processor = BlipImageProcessorPil()
    levels = np.arange(600, dtype=np.uint16).reshape(20, 30)
    deep = {"I;16": Image.fromarray(levels), "F": Image.fromarray(np.float32(levels / 600))}
    image = to_rgb(deep[mode] if mode in deep else noise(60, 45).convert(mode))
    assert torch.equal(Pixels(processor)(image), theirs(processor, image))
    if mode in ("L", "P", "RGBA", "LA"):  # these modes were not converted to RGB before
        image = noise(60, 45).convert(mode)
        assert torch.equal(Pixels(processor)(image), theirs(processor, image))


def test_an_image_with_a_transparent_colour_is_left_to_the_processor():
    processor, image = BlipImageProcessorPil(), noise(30, 20)
    image.info["transparency"] = image.getpixel((0, 0))
    assert torch.equal(Pixels(processor)(image), theirs(processor, image))


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_settings_are_left_to_the_processor(name):
    processor = BlipImageProcessorPil(**{"size": {"height": 32, "width": 32}} | UNUSUAL[name])
    pixels, image = Pixels(processor), noise(50, 41)
    assert not pixels.exact and torch.equal(pixels(image), theirs(processor, image))
    with pytest.raises(ValueError, match="do not cache them"):
        pixels.resized(image)


def test_a_processor_that_computes_other_values_is_detected(monkeypatch):
    """Its output for test images decides, not its name or its settings."""
    monkeypatch.setattr(BlipImageProcessorPil, "normalize", lambda *given, **_: given[1] * np.float32(2))
    assert not Pixels(BlipImageProcessorPil()).exact


def test_cached_bytes_give_the_same_pixel_values():
    """This holds for the image, its bytes, its bytes in another memory order, and all of them after pickling."""
    pixels, image = Pixels(BlipImageProcessorPil()), noise(640, 480)
    levels = pixels.resized(image)
    assert levels.shape == (384, 384, 3) and levels.dtype == torch.uint8
    before = levels.clone()
    for bytes_ in (levels, levels.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        assert torch.equal(pixels.of_planes(planes_of(bytes_)), theirs(pixels.image_processor, image))
    assert torch.equal(levels, before)  # they are read, not changed
    assert torch.equal(pickle.loads(pickle.dumps(pixels))(image), pixels(image))


def test_changed_settings_of_the_processor_are_used():
    """A user may change the size after the first image was read."""
    processor, image = BlipImageProcessorPil(size={"height": 20, "width": 20}), Image.new("RGB", (30, 30), "red")
    assert pixels_of(processor)(image).shape == (3, 20, 20) and pixels_of(processor) is pixels_of(processor)
    processor.size = type(processor.size)(height=12, width=16)
    assert pixels_of(processor)(image).shape == (3, 12, 16)


SEEN = {  # settings of CLIP's processor, the size of an image, and the part of it that the model sees
    "a crop of a wide image": ({}, (120, 60), (0.25, 0, 0.5, 1)),
    "a crop of a high image": ({}, (60, 240), (0, 0.375, 1, 0.25)),
    "a crop inside a larger one": ({"size": {"shortest_edge": 64}}, (100, 100), (0.25, 0.25, 0.5, 0.5)),
    "a crop without a resize": ({"do_resize": False}, (128, 64), (0.375, 0.25, 0.25, 0.5)),
    "a crop larger than the image, which pads": ({"do_resize": False}, (16, 8), (-0.5, -1.5, 2, 4)),
    "a line of one pixel": ({}, (1, 64), (0, 0.49, 1, 0.02)),
    "other values of the same crop": ({"do_normalize": False, "do_rescale": False}, (120, 60), (0.25, 0, 0.5, 1)),
}


@pytest.mark.parametrize("name", SEEN)
def test_the_visible_part_of_an_image_is_what_the_processor_keeps(name):
    """Within a fifth of a pixel of the model, which are 32."""
    settings, size, expected = SEEN[name]
    processor = CLIPImageProcessorPil(**{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}} | settings)
    assert visible_part(processor, *size) == pytest.approx(expected, abs=0.006)


def test_a_processor_that_only_resizes_shows_the_whole_image():
    """Also one whose values are not computed by `Pixels`, so that the part is measured."""
    assert visible_part(BlipImageProcessorPil(size={"height": 32, "width": 32}), 500, 333) == WHOLE
    measured = visible_part(BlipImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False), 500, 333)
    assert measured == pytest.approx(WHOLE, abs=0.01) and measured != WHOLE
