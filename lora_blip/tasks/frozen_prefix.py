"""What comes before the first adapter never changes: computed once for each picture, kept, and read ever after.

The ViT is cut before the first block that has an adapter. Without one in the ViT, what is kept is its output; of a
BLIP-2 with adapters on the language model alone, what the Q-Former makes of it. Kept in fp16, with which the first
look at a picture goes on as well, each picture by itself: the bits do not hang on what was in the cache.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_blip.data.disk_cache import Store
from lora_blip.data.loader import CachedStates
from lora_blip.lora import attached

KEPT = torch.float16  # 11 bits of significand; autocast's bf16 has 8
BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")
LANGUAGE = "language_model."


class Prefix:
    """`after`: what a task makes of the ViT's output (pictures, states, width) before its texts are read."""

    def __init__(self, model: Any, project_vision: Callable[[Tensor], Tensor], store: Store | None = None) -> None:
        self.vit, self.project_vision, self.store = model.vision_model, project_vision, store
        self.first, self.beyond = cut(model)

    @property
    def worthwhile(self) -> bool:
        """Whether anything comes before the first adapter but the embedding of the patches."""
        return self.first > 0

    @property
    def about(self) -> dict[str, Any]:
        """What is kept, in JSON."""
        return {"enters": "language model" if self.beyond else f"ViT block {self.first}", "dtype": str(KEPT)}

    def encode_images(self, pixel_values: Tensor, known: CachedStates) -> Tensor:
        """What the task reads of each picture: of those whose states are known, and of the others, by their pixels."""
        states: dict[int, Tensor] = dict(zip(known.indices, known.states.split(1), strict=False))
        others = (place for place in range(len(known.indices) + len(pixel_values)) if place not in states)
        for place, key, pixels in zip([*others], known.keys, pixel_values.split(1), strict=False):
            states[place] = self.enter(pixels)
            if self.store and key and states[place].dtype == KEPT:
                self.store.put(key, states[place][0])
        dtype = self.vit.embeddings.patch_embedding.weight.dtype  # in which the first block gets them
        return self.go_on(torch.cat([states[place].to(dtype) for place in sorted(states)]))

    @torch.no_grad()
    def enter(self, pixel_values: Tensor) -> Tensor:
        """(1, 3, H, W) → what enters the first block with an adapter (1, tokens, width); as it is if fp16 overflows."""
        x = self.vit.embeddings(pixel_values)
        for block in self.vit.encoder.layers[: self.first]:  # which `compile_blocks` leaves alone
            x = block(x)
        if self.first == len(self.vit.encoder.layers):
            x = self.vit.post_layernorm(x)
        if self.beyond:
            x = self.project_vision(x)
        kept = x.to(KEPT)
        return kept if torch.isfinite(kept).all() else x

    def go_on(self, x: Tensor) -> Tensor:
        """(pictures, tokens, width) → what the task reads of each picture."""
        if self.beyond:
            return x
        for block in self.vit.encoder.layers[self.first :]:
            x = block(x)
        if self.first < len(self.vit.encoder.layers):
            x = self.vit.post_layernorm(x)
        return self.project_vision(x)


def cut(model: Any) -> tuple[int, bool]:
    """The first block of the ViT with an adapter (or their number), and whether only the language model has any."""
    sites = {lora_.site.module for name in attached.names(model) for lora_ in attached.adapters(model, name).values()}
    blocks = [int(match[1]) for site in sites if (match := BLOCK.match(site))]
    language = bool(sites) and all(site.startswith(LANGUAGE) for site in sites)
    return min(blocks, default=len(model.vision_model.encoder.layers)), language
