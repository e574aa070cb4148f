"""Pre-train an embedded base on world A, from random weights: `python -m toyworld.pretrain blip --out assets/tiny-blip`.

All weights are trained, without LoRA. Most steps use images with captions; 15 % of the steps use sentences without images. So
the language model has read many words that no image shows, such as "cube".
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    OPTConfig,
    PreTrainedModel,
)

from lora_blip.cli import report_errors
from toyworld.scenes import KINDS, ROLES, SIZE, flat_scene, render_flat
from toyworld.vocabulary import blip_tokenizer, image_processor, opt_tokenizer
from toyworld.words import sentence

WIDTH, HEADS, PATCH, QUERIES = 128, 4, 16, 8
INIT_STD = 0.06  # standard deviation of the first weights; with 0.02 the model did not learn in this number of steps
POSITION_SCALE, PATCH_STD = 0.5, 0.02  # so that the position of a patch is as visible to the model as its colour
TEXT_ONLY = 0.15  # share of the steps without images
EASY_STEPS = 800  # first steps, in which most images show a single thing
IGNORE = -100


def build_blip() -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    tokenizer = blip_tokenizer()
    vision = BlipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=HEADS,
        image_size=SIZE, patch_size=PATCH, initializer_range=INIT_STD,
    )  # fmt: skip
    text = BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, encoder_hidden_size=WIDTH, intermediate_size=4 * WIDTH,
        num_hidden_layers=3, num_attention_heads=HEADS, max_position_embeddings=64, initializer_range=INIT_STD,
        bos_token_id=tokenizer.bos_token_id, sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, initializer_range=INIT_STD)
    return BlipForConditionalGeneration(config), BlipProcessor(image_processor(), tokenizer)


def build_blip2() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    tokenizer = opt_tokenizer()
    processor = Blip2Processor(image_processor(), tokenizer, num_query_tokens=QUERIES)
    vision = Blip2VisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4, num_attention_heads=HEADS,
        image_size=SIZE, patch_size=PATCH, initializer_range=INIT_STD,
    )  # fmt: skip
    qformer = Blip2QFormerConfig(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=HEADS,
        encoder_hidden_size=WIDTH, cross_attention_frequency=1, initializer_range=INIT_STD,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=64,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH,
        num_hidden_layers=3, num_attention_heads=HEADS, max_position_embeddings=96, init_std=INIT_STD, dropout=0.0,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), initializer_range=INIT_STD,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    model.query_tokens.data.normal_(std=0.5)  # with zeros, all queries would always stay equal
    return model, processor


def pixels(pictures: list[np.ndarray], processor: BlipProcessor | Blip2Processor) -> Tensor:
    """Return the pixel values (images, 3, H, W) of images (H, W, 3) uint8 that have the model's size."""
    values = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(processor.image_processor.image_mean).view(1, 3, 1, 1)
    std = torch.tensor(processor.image_processor.image_std).view(1, 3, 1, 1)
    return (values - mean) / std


def patch_classes(maps: list[np.ndarray]) -> Tensor:
    """Return the class of each patch, (images, patches), from maps (H, W): that of a thing on over a quarter of it, or 0."""
    grid = SIZE // PATCH
    tiles = np.stack(maps).reshape(-1, grid, PATCH, grid, PATCH).swapaxes(2, 3).reshape(-1, PATCH * PATCH)
    classes = np.zeros(len(tiles), dtype=np.int64)
    for row in np.flatnonzero(tiles.any(1)):
        counts = np.bincount(tiles[row], minlength=1)
        counts[0] = PATCH * PATCH // 4
        classes[row] = counts.argmax()
    return torch.from_numpy(classes).view(len(maps), grid * grid)


