"""Compute the input of a ViT from an image: the same bits as the checkpoint's image processor, but faster."""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

EVERY_LEVEL = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
Part = tuple[float, float, float, float]  # left, top, width, height, as fractions of an image
WHOLE: Part = (0.0, 0.0, 1.0, 1.0)
STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
OTHER_STEPS = ("do_center_crop", "do_pad")


class Scaling(NamedTuple):
    """The mean and the standard deviation of each channel. (level / 255 − mean) / std are the pixel values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def of_planes(self, planes: Tensor) -> Tensor:
        """Return the pixel values of bytes: (…, 3, H, W) uint8 → the same shape in float32, on the same device."""
        # PyTorch divides by a number on a GPU as a product with its inverse, which rounds in another way: divide by tensors
        constants = torch.tensor([[255.0] * 3, self.mean, self.std], dtype=torch.float32, device="cpu")[..., None, None]
        largest, mean, std = constants.to(planes.device, non_blocking=True)
        return planes.to(torch.float32).div_(largest).sub_(mean).div_(std)


def planes_of(levels: Tensor) -> Tensor:
    """Return bytes by channel: (H, W, 3) uint8 → (3, H, W) uint8."""
    planes = np.empty((3, *levels.shape[:2]), dtype=np.uint8)
    for plane, channel in zip(planes, levels.permute(2, 0, 1).numpy(), strict=True):
        plane[:] = channel  # copying first takes a third of the time of float operations on strided memory
    return torch.from_numpy(planes)


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
            self.scaling = Scaling(tuple(image_processor.image_mean), tuple(image_processor.image_std))
            self.exact = self._agrees()

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the pixel values of an image, (3, H, W) float32."""
        if self.exact and image.mode == "RGB" and "transparency" not in image.info:
            return self.of_planes(planes_of(self.resized(image)))
        return self._by_processor(image)

    def resized(self, image: Image.Image) -> Tensor:
        """Return the bytes of an RGB image at the model's size, (H, W, 3) uint8. Raise ValueError unless `exact`."""
        if not self.exact:
            raise ValueError("this image processor does more than resize an image and scale its bytes; do not cache them")
        return torch.from_numpy(np.array(image.resize(self.size, self.resample)))

    def of_planes(self, planes: Tensor) -> Tensor:
        """Return the pixel values of bytes: (…, 3, H, W) uint8 → the same shape in float32."""
        return self.scaling.of_planes(planes)

    def _agrees(self) -> bool:
        """Return True if the values equal the processor's for all 256 levels, and for an enlarged and a reduced image."""
        levels = self.of_planes(planes_of(torch.from_numpy(np.array(EVERY_LEVEL))))
        if not torch.equal(levels, self._by_processor(EVERY_LEVEL, do_resize=False)):
            return False
        width, height = self.size
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
        probes = (noise, noise.resize((width + 37, 2 * height + 5)))
        return all(torch.equal(self.of_planes(planes_of(self.resized(probe))), self._by_processor(probe)) for probe in probes)

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


def visible_part(image_processor: Any, width: int, height: int) -> Part:
    """Return the part of an image of this size that the model sees. A processor that pads sees more than the image.

    It is measured for a processor that does more than resize: with a black and a white image, and with an image whose levels
    are its coordinates. The black and the white image differ in all pixels that are not padding.
    """
    pixels = pixels_of(image_processor)
    if pixels.exact:
        return WHOLE
    levels = np.zeros((3, height, width, 3), dtype=np.uint8)
    levels[1] = 255
    levels[2, :, :, 0] = np.round(np.linspace(0, 255, width))
    levels[2, :, :, 1] = np.round(np.linspace(0, 255, height))[:, None]
    black, white, coordinates = (pixels(Image.fromarray(image)).double().numpy() for image in levels)
    is_image = (white != black).all(0)  # (H, W)
    across, down = np.where(is_image, (coordinates - black)[:2] / np.where(is_image, (white - black)[:2], 1), np.nan)
    left, part_width = _line(across[is_image.any(1)], width)
    top, part_height = _line(down.T[is_image.any(0)], height)
    return left, top, part_width, part_height


def _line(shares: NDArray[np.float64], count: int) -> tuple[float, float]:
    """Return where the model's square starts in an image and its length, as fractions of the image, for one direction.

    shares: (lines, S) coordinates of the model's pixels, from 0 in the first of `count` pixels of the image to 1 in the last
    one; NaN in padding. The position of pixel i is start + length · (i + 0.5) / S, by least squares.
    """
    if count == 1:
        return 0.0, 1.0  # a single pixel has no direction
    known = ~np.isnan(shares).all(0)
    positions = (np.nanmean(shares[:, known], 0) * (count - 1) + 0.5) / count
    length, start = np.polyfit((np.flatnonzero(known) + 0.5) / shares.shape[1], positions, 1)
    return float(start), float(length)


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
