"""Tiny random models of each kind, with real tokenizers, saved as a checkpoint is: what the tests load."""

import json
from pathlib import Path

import torch
from PIL import Image
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

from toyworld.vocabulary import blip_tokenizer, opt_tokenizer

WIDTH, LAYERS, HEADS, SIDE, PATCH, QUERIES = 32, 2, 4, 32, 8, 4
STD = 0.1  # large enough that every part of the model matters in its logits


def save_blip(folder: Path) -> None:
    torch.manual_seed(1)
    tokenizer = blip_tokenizer()
    vision = BlipVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, initializer_range=STD,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, encoder_hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=64, initializer_range=STD,
        bos_token_id=tokenizer.bos_token_id, sep_token_id=tokenizer.sep_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.sep_token_id, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, initializer_range=STD)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def save_blip2(folder: Path, language: str) -> None:
    torch.manual_seed(2)
    tokenizer = opt_tokenizer(size=600)
    vision = Blip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, initializer_range=STD,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        encoder_hidden_size=WIDTH, initializer_range=STD, max_position_embeddings=64,
    )  # fmt: skip
    opt = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=2 * WIDTH,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, max_position_embeddings=64, init_std=STD,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=WIDTH // HEADS, d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS,
        feed_forward_proj="gated-gelu", pad_token_id=1, eos_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=opt if language == "opt" else t5,
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), initializer_range=STD,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_(std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "white": (240, 240, 240)}


def write_photos(folder: Path, count: int = 12, texts: list[str] | None = None) -> Path:
    """`count` plain pictures and their annotations.jsonl; captions of uneven length."""
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (40, 30 + number), COLOURS[name]).save(folder / "photos" / f"{number}.png")
        text = texts[number] if texts else f"a {name} picture" + " on a table" * (number % 3)
        lines.append(json.dumps({"image": f"photos/{number}.png", "text": text}))
    path = folder / "annotations.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
