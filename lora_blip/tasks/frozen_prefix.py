"""Cache the states of each image at the input of the first block with an adapter: training never changes them.

The ViT is cut before its first block with an adapter. If no block has an adapter, the cached states are the ViT's output. If
only the language model of a BLIP-2 has adapters, the cached states are the features: the output of the Q-Former's projection.
States are cached in fp16.

Results do not depend on which states are in the cache: a state that was just computed is rounded to fp16 too, and each image is
computed alone.
"""

import re
from typing import Any

import torch
from torch import Tensor

from lora_blip.data.disk_cache import Store
from lora_blip.data.loader import CachedStates
from lora_blip.lora import attached
from lora_blip.tasks.base import ImageEncoder

DTYPE = torch.float16  # of cached states: 11 bits of significand; autocast's bf16 has 8
BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
LANGUAGE = "language_model."


class Prefix:
    """The part of a model before its first adapter. `encoder` is `BaseTask.encoder`."""

    def __init__(self, encoder: ImageEncoder, store: Store | None = None) -> None:
        self.vit, self.project_vision, self.store = encoder.model.vision_model, encoder.project_vision, store
        self.first, self.skips_vision = first_adapted_block(encoder.model)

    @property
    def skips_blocks(self) -> bool:
        """Return True if a block of the ViT comes before the first adapter."""
        return self.first > 0

    @property
    def description(self) -> dict[str, Any]:
        """Return what is cached, in JSON."""
        return {"enters": "language model" if self.skips_vision else f"ViT block {self.first}", "dtype": str(DTYPE)}

    def encode_images(self, pixel_values: Tensor, cached: CachedStates) -> Tensor:
        """Return the features of each image. `pixel_values` has the images that have no states in `cached`."""
        states: dict[int, Tensor] = dict(zip(cached.indices, cached.states.split(1), strict=False))
        others = (place for place in range(len(cached.indices) + len(pixel_values)) if place not in states)
        for place, key, pixels in zip([*others], cached.keys, pixel_values.split(1), strict=False):
            states[place] = self.compute_states(pixels)
            if self.store and key and states[place].dtype == DTYPE:  # not if they overflow fp16
                self.store.put(key, states[place][0])
        dtype = self.vit.embeddings.patch_embedding.weight.dtype  # the dtype that the first block expects
        return self.continue_from(torch.cat([states[place].to(dtype) for place in sorted(states)]))

    @torch.no_grad()
    def compute_states(self, pixel_values: Tensor) -> Tensor:
        """Return the states to cache, (1, tokens, width), in fp16 unless that overflows.

        pixel_values: (1, 3, H, W).
        """
        x = self.vit.embeddings(pixel_values)
        for block in self.vit.encoder.layers[: self.first]:  # `compile_blocks` does not compile these
            x = block(x)
        if self.first == len(self.vit.encoder.layers):
            x = self.vit.post_layernorm(x)
        if self.skips_vision:
            x = self.project_vision(x)
        rounded = x.to(DTYPE)
        return rounded if torch.isfinite(rounded).all() else x

    def continue_from(self, x: Tensor) -> Tensor:
        """Return the features of each image from its states (images, tokens, width)."""
        if self.skips_vision:
            return x
        for block in self.vit.encoder.layers[self.first :]:
            x = block(x)
        if self.first < len(self.vit.encoder.layers):
            x = self.vit.post_layernorm(x)
        return self.project_vision(x)


def first_adapted_block(model: Any) -> tuple[int, bool]:
    """Return the first block of the ViT with an adapter, and True if only the language model has adapters.

    If no block has an adapter, the first value is the number of blocks.
    """
    sites = {lora.site.module for name in attached.names(model) for lora in attached.adapters(model, name).values()}
    blocks = [int(match[1]) for site in sites if (match := BLOCK.match(site))]
    language_only = bool(sites) and all(site.startswith(LANGUAGE) for site in sites)
    return min(blocks, default=len(model.vision_model.encoder.layers)), language_only
