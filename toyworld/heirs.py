"""Bases for other tasks, grown from tiny-blip on world A: `python -m toyworld.heirs vqa --out assets/tiny-blip-vqa`.

vqa is a BlipForQuestionAnswering, itm a BlipForImageTextRetrieval. Both take their ViT and their text
layers from tiny-blip, as BLIP's own task models grow from one pre-trained BLIP, and train whole.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
)

from lora_blip.models.blip import repair_cross_attention
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.losses import hard_negatives, itc_loss
from toyworld.pretrain import WIDTH, advance, learning_rate, optimizer_of, patch_classes, patch_loss, pixels
from toyworld.questions import asked
from toyworld.scenes import KINDS, ROLES, Scene, flat_scene, render_flat

PARENT = Path("assets/tiny-blip")
JOINT = 64  # width of the space that images and texts share
ASKED = 3  # questions of each picture in a step
SMOOTHING = 0.1  # a base too sure of itself is hard to bend
Batch = tuple[Tensor, Tensor, list[Scene]]  # pixel values, patch classes (images, patches), scenes


class Heir:
    """A model that grows from tiny-blip: its loss on a batch, and how right it is."""

    def __init__(self, model: nn.Module, processor: BlipProcessor) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.also = ""  # what else `right` found

    def rows(self, texts: list[str], first: int) -> tuple[Tensor, Tensor]:
        """Ids (rows, tokens) between `first` and [SEP], and their mask."""
        rows = [[first, *self.tokenizer(t, add_special_tokens=False).input_ids, self.tokenizer.sep_token_id] for t in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def loss(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        raise NotImplementedError

    def right(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> float:
        raise NotImplementedError


class Vqa(Heir):
    kind = BlipForQuestionAnswering

    def __init__(self, model: nn.Module, processor: BlipProcessor) -> None:
        super().__init__(model, processor)
        repair_cross_attention(model.text_decoder)

    def loss(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        pairs = [pair for scene in scenes for pair in rng.choices(asked(scene, rng), k=ASKED)]
        ids, mask = self.rows([question for question, _ in pairs], self.tokenizer.cls_token_id)
        read = self.model.text_encoder(ids, mask, encoder_hidden_states=seen.repeat_interleave(ASKED, 0)).last_hidden_state
        answers, answer_mask = self.rows([answer for _, answer in pairs], self.tokenizer.bos_token_id)
        logits = self.model.text_decoder(answers, answer_mask, encoder_hidden_states=read, encoder_attention_mask=mask).logits
        labels = answers.masked_fill(answer_mask == 0, IGNORE)[:, 1:]
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE, label_smoothing=SMOOTHING)

    def right(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> float:
        """Share of questions answered to the letter."""
        pairs = [rng.choice(asked(scene, rng)) for scene in scenes]
        ids, mask = self.rows([question for question, _ in pairs], self.tokenizer.cls_token_id)
        read = self.model.text_encoder(ids, mask, encoder_hidden_states=seen).last_hidden_state
        first = torch.full((len(pairs), 1), self.tokenizer.bos_token_id)
        made = self.model.text_decoder.generate(
            input_ids=first, encoder_hidden_states=read, encoder_attention_mask=mask, max_new_tokens=16,
            eos_token_id=self.tokenizer.sep_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        said = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return sum(a.strip() == answer for a, (_, answer) in zip(said, pairs, strict=True)) / len(pairs)


class Itm(Heir):
    kind = BlipForImageTextRetrieval
    temperature = 0.07  # CLIP's start; kept, since the task learns its own

    def features(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Cosines (images, texts)."""
        text = self.model.text_encoder(ids, mask).last_hidden_state[:, 0]
        image = normalize(self.model.vision_proj(seen[:, 0]), dim=-1)
        return image @ normalize(self.model.text_proj(text), dim=-1).T

    def matching(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits (rows, 2): no match, match."""
        return self.model.itm_head(self.model.text_encoder(ids, mask, encoder_hidden_states=seen).last_hidden_state[:, 0])

    def loss(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:  # noqa: ARG002
        captions = [scene.caption("shape") for scene in scenes]
        same = torch.tensor([[a == b for b in captions] for a in captions])
        ids, mask = self.rows(captions, self.tokenizer.cls_token_id)
        cosines = self.features(seen, ids, mask)
        text, image = hard_negatives(cosines, same, self.temperature)
        pairs = torch.cat([seen, seen, seen[image]])
        logits = self.matching(pairs, torch.cat([ids, ids[text], ids]), torch.cat([mask, mask[text], mask]))
        labels = torch.tensor([1] * len(captions) + [0] * 2 * len(captions))
        return itc_loss(cosines, same, self.temperature).mean() + cross_entropy(logits, labels, label_smoothing=SMOOTHING)

    def right(self, seen: Tensor, scenes: list[Scene], rng: random.Random) -> float:  # noqa: ARG002
        """R@1 image to text by ITC among the captions of the batch."""
        captions = list(dict.fromkeys(scene.caption("shape") for scene in scenes))
        ids, mask = self.rows(captions, self.tokenizer.cls_token_id)
        best = self.features(seen, ids, mask).argmax(1).tolist()
        self.also = f"by ITM {self.matched(seen, ids, mask, captions, scenes):.3f}"
        return sum(captions[b] == scene.caption("shape") for b, scene in zip(best, scenes, strict=True)) / len(scenes)

    def matched(self, seen: Tensor, ids: Tensor, mask: Tensor, captions: list[str], scenes: list[Scene]) -> float:
        """R@1 by ITM over every caption."""
        right = 0
        for states, scene in zip(seen, scenes, strict=True):
            scores = self.matching(states.expand(len(ids), -1, -1), ids, mask)[:, 1]
            right += captions[int(scores.argmax())] == scene.caption("shape")
        return right / len(scenes)


HEIRS: dict[str, type[Heir]] = {"vqa": Vqa, "itm": Itm}


def grow(kind: type[Heir]) -> Heir:
    """A fresh model with tiny-blip's ViT and text layers wherever names and shapes agree; the rest is new."""
    parent = BlipForConditionalGeneration.from_pretrained(PARENT, dtype=torch.float32)
    processor = BlipProcessor.from_pretrained(PARENT)
    config = BlipConfig(**{**parent.config.to_dict(), "image_text_hidden_size": JOINT, "architectures": None})
    model = kind.kind(config)
    weights = {key: value for key, value in parent.state_dict().items() if key.startswith(("vision_model", "text_decoder"))}
    weights |= {key.replace("text_decoder.bert.", "text_encoder."): value for key, value in weights.items()}
    fitting = {key: value for key, value in weights.items() if key in model.state_dict()}
    model.load_state_dict(fitting, strict=False)
    return kind(model, processor)


def picture_batch(heir: Heir, rng: random.Random, size: int) -> Batch:
    scenes = [flat_scene(rng) for _ in range(size)]
    drawn = [render_flat(scene, rng) for scene in scenes]
    classes = patch_classes([np.asarray(c) for _, c in drawn])
    return pixels([np.asarray(p) for p, _ in drawn], heir.processor), classes, scenes


@torch.no_grad()
def share_right(heir: Heir, seed: int, count: int) -> float:
    heir.model.eval()
    rng, shares = random.Random(seed), []
    for _ in range(count // 100):
        values, _, scenes = picture_batch(heir, rng, 100)
        shares.append(heir.right(heir.model.vision_model(values).last_hidden_state, scenes, rng))
    heir.model.train()
    return sum(shares) / len(shares)


def train(kind: str, out: Path, steps: int, seed: int, batch: int = 32, peak: float = 5e-4) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    heir = grow(HEIRS[kind])
    heir.model.train()
    patch_head = nn.Linear(WIDTH, KINDS + ROLES)
    optimizer = optimizer_of(heir.model, patch_head, peak)
    started = time.time()
    for step in range(steps):
        values, classes, scenes = picture_batch(heir, rng, batch)
        seen = heir.model.vision_model(values).last_hidden_state  # (images, 1 + patches, width)
        picture_loss = patch_loss(patch_head, seen, classes)
        loss = heir.loss(seen, scenes, rng)
        (loss + picture_loss).backward()
        advance(optimizer, learning_rate(step, steps, peak))
        if step % 100 == 0:
            print(f"{step}/{steps} loss {loss:.4f} patch {picture_loss:.4f} {time.time() - started:.0f} s", flush=True)
        if step % 500 == 499:
            print(f"{step + 1}/{steps} right {share_right(heir, 999, 200):.3f} {heir.also}", flush=True)
    save(heir, out, {"family": kind, "grown_from": "tiny-blip", "steps": steps, "seed": seed, "batch": batch, "lr": peak})


def save(heir: Heir, out: Path, recipe: dict) -> None:
    """fp16 weights, processor and the measured figures; the figures are of the fp16 weights."""
    heir.model.half().float()
    figures = {"right_on_world_a": share_right(heir, 12345, 1000), "pictures": 1000}
    heir.model.half().save_pretrained(out)
    heir.processor.save_pretrained(out)
    figures["parameters"] = sum(p.numel() for p in heir.model.parameters())
    (out / "pretraining.json").write_text(json.dumps({**recipe, **figures}, indent=1) + "\n")
    print(figures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=tuple(HEIRS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.kind, arguments.out, arguments.steps, arguments.seed)
