"""Save tiny random models of each kind, with real tokenizers, as checkpoints that the tests load."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipTextConfig,
    BlipVisionConfig,
    OPTConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from toyworld.vocabulary import blip_tokenizer, opt_tokenizer

WIDTH, LAYERS, HEADS, SIDE, PATCH, QUERIES, JOINT = 32, 2, 4, 32, 8, 4, 16
STD = 0.1  # large enough that every part of the model matters in its logits


def save_blip(folder: Path, kind: type[PreTrainedModel] = BlipForConditionalGeneration) -> None:
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
    config = BlipConfig(text_config=text, vision_config=vision, initializer_range=STD, image_text_hidden_size=JOINT)
    save(kind(config), tokenizer, folder)


def save_vqa(folder: Path) -> None:
    """A BlipForQuestionAnswering: an encoder reads the question, a decoder writes the answer."""
    save_blip(folder, BlipForQuestionAnswering)


def save_itm(folder: Path) -> None:
    """A BlipForImageTextRetrieval."""
    save_blip(folder, BlipForImageTextRetrieval)


def save_blip2(folder: Path, language: str) -> None:
    torch.manual_seed(2)
    tokenizer = opt_tokenizer(size=600)
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
        vision_config=blip2_vision(), qformer_config=qformer(), text_config=opt if language == "opt" else t5,
        num_query_tokens=QUERIES, image_token_index=tokenizer.convert_tokens_to_ids("<image>"), initializer_range=STD,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_(std=0.5)
    save(model, tokenizer, folder)


def save_itm2(folder: Path, image_token_index: int | None = None) -> None:
    """A Blip2ForImageTextRetrieval, whose Q-Former reads word pieces; it has no language model."""
    torch.manual_seed(3)
    tokenizer = blip_tokenizer()
    unused = OPTConfig(vocab_size=8, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1)
    reading: dict[str, Any] = {"vocab_size": len(tokenizer), "use_qformer_text_input": True}
    config = Blip2Config(
        vision_config=blip2_vision(), qformer_config=qformer(**reading), text_config=unused, num_query_tokens=QUERIES,
        image_text_hidden_size=JOINT, image_token_index=image_token_index, initializer_range=STD,
    )  # fmt: skip
    model = Blip2ForImageTextRetrieval(config)
    model.query_tokens.data.normal_(std=0.5)
    save(model, tokenizer, folder)


def blip2_vision() -> Blip2VisionConfig:
    return Blip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=SIDE, patch_size=PATCH, initializer_range=STD,
    )  # fmt: skip


def qformer(vocab_size: int = 8, **more: Any) -> Blip2QFormerConfig:
    return Blip2QFormerConfig(
        vocab_size=vocab_size, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, encoder_hidden_size=WIDTH, initializer_range=STD, max_position_embeddings=64, **more,
    )  # fmt: skip


def save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    """Save the model, the tokenizer and the image processor in a folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)


def image_processor() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220), "white": (240, 240, 240)}


def write_photos(folder: Path, count: int = 12, texts: list[str] | None = None) -> Path:
    """Write `count` plain pictures and their annotations.jsonl, with captions of different lengths. Return its path."""
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
