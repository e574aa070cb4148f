"""Attention of BLIP's text models, by the fused kernel. The keys of an image are computed once for all its rows.

transformers' `generate` repeats the states of an image for each beam. It computes keys and values for all beams, and reorders
them after every token. Inside `reading`, a decoder computes keys and values once for each image, and its beams share them.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from lora_blip.kernels.linear import PLAIN_LINEARS, PLAIN_TENSORS, has_other_hooks
from lora_blip.kernels.plain import is_plain, needs_library
from lora_blip.kernels.sdpa import attend

CACHE = ("past_key_values", "cache")  # names of one argument: up to transformers 5.23, and from 5.24 on


class ImageStates:
    """The states of each image for the cross-attention of one layer. Keys and values are computed at the first use."""

    def __init__(self, states: Tensor, mask: Tensor | None) -> None:
        self.states, self.mask = states, mask  # (images, n, width), (images, 1, 1, n) to be added to the scores
        self.pair: tuple[Tensor, Tensor] | None = None  # keys and values, (images, heads, n, d) each

    def repeated(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """Return states and mask for `rows` rows, as transformers expects them. Those of one image are adjacent."""
        count = rows // len(self.states)
        return self.states.repeat_interleave(count, 0), None if self.mask is None else self.mask.repeat_interleave(count, 0)

    def attend_to_image(self, layer: "TextAttention", queries: Tensor) -> Tensor:
        """Return the attention (rows, tokens, width) of queries (rows, tokens, width) to their image.

        The rows of an image are next to each other.
        """
        if self.pair is None:
            k, v = (layer.by_heads(project(self.states)).contiguous() for project in (layer.key, layer.value))
            self.pair = k, v
        by_image = queries.reshape(len(self.states), -1, queries.shape[-1])  # (images, rows of an image · tokens, width)
        return attend(layer.by_heads(by_image), *self.pair, self.mask).transpose(1, 2).reshape(queries.shape)


class ActiveSources(threading.local):
    """The states that each layer reads inside `reading`, by the id of the layer. Each thread has its own."""

    def __init__(self) -> None:
        self.sources: dict[int, ImageStates] = {}


ACTIVE = ActiveSources()


class TextAttention(BlipTextSelfAttention):
    """A fast BlipTextSelfAttention over the same weights. Its second output, the probabilities, is None.

    A call that needs the probabilities, or has an unknown argument, runs transformers' own method.
    """

    WRITTEN_FOR = tuple(
        "(self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, "
        f"{cache}=None, **kwargs)" for cache in CACHE
    )  # fmt: skip

    def forward(  # type: ignore[override]  # `cache` has another name up to transformers 5.23
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return (output, None), the output with the shape of hidden_states (rows, tokens, width).

        A mask (rows, 1, tokens or 1, keys) is added to the scores.
        """
        crosses, source = encoder_hidden_states is not None, ACTIVE.sources.get(id(self))
        if encoder_hidden_states is not None and source is None and not encoder_hidden_states.shape[1]:
            raise RuntimeError(
                "the decoder has no image states, because it was called or recomputed outside its `reading` block or thread; "
                "call the decoder inside the block and in the same thread; with checkpointing, run the backward pass there too"
            )
        uses_dropout = self.training and self.dropout.p  # load_backbone sets the dropout to 0
        if uses_dropout or needs_library(kwargs, CACHE[0]):
            if crosses and source:
                encoder_hidden_states, encoder_attention_mask = source.repeated(len(hidden_states))
            cached = () if cache is None else (cache,)  # by position, because its name depends on the version
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, *cached, **kwargs
            )
        cache = kwargs.get(CACHE[0]) if cache is None else cache
        queries = self.query(hidden_states)
        if crosses and source:
            return source.attend_to_image(self, queries), None
        mask = encoder_attention_mask if crosses else attention_mask
        if encoder_hidden_states is not None and cache is None and self._absorbs(queries, encoder_hidden_states):
            return self._absorbed(self.by_heads(queries), encoder_hidden_states, mask), None
        k, v = self._keys_and_values(hidden_states, encoder_hidden_states, cache)
        return attend(self.by_heads(queries), k, v, mask).transpose(1, 2).flatten(2), None

    def _keys_and_values(self, own: Tensor, encoder: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values (rows, heads, keys, d). Those of earlier tokens and of the encoder come from the cache."""
        states, crosses, both_caches = own if encoder is None else encoder, encoder is not None, cache
        if isinstance(both_caches, EncoderDecoderCache):  # a cache for self-attention, and one for cross-attention
            if crosses and both_caches.is_updated.get(self.layer_idx):
                layer = both_caches.cross_attention_cache.layers[self.layer_idx]
                return layer.keys, layer.values
            cache = both_caches.cross_attention_cache if crosses else both_caches.self_attention_cache
            if crosses:
                both_caches.is_updated[self.layer_idx] = True
        k, v = self.by_heads(self.key(states)), self.by_heads(self.value(states))
        return (k, v) if cache is None else cache.update(k, v, self.layer_idx)

    def _absorbs(self, queries: Tensor, states: Any) -> bool:
        """Return True if `_absorbed` can be used and is faster.

        It is faster for few queries and a small width. It cannot be used if key or value have hooks, such as an adapter's.
        """
        plain = all(
            type(linear) in PLAIN_LINEARS and type(linear.weight) in PLAIN_TENSORS and not has_other_hooks(linear)
            for linear in (self.key, self.value)
        )
        return plain and 4 * queries.shape[1] * self.num_attention_heads <= states.shape[-1] <= 4 * states.shape[1]

    def _absorbed(self, q: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention (rows, tokens, heads · d) without computing keys and values.

        q: (rows, heads, tokens, d). states: (rows, n, width). Scores: q · (Wₖ x + bₖ) = (Wₖᵀ q) · x + c. The constant c
        does not change the softmax. Values: Σ pᵢ (Wᵥ xᵢ + bᵥ) = Wᵥ Σ pᵢ xᵢ + bᵥ. So the few queries are multiplied by the
        weights, instead of all states of the image.
        """
        heads, (rows, _, tokens, d) = self.num_attention_heads, q.shape
        wk, wv = (linear.weight.unflatten(0, (heads, d)) for linear in (self.key, self.value))  # (heads, d, width)
        absorbed = (q * d**-0.5).transpose(0, 1).flatten(1, 2) @ wk  # Wₖᵀ q, (heads, rows · tokens, width)
        scores = absorbed.unflatten(1, (rows, tokens)).transpose(0, 1).flatten(1, 2) @ states.transpose(1, 2)
        if mask is not None:
            lowest = torch.finfo(scores.dtype).min
            scores = (scores.unflatten(1, (heads, tokens)) + mask.clamp(min=lowest).to(scores.dtype)).flatten(1, 2)
        context = scores.softmax(-1).to(states.dtype) @ states  # Σ pᵢ xᵢ, (rows, heads · tokens, width)
        context = context.unflatten(1, (heads, tokens)).transpose(0, 1).flatten(1, 2)  # (heads, rows · tokens, width)
        context = context @ wv.transpose(1, 2)  # (heads, rows · tokens, d)
        context = context.unflatten(1, (rows, tokens)).permute(1, 2, 0, 3).flatten(2)
        return context if self.value.bias is None else context + self.value.bias.to(context.dtype)

    def by_heads(self, states: Tensor) -> Tensor:
        """Return states (rows, tokens, width) as a view (rows, heads, tokens, d)."""
        return states.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)


