"""Compute the probability of each token of a text, and its attention over the image.

The text is given, and the model reads it (teacher forcing) with the plain computation of transformers. The attention at the
position that predicts a token belongs to that token. Means over heads are written as Ā.

    BLIP, captions     C[l] = Ā(decoder, cross, layer l)                       tokens × image states
    BLIP, questions    C[l] = Ā(decoder, cross, layer l) · Ē                   Ē: question tokens × image states
    BLIP-2             C[l] = normalize(Ā(language model, layer l)[:, queries]) · Ē    Ē: query tokens × image states

Ē is the mean over layers and heads of the cross-attention of the question encoder, or of the Q-Former. The language model of
BLIP-2 attends to the query tokens and to words: `normalize` divides by the part on the query tokens, which is `share`. For OPT
it is the self-attention, and for T5 the cross-attention of the decoder. The product ignores that the states of BLIP's question
encoder, the Q-Former and T5's encoder are mixed by self-attention. So it is an approximation for these models, and exact for
BLIP's captions. Image state 0 is the class token of the ViT, the others are its patches, row by row.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lora_blip.errors import ModelError
from lora_blip.kernels.plain import plain
from lora_blip.models.blip import BlipLanguage, BlipVqaLanguage
from lora_blip.models.blip2 import OptLanguage, T5Language
from lora_blip.models.language import Language
from lora_blip.models.token_rows import IGNORE

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # the end of a decoded text whose last character is not complete
TOLERANCE = 0.02  # of the sum of a row of attention; bf16 rounds each of its probabilities


@dataclass(frozen=True)
class TokenMaps:
    """The tokens of a text and the end token, with their probabilities and attention."""

    ids: list[int]
    probabilities: Tensor  # (tokens,) p(token | image, prompt, tokens before it)
    attention: Tensor  # (layers, tokens, image states), the mean over the heads; each row sums to 1
    share: Tensor  # (layers, tokens) the part of the attention that is on the image; 1 if the decoder attends only to the image


@torch.no_grad()
def token_maps(language: Language[Any], pixel_values: Tensor, prompt: str, text: str) -> TokenMaps:
    """Return the maps of a text after a prompt, for one image: pixel_values (1, 3, H, W).

    The tokens are those of `language.tokenize`. A generated text may consist of other tokens that decode to the same text.
    Raise ModelError if a layer returns no attention probabilities.
    """
    rows = language.tokenize([prompt], [text]).pad().to(pixel_values.device)
    text_layers, image_layers = layers_of(language)
    with plain(), eager(language.model), recorded(text_layers) as of_text, recorded(image_layers) as of_image:
        logits = language.logits(language.encode_images(pixel_values), rows)[0]
    labelled = rows.targets[0] != IGNORE
    ids = rows.targets[0][labelled]
    exact = torch.promote_types(logits.dtype, torch.float32)
    probabilities = logits[labelled].to(exact).softmax(-1).gather(-1, ids[:, None])[:, 0]
    attention = torch.stack([mean_over_heads(probs)[labelled] for probs in of_text])  # (layers, tokens, keys)
    share = torch.ones_like(attention[..., 0])
    if isinstance(language, OptLanguage | T5Language):
        on_queries = attention[..., rows.input_ids[0] == language.image_ids[0]]
        share = on_queries.sum(-1)
        attention = on_queries / share[..., None].clamp_min(torch.finfo(share.dtype).tiny)
    if image_layers:
        attention = attention @ torch.stack([mean_over_heads(probs) for probs in of_image]).mean(0)
    return TokenMaps(ids.tolist(), probabilities, attention, share)


def layers_of(language: Language[Any]) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return the attentions of the text, one per layer, and those between the text's keys and the image; none for captions."""
    model: Any = language.model
    if isinstance(language, BlipLanguage):
        encoder = model.text_encoder.encoder.layer if isinstance(language, BlipVqaLanguage) else []
        text = [layer.crossattention.self for layer in model.text_decoder.bert.encoder.layer]
        return text, [layer.crossattention.self for layer in encoder]
    queries = [layer.crossattention.attention for layer in model.qformer.encoder.layer if layer.has_cross_attention]
    if isinstance(language, OptLanguage):
        return [layer.self_attn for layer in model.language_model.model.decoder.layers], queries
    return [block.layer[1].EncDecAttention for block in model.language_model.get_decoder().block], queries


def mean_over_heads(probabilities: Tensor) -> Tensor:
    """Return the mean over the heads of attention probabilities (1, heads, queries, keys), at least float32."""
    mean = probabilities[0].to(torch.promote_types(probabilities.dtype, torch.float32)).mean(0)
    return mean / mean.sum(-1, keepdim=True)  # 1 up to the rounding of 16 bits


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that receives the attention probabilities of each module's call. transformers returns them last."""
    probabilities: list[Tensor] = []

    def record(module: nn.Module, _args: Any, output: Any) -> None:
        last = output[-1]
        if not isinstance(last, Tensor) or last.dim() != 4 or not (last.float().sum(-1) - 1).abs().max() <= TOLERANCE:
            raise ModelError(
                f"{type(module).__name__} returns no attention probabilities; install a version that lora_blip is tested "
                "with: pip install 'transformers>=5.20,<5.25'"
            )
        probabilities.append(last)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(record).remove)
        yield probabilities


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Make transformers compute attention probabilities inside the block. Other implementations do not return them."""
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "config")]
    configs = list({id(module.config): module.config for module in owners}.values())
    before: list[tuple[Any, Any]] = [(config, config._attn_implementation) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def word_of_tokens(language: Language[Any], ids: list[int], words: list[str]) -> list[int]:
    """Return the index of the word to which each token belongs: the word that contains the first character of the token.

    Characters are counted without spaces, because a tokenizer may decode "don't" as "don ' t". A token without a character of
    its own, such as a space of T5, belongs to the next word. A character of several tokens belongs to the first of them.
    """
    ends = list(accumulate(map(len, words)))
    prefixes = [
        language.texts_of(torch.tensor([ids[:count]]))[0].rstrip(INCOMPLETE) if count else "" for count in range(len(ids))
    ]
    starts = [len("".join(prefix.split())) for prefix in prefixes]
    return [min(bisect_right(ends, start), len(words) - 1) for start in starts]
