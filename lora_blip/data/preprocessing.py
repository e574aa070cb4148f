"""Compute the input of a ViT from an image: the same bits as the checkpoint's image processor, but faster."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

EVERY_LEVEL = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
OTHER_STEPS = ("do_center_crop", "do_pad")


class Pixels:
    """Resizes an image and computes (level / 255 − mean) / std for each channel, in float32.

    `exact` is True if the result equals the processor's bit for bit. The constructor tests this with all 256 levels and with
    resized images. `exact` is False for a processor that crops, for example. Then every call uses the processor, and resized
    bytes cannot be cached. The constructor reads the processor's settings; later changes have no effect.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.exact = _is_plain(image_processor)
        if self.exact:
            self.size = (image_processor.size["width"], image_processor.size["height"])
            self.resample = Image.Resampling(image_processor.resample)
            scale = (image_processor.image_mean, image_processor.image_std)
            self.mean, self.std = (torch.tensor(each, dtype=torch.float32, device="cpu").reshape(3, 1, 1) for each in scale)
            self.exact = self._agrees()

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixel values of an image, (3, H, W) float32."""
        if self.exact and image.mode == "RGB" and "transparency" not in image.info:
            return self.of_bytes(self.resized(image))
        return self._by_processor(image)

    def resized(self, image: Image.Image) -> Tensor:
        """Return the bytes of an RGB image at the model's size, (H, W, 3) uint8. Raise ValueError unless `exact`."""
        if not self.exact:
            raise ValueError("this image processor does more than resize an image and scale its bytes; do not cache them")
        return torch.from_numpy(np.array(image.resize(self.size, self.resample)))

    def of_bytes(self, levels: Tensor) -> Tensor:
        """Return the pixel values of bytes: (H, W, 3) uint8 → (3, H, W) float32."""
        planes = np.empty((3, *levels.shape[:2]), dtype=np.uint8)
        for plane, channel in zip(planes, levels.permute(2, 0, 1).numpy(), strict=True):
            plane[:] = channel  # copying first takes a third of the time of float operations on strided memory
        return torch.from_numpy(planes).to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def _agrees(self) -> bool:
        """Return True if the values equal the processor's for all 256 levels, and for an enlarged and a reduced image."""
        levels = self.of_bytes(torch.from_numpy(np.array(EVERY_LEVEL)))
        if not torch.equal(levels, self._by_processor(EVERY_LEVEL, do_resize=False)):
            return False
        width, height = self.size
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
        probes = (noise, noise.resize((width + 37, 2 * height + 5)))
        return all(torch.equal(self.of_bytes(self.resized(probe)), self._by_processor(probe)) for probe in probes)

    def _by_processor(self, image: Image.Image, **changed: Any) -> Tensor:
        """Return the pixel values by the checkpoint's processor, (3, H, W) float32. changed: settings to override."""
        return self.image_processor(image, return_tensors="pt", **changed)["pixel_values"][0]


def side_of(image_processor: Any) -> int:
    """Return the height of the square images that a processor makes, in pixels."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", None) else image_processor.size
    return size.height or size.shortest_edge


def pixels_of(image_processor: Any) -> Pixels:
    """Return the Pixels of a processor. They are cached, because the test takes as long as a few images."""
    return _pixels_of(image_processor, str(vars(image_processor)))


@lru_cache(maxsize=4)
def _pixels_of(image_processor: Any, _settings: str) -> Pixels:
    return Pixels(image_processor)


def _is_plain(image_processor: Any) -> bool:
    """Return True for BLIP's own processor, if its settings only resize an image and scale its bytes."""
    if type(image_processor) is not BlipImageProcessorPil:
        return False
    size: Any = image_processor.size
    if not (size.height and size.width) or size.shortest_edge or size.max_height:  # these take precedence in `resize`
        return False
    steps = [bool(getattr(image_processor, name, None)) for name in (*STEPS, *OTHER_STEPS)]
    channels = [image_processor.image_mean, image_processor.image_std]
    return steps == [name in STEPS for name in (*STEPS, *OTHER_STEPS)] and all(np.shape(each) == (3,) for each in channels)