def grid_positions(width: int, grid: int) -> Tensor:
    """Return position embeddings (1 + patches, width): sines and cosines of row and column, and zeros for the class token.

    Learned position embeddings become similar to these (Dosovitskiy et al. 2021, arXiv:2010.11929).
    """
    rates = 1.0 / 30 ** torch.linspace(0, 1, width // 4)
    steps = torch.arange(grid)[:, None] * rates  # (grid, width / 4)
    waves = torch.cat([steps.sin(), steps.cos()], dim=1)
    rows, columns = waves.repeat_interleave(grid, 0), waves.repeat(grid, 1)
    return torch.cat([torch.zeros(1, width), torch.cat([rows, columns], dim=1)])


def picture_batch(rng: random.Random, size: int, easy: bool) -> tuple[list[np.ndarray], Tensor, list[str]]:
    scenes = [flat_scene(rng, share_single=0.8 if easy else 0.3) for _ in range(size)]
    drawn = [render_flat(scene, rng) for scene in scenes]
    classes = patch_classes([np.asarray(classes) for _, classes in drawn])
    return [np.asarray(picture) for picture, _ in drawn], classes, [scene.caption("shape") for scene in scenes]


def token_rows(texts: list[str], processor: BlipProcessor | Blip2Processor) -> tuple[Tensor, Tensor]:
    """Return token ids (texts, tokens), from the BOS token to the end token, and their attention mask."""
    tokenizer = processor.tokenizer
    blip = isinstance(processor, BlipProcessor)
    first, last = tokenizer.bos_token_id, tokenizer.sep_token_id if blip else tokenizer.eos_token_id
    rows = [[first, *tokenizer(text, add_special_tokens=False).input_ids, last] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def next_token_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy of each token given the tokens before it, without padding."""
    labels = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE)


def language_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, states: Tensor | None) -> Tensor:
    """Return logits (texts, tokens, vocabulary) of BLIP or BLIP-2. `states` are the ViT's; None: without an image."""
    if isinstance(model, BlipForConditionalGeneration):
        return model.text_decoder(input_ids=ids, attention_mask=mask, encoder_hidden_states=states).logits
    embeds = model.get_input_embeddings()(ids)
    positions = torch.arange(ids.shape[1]) + QUERIES  # as if the queries of an image were before the text
    if states is not None:
        queries = model.query_tokens.expand(len(ids), -1, -1)
        prefix = model.language_projection(model.qformer(query_embeds=queries, encoder_hidden_states=states)[0])
        embeds = torch.cat([prefix, embeds], dim=1)
        mask = torch.cat([mask.new_ones(len(ids), QUERIES), mask], dim=1)
        positions = torch.arange(embeds.shape[1])
    output = model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions[None])
    return output.logits[:, -ids.shape[1] :]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up over the first 3 % of the steps, then a cosine down to 1 % of the peak."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


@torch.no_grad()
def exact_match(model: PreTrainedModel, processor: BlipProcessor | Blip2Processor, seed: int, count: int) -> float:
    """Return the fraction of new images of world A whose greedy caption is exactly right."""
    model.eval()
    rng, right = random.Random(seed), 0
    for _ in range(count // 50):
        pictures, _, captions = picture_batch(rng, 50, easy=False)
        ids = model.generate(pixel_values=pixels(pictures, processor), max_new_tokens=20, num_beams=1)
        predictions = processor.batch_decode(ids, skip_special_tokens=True)
        right += sum(a.strip() == b for a, b in zip(predictions, captions, strict=True))
    model.train()
    return right / (count // 50 * 50)


def losses(model: PreTrainedModel, processor: BlipProcessor | Blip2Processor, patch_head: nn.Linear, seed: int,
           steps: int, batch: int) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:  # fmt: skip
    """Yield a function for each step. It returns the caption loss and the patch loss, which is 0 without images."""
    rng = random.Random(seed)
    for step in range(steps):
        if rng.random() < TEXT_ONLY:
            ids, mask = token_rows([sentence(rng) for _ in range(batch)], processor)
            yield lambda i=ids, m=mask: (next_token_loss(language_logits(model, i, m, None), i, m), torch.zeros(()))
            continue
        pictures, classes, captions = picture_batch(rng, batch, easy=step < EASY_STEPS)
        ids, mask = token_rows(captions, processor)

        def with_images(p=pictures, c=classes, i=ids, m=mask) -> tuple[Tensor, Tensor]:
            states = model.vision_model(pixels(p, processor)).last_hidden_state  # (images, 1 + patches, width)
            return next_token_loss(language_logits(model, i, m, states), i, m), patch_loss(patch_head, states, c)

        yield with_images


def patch_loss(patch_head: nn.Linear, states: Tensor, classes: Tensor) -> Tensor:
    """Return the loss of predicting what each patch shows, and its role in the caption.

    states: (images, 1 + patches, width). classes: (images, patches).
    """
    kind, role = patch_head(states[:, 1:]).flatten(0, 1).split([KINDS, ROLES], dim=1)
    return cross_entropy(kind, classes.flatten() // ROLES) + cross_entropy(role, classes.flatten() % ROLES)


def optimizer_of(model: nn.Module, patch_head: nn.Linear, peak: float) -> torch.optim.Optimizer:
    parameters = [*model.parameters(), *patch_head.parameters()]
    return torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)


def advance(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Clip the gradients to norm 1, and make an optimizer step with this learning rate."""
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], 1.0)  # there is one group
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def pretrain(family: str, out: Path, steps: int, seed: int, batch: int = 32, peak: float = 1e-3) -> None:
    torch.manual_seed(seed)
    model, processor = {"blip": build_blip, "blip2": build_blip2}[family]()
    model.train()
    embeddings = model.vision_model.embeddings
    embeddings.position_embedding.data.copy_(POSITION_SCALE * grid_positions(WIDTH, SIZE // PATCH))
    embeddings.patch_embedding.weight.data.normal_(std=PATCH_STD)
    patch_head = nn.Linear(WIDTH, KINDS + ROLES)
    optimizer = optimizer_of(model, patch_head, peak)
    started = time.time()
    for step, loss_of in enumerate(losses(model, processor, patch_head, seed, steps, batch)):
        caption_loss, picture_loss = loss_of()
        (caption_loss + picture_loss).backward()
        advance(optimizer, learning_rate(step, steps, peak))
        if step % 100 == 0:
            print(f"{step}/{steps} loss {caption_loss:.4f} patch {picture_loss:.4f} {time.time() - started:.0f} s", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            print(f"{step + 1}/{steps} exact match {exact_match(model, processor, 999, 200):.3f}", flush=True)
    save(model, processor, out, {"family": family, "steps": steps, "seed": seed, "batch": batch, "lr": peak})


def save(model: PreTrainedModel, processor: BlipProcessor | Blip2Processor, out: Path, recipe: dict) -> None:
    """Write the fp16 weights, the processor, and the exact match of the fp16 weights."""
    model.half().float()
    figures = {"exact_match_world_a": exact_match(model, processor, 12345, 1000), "pictures": 1000}
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    (out / "pretraining.json").write_text(json.dumps({**recipe, **figures}, indent=1) + "\n", encoding="utf-8")
    print(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=("blip", "blip2"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="with 1, a run gives the same bits again on one machine")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(arguments.family, arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    report_errors(main)
