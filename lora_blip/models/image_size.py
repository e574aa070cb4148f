"""The image size of a backbone: one side in pixels, for the positions of its ViT and for its image processor.

`resize_positions` interpolates the position embeddings once, when the backbone is loaded. From then on every part of the
program reads `vision_config.image_size`, and no forward needs `interpolate_pos_encoding=True`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_utils import SizeDict

from lora_blip.errors import ConfigError, ModelError
from lora_blip.models.library import write_processor
from lora_blip.runtime.untrusted import quoted

LARGEST = 4096  # pixels of a side
PROBES = ((48, 32), (32, 48), (40, 40))  # width and height of test images for a processor
PIXELS = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")


def own_size(config: Any, name: str) -> int:
    """Return the image size in a model's config. Raise ModelError if it is not a multiple of the patch size."""
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    for key, value in (("image_size", size), ("patch_size", patch)):
        if type(value) is not int or not 0 < value <= LARGEST:
            raise ModelError(
                f"{name!r}: {key} in its config.json is {quoted(value)}; expected a whole number from 1 to {LARGEST}, "
                "because images and patches are square; copy config.json again from the checkpoint"
            )
    if size % patch:
        raise ModelError(
            f"{name!r}: image_size {size} in its config.json is not a multiple of its patch_size {patch}; "
            "copy config.json again from the checkpoint"
        )
    return size


def check_size(size: int, config: Any) -> None:
    """Raise ConfigError if the ViT cannot cut an image of this size into whole patches."""
    patch = config.vision_config.patch_size
    if type(size) is not int:
        raise ConfigError(f"image_size = {quoted(size)}: expected a whole number, such as {own_size(config, 'the base')}")
    if size % patch or not 0 < size <= LARGEST:
        below = max(patch, min(size, LARGEST) // patch * patch)
        near = " or ".join(str(fit) for fit in (below, below + patch) if fit <= LARGEST)
        raise ConfigError(
            f"image_size = {size}: expected a multiple of the model's patch size {patch}, up to {LARGEST}; "
            f"set IMAGE_SIZE to {near}"
        )


@torch.no_grad()
def resize_positions(model: Any, size: int) -> None:
    """Interpolate the ViT's position embeddings to images of `size` × `size`, as `interpolate_pos_encoding=True` does.

    The method of transformers computes them in the dtype of the weights, so the result has the same bits.
    """
    embeddings = model.vision_model.embeddings
    positions = embeddings.position_embedding  # (1, 1 + patches, width)
    patches = (size // embeddings.patch_size) ** 2
    with torch.autocast(positions.device.type, enabled=False):
        resized = embeddings.interpolate_pos_encoding(positions.new_empty(1, 1 + patches, positions.shape[-1]), size, size)
    embeddings.position_embedding = nn.Parameter(resized.detach().clone(), requires_grad=False)
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, patches, 1 + patches
    for config in (model.config.vision_config, model.vision_model.config, embeddings.config):
        config.image_size = size


def fit_processor(image_processor: Any, size: int, name: str) -> str:
    """Make an image processor resize every image to `size` × `size`. Return what it did before, or "" if nothing changes.

    A processor that crops still crops: its size and its crop size change by the same factor. Raise ModelError if a size is not
    square, or if the output has another size after the change.
    """
    _check_sizes(image_processor, name)
    _check_values(image_processor, name)
    try:
        sizes = _sides(image_processor)
    except Exception:  # its size may be missing or invalid
        sizes = set()
    if sizes == {(size, size)}:
        return ""
    before = _described(image_processor, sizes)
    crop = image_processor.do_resize and getattr(image_processor, "do_center_crop", None) and image_processor.crop_size
    height = dict(crop)["height"] if crop else 0  # a SizeDict, or a dict that the user has set
    sides = {key: max(size, round(value * size / height)) for key, value in dict(image_processor.size).items()} if crop else {}
    if sides and max(sides.values()) <= LARGEST:
        image_processor.size, image_processor.crop_size = SizeDict(**sides), SizeDict(height=size, width=size)
    else:
        image_processor.size, image_processor.do_resize = SizeDict(height=size, width=size), True
        for step in ("do_center_crop", "do_pad"):
            if getattr(image_processor, step, None):
                setattr(image_processor, step, False)
    try:
        sizes, reason = _sides(image_processor), "its output has another size"
    except Exception as error:  # transformers does not check the settings of an untrusted file
        sizes, reason = set(), f"{type(error).__name__}: {quoted(str(error))}"
    if sizes != {(size, size)}:
        raise ModelError(
            f"{name!r}: its {type(image_processor).__name__} cannot resize an image to {size}×{size} ({reason}); "
            f"{write_processor(name)}"
        )
    return before


def _check_sizes(image_processor: Any, name: str) -> None:
    """Raise ModelError if a size of a processor is not square, or is too large."""
    for setting in ("size", "crop_size", "pad_size"):
        sides: Mapping[str, Any] = dict(getattr(image_processor, setting, None) or {})
        for key, value in sides.items():
            if key in PIXELS and (type(value) is not int or not 0 < value <= LARGEST):
                raise ModelError(
                    f"{name!r}: {setting} of its image processor has {key} {quoted(value)}; expected a whole number from 1 to "
                    f"{LARGEST}; correct preprocessor_config.json, or processor_config.json if the folder has none"
                )
        height, width = sides.get("height"), sides.get("width")
        if height != width:
            raise ModelError(
                f"{name!r}: {setting} of its image processor is {height}×{width} (height×width), and the model needs square "
                "images; set both to the same number in preprocessor_config.json, or processor_config.json if there is none"
            )


def _check_values(image_processor: Any, name: str) -> None:
    """Raise ModelError if the pixels of a processor are not finite, as with an image_std of 0."""
    try:
        with np.errstate(all="ignore"):
            pixels = image_processor(Image.new("RGB", (8, 8), (0, 128, 255)), return_tensors="pt")["pixel_values"]
        finite = bool(torch.isfinite(pixels).all())
    except Exception:  # `fit_processor` reports its sizes
        return
    if not finite:
        keys = ("image_mean", "image_std", "rescale_factor")
        values = ", ".join(f"{key} {quoted(getattr(image_processor, key, None))}" for key in keys)
        raise ModelError(f"{name!r}: its image processor makes pixels that are not finite ({values}); {write_processor(name)}")


def _described(image_processor: Any, sizes: set[tuple[int, int]]) -> str:
    """Return what a processor with these output sizes does."""
    if len(sizes) == 1:
        return "makes {}×{}".format(*next(iter(sizes)))
    if not image_processor.do_resize:
        return "does not resize images"
    sides = ", ".join(f"{key} {value}" for key, value in dict(image_processor.size or {}).items())
    return f"resizes to {sides}" if sides else "has no size"


def _sides(image_processor: Any) -> set[tuple[int, int]]:
    """Return the output sizes (height, width) of a processor for images of several shapes."""
    outputs = [image_processor(Image.new("RGB", probe), return_tensors="pt")["pixel_values"][0] for probe in PROBES]
    return {(int(output.shape[-2]), int(output.shape[-1])) for output in outputs}