@contextmanager
def reading(decoder: Any, states: Tensor, mask: Tensor | None = None, rows: int = 1) -> Iterator[dict[str, Tensor]]:
    """Let a BLIP text decoder attend to `states` (images, n, width) inside the block. Yield the arguments for its call.

    mask: (images, n), 1 for states and 0 for padding. rows: the number of rows of the decoder's input for each image, not
    counting the beams of `generate`. The rows of an image are adjacent. The block applies to the current thread only. A
    backward pass that computes activations again must run inside the block.
    """
    layers = [layer.crossattention.self for layer in decoder.bert.encoder.layer]
    fast = all(isinstance(layer, TextAttention) and not (layer.training and layer.dropout.p) for layer in layers)
    if is_plain() or not fast:
        named = {"encoder_hidden_states": states} | ({} if mask is None else {"encoder_attention_mask": mask})
        yield {name: value.repeat_interleave(rows, 0) for name, value in named.items()} if rows > 1 else named
        return
    hidden = None
    if mask is not None and not mask.all():
        hidden = (1 - mask[:, None, None].to(states.dtype)) * torch.finfo(states.dtype).min
    before = ACTIVE.sources
    ACTIVE.sources = before | {id(layer): ImageStates(states, hidden) for layer in layers}
    try:
        yield {"encoder_hidden_states": states[:, :0].repeat_interleave(rows, 0)}  # empty: only marks a cross-attention
    finally:
        ACTIVE.sources = before
