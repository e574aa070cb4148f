"""Cache the states of each image at the input of the first block with an adapter: training never changes them.

The ViT is cut before its first block with an adapter. If no block has an adapter, the cached states are the ViT's output. If
only the language model of a BLIP-2 has adapters, the cached states are the features: the output of the Q-Former's projection.
States are cached in fp16.

Results do not depend on which states are in the cache. States that were just computed are rounded to fp16 too. Images are
computed in chunks of a fixed size, because the rounding of a product can depend on the number of its rows.
"""

import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
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
    """The part of a model before its first adapter. `encoder` is `BaseTask.encoder`.

    chunk: the number of images that are computed together. The last chunk of a batch is padded to this size.
    """

    def __init__(self, encoder: ImageEncoder, store: Store | None = None, chunk: int = 1) -> None:
        self.vit, self.project_vision = encoder.model.vision_model, encoder.project_vision
        self.first, self.skips_vision = first_adapted_block(encoder.model)
        if self.skips_vision:  # a BLIP-2: the language model reads the output of the Q-Former's projection
            self.features_size = encoder.model.query_tokens.shape[1] * encoder.model.language_projection.out_features
        self.store, self.chunk, self.writer = store, chunk, Writer()

    @property
    def skips_blocks(self) -> bool:
        """Return True if a block of the ViT comes before the first adapter."""
        return self.first > 0

    @property
    def description(self) -> dict[str, Any]:
        """Return what is cached, in JSON."""
        return {"enters": "language model" if self.skips_vision else f"ViT block {self.first}", "dtype": str(DTYPE)}

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the first block expects."""
        dtype: torch.dtype = self.vit.embeddings.patch_embedding.weight.dtype
        return dtype

    def states_of(self, pixel_values: Tensor, cached: CachedStates) -> Tensor:
        """Return the input of `continue_from`. `pixel_values` has the images that have no states in `cached`."""
        known = cached.states.to(self.dtype)
        if not len(pixel_values):
            return known
        computed, kept = self.compute_states(pixel_values)
        if self.store and any(cached.keys):
            self.writer.write(self.store, cached.keys, kept)
        if not cached.indices:
            return computed
        count = len(known) + len(computed)
        places = [*cached.indices, *sorted(set(range(count)).difference(cached.indices))]
        order = torch.tensor(sorted(range(count), key=places.__getitem__))
        return torch.cat([known, computed])[order.to(known.device, non_blocking=True)]

    @torch.no_grad()
    def compute_states(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of each image (images, tokens, width), rounded to fp16, and the same in fp16 for the cache.

        pixel_values: (images, 3, H, W). The states of an image that overflow fp16 are returned without rounding.
        """
        parts = []
        for part in pixel_values.split(self.chunk):
            padded = torch.cat([part, part[-1:].expand(self.chunk - len(part), -1, -1, -1)])
            parts.append(self._states(padded)[: len(part)])
        x = torch.cat(parts)
        rounded = x.to(DTYPE)
        is_finite = rounded.isfinite().flatten(1).all(1)  # (images,); not read here, because a read waits for the GPU
        return torch.where(is_finite[:, None, None], rounded.to(self.dtype), x.to(self.dtype)), rounded

    def _states(self, pixel_values: Tensor) -> Tensor:
        x = self.vit.embeddings(pixel_values)
        for block in self.vit.encoder.layers[: self.first]:  # these are never compiled
            x = block(x)
        if self.first == len(self.vit.encoder.layers):
            x = self.vit.post_layernorm(x)
        return self.project_vision(x) if self.skips_vision else x

    def bytes_per_image(self, side: int) -> int:
        """Return the size in the cache of the states of an image with `side` pixels."""
        config = self.vit.config
        patches = (side // config.patch_size) ** 2
        return (self.features_size if self.skips_vision else (patches + 1) * config.hidden_size) * DTYPE.itemsize

    def continue_from(self, x: Tensor) -> Tensor:
        """Return the features of each image from its states (images, tokens, width)."""
        if self.skips_vision:
            return x
        for block in self.vit.encoder.layers[self.first :]:
            x = block(x)
        if self.first < len(self.vit.encoder.layers):
            x = self.vit.post_layernorm(x)
        return self.project_vision(x)


class Writer:
    """Writes states to a cache in a thread, so that a training step does not wait for the GPU or the disk."""

    MOST = 4  # batches that wait; more would fill the memory if the disk is slow

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.waiting: deque[Future[None]] = deque()

    def write(self, store: Store, keys: list[str], states: Tensor) -> None:
        """Store finite states (images, tokens, width) under their keys, if there is room. "" is no key."""
        self.pool = self.pool or ThreadPoolExecutor(1, "states")
        if len(self.waiting) == self.MOST:
            self.waiting.popleft().result()
        copied, ready = in_host_memory(states)
        self.waiting.append(self.pool.submit(_put, store, keys, copied, ready))

    def close(self) -> None:
        """Wait until everything is written, and end the thread."""
        while self.waiting:
            self.waiting.popleft().result()
        if self.pool:
            self.pool.shutdown()
            self.pool = None


def _put(store: Store, keys: list[str], states: Tensor, ready: Any) -> None:
    if ready is not None:
        ready.synchronize()
    for key, value in zip(keys, states, strict=True):
        if key and bool(value.isfinite().all()):
            store.put(key, value)


def in_host_memory(x: Tensor) -> tuple[Tensor, Any]:
    """Return a tensor in CPU memory, and the event of CUDA after which its values are there (None: now)."""
    if not x.is_cuda:
        return x.cpu(), None
    copied = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    return copied, torch.cuda.current_stream(x.device).record_event()


def first_adapted_block(model: Any) -> tuple[int, bool]:
    """Return the first block of the ViT with an adapter, and True if only the language model has adapters.

    If no block has an adapter, the first value is the number of blocks.
    """
    sites = {lora.site.module for name in attached.names(model) for lora in attached.adapters(model, name).values()}
    blocks = [int(match[1]) for site in sites if (match := BLOCK.match(site))]
    language_only = bool(sites) and all(site.startswith(LANGUAGE) for site in sites)
    return min(blocks, default=len(model.vision_model.encoder.layers)), language_only
