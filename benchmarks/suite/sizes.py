"""Models of real sizes with random weights, in memory or as a folder. Their texts have no meaning, but their cost is real."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    OPTConfig,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from lora_blip.models.library import Quiet
from lora_blip.models.loading import Backbone
from lora_blip.models.precision import DTYPES
from toyworld.vocabulary import blip_tokenizer, opt_tokenizer

Settings = dict[str, Any]
STD = 0.02  # a vision config's own 1e-10 would make denormals, which are slow and not realistic


def _width(hidden: int, layers: int, heads: int, **more: Any) -> Settings:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    } | more


SMALL_TEXT = _width(128, 3, 4, encoder_hidden_size=128, vocab_size=442, max_position_embeddings=512)
# name → settings of the ViT, the Q-Former (only BLIP-2) and the language side; {} is the architecture's own
T5 = {"num_heads": 4, "vocab_size": 1001, "pad_token_id": 1, "eos_token_id": 2, "feed_forward_proj": "gated-gelu"} | {
    "tie_word_embeddings": False,
    "decoder_start_token_id": 1,
}
SIZES: dict[str, tuple[Settings, Settings | None, Settings]] = {
    "mini": (_width(32, 2, 4, image_size=32, patch_size=8), None, SMALL_TEXT | _width(32, 2, 4, encoder_hidden_size=32)),
    "tiny": (_width(128, 4, 4, image_size=96), None, SMALL_TEXT),  # as assets/tiny-blip
    "base": ({}, None, {}),
    "large": (_width(1024, 24, 16), None, {"encoder_hidden_size": 1024}),
    "mini2": (
        _width(32, 2, 4, image_size=32, patch_size=8),
        _width(32, 2, 4, encoder_hidden_size=32),
        {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"vocab_size": 1001},
    ),
    "blip2": (  # the real widths, but 4 layers instead of 39 and 32
        _width(1408, 4, 16, intermediate_size=6144, image_size=224, patch_size=14),
        {"encoder_hidden_size": 1408},
        {"hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240, "num_hidden_layers": 4, "num_attention_heads": 32}
        | {"vocab_size": 50304},
    ),
}
# the same with a Flan-T5, which has a `d_model`
SIZES["mini2-t5"] = (*SIZES["mini2"][:2], T5 | {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2})
SIZES["blip2-t5"] = (
    *SIZES["blip2"][:2],
    T5 | {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 4, "num_heads": 32, "vocab_size": 32128},
)
QUERIES = 32


def backbone(size: str, device: str = "cpu", dtype: str = "fp32", **vision: Any) -> Backbone:
    """Return a frozen model of this size without dropout. `vision` overrides settings of its ViT."""
    torch.manual_seed(0)
    eyes, qformer, text = SIZES[size]
    with torch.device(device):  # a GPU draws large random weights in a moment
        model = _blip(eyes | vision, text) if qformer is None else _blip2(eyes | vision, qformer, text)
    tokenizer = tokenizer_of("blip" if qformer is None else "blip-2")
    side = model.config.vision_config.image_size
    processor = BlipImageProcessorPil(size={"height": side, "width": side})
    model.requires_grad_(False).eval().to(device, DTYPES[dtype])
    return Backbone(model, tokenizer, processor, size, torch.device(device))


@cache
def tokenizer_of(family: str) -> Any:
    """Return the tokenizer of an embedded base. A model's vocabulary may be larger than the tokenizer's."""
    return blip_tokenizer() if family == "blip" else opt_tokenizer()


def _blip(vision: Settings, text: Settings) -> Any:
    tokens = tokenizer_of("blip")
    ends = {"bos_token_id": tokens.bos_token_id, "pad_token_id": tokens.pad_token_id}
    ends |= {"sep_token_id": tokens.sep_token_id, "eos_token_id": tokens.sep_token_id}
    quiet: Settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BlipConfig(
        vision_config=BlipVisionConfig(**{"initializer_range": STD, **vision}),
        text_config=BlipTextConfig(**text, **ends, **quiet),
    )
    return BlipForConditionalGeneration(config)


def _blip2(vision: Settings, qformer: Settings, text: Settings) -> Any:
    quiet: Settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**{"initializer_range": STD, **vision}),
        qformer_config=Blip2QFormerConfig(**qformer, **quiet),
        text_config=T5Config(**text, dropout_rate=0.0) if "d_model" in text else OPTConfig(**text, dropout=0.0),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer_of("blip-2").convert_tokens_to_ids("<image>"),
    )
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_(std=0.5)  # with zeros, all queries would be equal
    return model


def copy_of(backbone: Backbone) -> Backbone:
    """Return a copy of the weights, because each contestant changes its model."""
    return replace(backbone, model=deepcopy(backbone.model))


def in_dtype(backbone: Backbone, dtype: str) -> Backbone:
    backbone.model.to(DTYPES[dtype])
    return backbone


def save(backbone: Backbone, folder: Path) -> Path:
    """Write a checkpoint folder for `load_backbone` and `train`, and return it."""
    folder.mkdir(parents=True)
    with Quiet(str(folder)):
        for part in (backbone.model, backbone.tokenizer, backbone.image_processor):
            part.save_pretrained(folder)
    return folder
