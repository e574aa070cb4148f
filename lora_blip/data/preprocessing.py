"""Pictures → what a ViT reads, bit for bit as the checkpoint's own image processor makes it, in a fraction of its time."""

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
    """(level / 255 − mean) / std of each channel of the resized picture, in float32.

    `exact` tells whether that is what the processor computes, to the last bit: for all 256 levels and for probes that were
    resized. Where it is not (another scale, a crop, the shortest edge), every call is the processor's own, and there are
    no bytes to keep. Settings are taken as they are now.
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
        """A picture → (3, H, W) float32."""
        if self.exact and image.mode == "RGB" and "transparency" not in image.info:
            return self.of_bytes(self.resized(image))
        return self._theirs(image)

    def resized(self, image: Image.Image) -> Tensor:
        """An RGB picture → its bytes at the model's size, (H, W, 3) uint8. ValueError unless `exact`."""
        if not self.exact:
            raise ValueError("this image processor does more than to scale a resized picture's bytes; do not keep them")
        return torch.from_numpy(np.array(image.resize(self.size, self.resample)))

    def of_bytes(self, levels: Tensor) -> Tensor:
        """(H, W, 3) uint8 → (3, H, W) float32."""
        planes = np.empty((3, *levels.shape[:2]), dtype=np.uint8)
        for plane, channel in zip(planes, levels.permute(2, 0, 1).numpy(), strict=True):
            plane[:] = channel  # numpy takes a channel out in a third of the time of a strided float operation
        return torch.from_numpy(planes).to(torch.float32).div_(255).sub_(self.mean).div_(self.std)

    def _agrees(self) -> bool:
        """Whether the arithmetic is the processor's, and the resizing too: up, down and out of shape."""
        levels = self.of_bytes(torch.from_numpy(np.array(EVERY_LEVEL)))
        if not torch.equal(levels, self._theirs(EVERY_LEVEL, do_resize=False)):
            return False
        width, height = self.size
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
        probes = (noise, noise.resize((width + 37, 2 * height + 5)))
        return all(torch.equal(self.of_bytes(self.resized(probe)), self._theirs(probe)) for probe in probes)

    def _theirs(self, image: Image.Image, **changed: Any) -> Tensor:
        return self.image_processor(image, return_tensors="pt", **changed)["pixel_values"][0]


def side_of(image_processor: Any) -> int:
    """Return the height of the square images that a processor makes, in pixels."""
    size = image_processor.crop_size if getattr(image_processor, "do_center_crop", None) else image_processor.size
    return size.height or size.shortest_edge


def pixels_of(image_processor: Any) -> Pixels:
    """One for each processor and its settings: to verify it takes as long as some pictures."""
    return _pixels_of(image_processor, str(vars(image_processor)))


@lru_cache(maxsize=4)
def _pixels_of(image_processor: Any, _settings: str) -> Pixels:
    return Pixels(image_processor)


def _is_plain(image_processor: Any) -> bool:
    """Whether it is BLIP's own, with settings that leave a resized picture's bytes to be scaled and nothing else."""
    if type(image_processor) is not BlipImageProcessorPil:
        return False
    size: Any = image_processor.size
    if not (size.height and size.width) or size.shortest_edge or size.max_height:  # what `resize` looks at first
        return False
    steps = [bool(getattr(image_processor, name, None)) for name in (*STEPS, *OTHER_STEPS)]
    channels = [image_processor.image_mean, image_processor.image_std]
    return steps == [name in STEPS for name in (*STEPS, *OTHER_STEPS)] and all(np.shape(each) == (3,) for each in channels)
