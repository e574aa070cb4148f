"""Train the tiny bases for question answering and retrieval: `python -m toyworld.task_bases vqa --out assets/tiny-blip-vqa`.

vqa is a BlipForQuestionAnswering, and itm is a BlipForImageTextRetrieval. Both start with the ViT and the text layers of
tiny-blip, as BLIP's own task models start with one pre-trained BLIP. All weights are trained, on images of world A.
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

from lora_blip.cli import report_errors
from lora_blip.models.blip import repair_cross_attention
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.losses import hard_negatives, itc_loss
from toyworld.pretrain import WIDTH, advance, learning_rate, optimizer_of, patch_classes, patch_loss, pixels
from toyworld.questions import pretraining_questions
from toyworld.scenes import KINDS, ROLES, Scene, flat_scene, render_flat

PARENT = Path("assets/tiny-blip")
JOINT = 64  # size of the embeddings of images and texts that are compared
QUESTIONS = 3  # questions about each image in a step
SMOOTHING = 0.1  # label smoothing: a base that is too confident is hard to fine-tune
Batch = tuple[Tensor, Tensor, list[Scene]]  # pixel values, patch classes (images, patches), scenes


class TaskModel:
    """A model that starts with tiny-blip's weights: its loss on a batch, and its accuracy."""

    def __init__(self, model: nn.Module, processor: BlipProcessor) -> None:
        self.model, self.processor = model, processor
        self.tokenizer = processor.tokenizer
        self.details = ""  # another score, which `accuracy` sets

    def rows(self, texts: list[str], first: int) -> tuple[Tensor, Tensor]:
        """Return token ids (texts, tokens), which start with `first` and end with [SEP], and their attention mask."""
        rows = [[first, *self.tokenizer(t, add_special_tokens=False).input_ids, self.tokenizer.sep_token_id] for t in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])

    def loss(self, states: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        raise NotImplementedError

    def accuracy(self, states: Tensor, scenes: list[Scene], rng: random.Random) -> float:
        raise NotImplementedError


class Vqa(TaskModel):
    """Question answering: an encoder of image and question, and a decoder of the answer."""

    kind = BlipForQuestionAnswering

    def __init__(self, model: nn.Module, processor: BlipProcessor) -> None:
        super().__init__(model, processor)
        repair_cross_attention(model.text_decoder)

    def loss(self, states: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:
        pairs = [pair for scene in scenes for pair in rng.choices(pretraining_questions(scene, rng), k=QUESTIONS)]
        ids, mask = self.rows([question for question, _ in pairs], self.tokenizer.cls_token_id)
        text_states = self.model.text_encoder(
            ids, mask, encoder_hidden_states=states.repeat_interleave(QUESTIONS, 0)
        ).last_hidden_state
        answers, answer_mask = self.rows([answer for _, answer in pairs], self.tokenizer.bos_token_id)
        logits = self.model.text_decoder(
            answers, answer_mask, encoder_hidden_states=text_states, encoder_attention_mask=mask
        ).logits
        labels = answers.masked_fill(answer_mask == 0, IGNORE)[:, 1:]
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORE, label_smoothing=SMOOTHING)

    def accuracy(self, states: Tensor, scenes: list[Scene], rng: random.Random) -> float:
        """Return the fraction of questions whose generated answer is exactly right."""
        pairs = [rng.choice(pretraining_questions(scene, rng)) for scene in scenes]
        ids, mask = self.rows([question for question, _ in pairs], self.tokenizer.cls_token_id)
        text_states = self.model.text_encoder(ids, mask, encoder_hidden_states=states).last_hidden_state
        first = torch.full((len(pairs), 1), self.tokenizer.bos_token_id)
        generated = self.model.text_decoder.generate(
            input_ids=first, encoder_hidden_states=text_states, encoder_attention_mask=mask, max_new_tokens=16,
            eos_token_id=self.tokenizer.sep_token_id, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        predictions = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return sum(a.strip() == answer for a, (_, answer) in zip(predictions, pairs, strict=True)) / len(pairs)


class Itm(TaskModel):
    """Retrieval: contrastive (ITC) and matching (ITM) scores of images and texts."""

    kind = BlipForImageTextRetrieval
    temperature = 0.07  # CLIP's first value. It stays fixed here, because fine-tuning learns it

    def features(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the cosine similarities (images, texts)."""
        text = self.model.text_encoder(ids, mask).last_hidden_state[:, 0]
        image = normalize(self.model.vision_proj(states[:, 0]), dim=-1)
        return image @ normalize(self.model.text_proj(text), dim=-1).T

    def matching(self, states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the logits (pairs, 2) of "no match" and "match"."""
        return self.model.itm_head(self.model.text_encoder(ids, mask, encoder_hidden_states=states).last_hidden_state[:, 0])

    def loss(self, states: Tensor, scenes: list[Scene], rng: random.Random) -> Tensor:  # noqa: ARG002
        captions = [scene.caption("shape") for scene in scenes]
        same = torch.tensor([[a == b for b in captions] for a in captions])
        ids, mask = self.rows(captions, self.tokenizer.cls_token_id)
        cosines = self.features(states, ids, mask)
        text, image = hard_negatives(cosines, same, self.temperature)
        pairs = torch.cat([states, states, states[image]])
        logits = self.matching(pairs, torch.cat([ids, ids[text], ids]), torch.cat([mask, mask[text], mask]))
        labels = torch.tensor([1] * len(captions) + [0] * 2 * len(captions))
        return itc_loss(cosines, same, self.temperature).mean() + cross_entropy(logits, labels, label_smoothing=SMOOTHING)

    def accuracy(self, states: Tensor, scenes: list[Scene], rng: random.Random) -> float:  # noqa: ARG002
        """Return R@1 from image to text by ITC, among the captions of the batch. `details` has R@1 by ITM."""
        captions = list(dict.fromkeys(scene.caption("shape") for scene in scenes))
        ids, mask = self.rows(captions, self.tokenizer.cls_token_id)
        best = self.features(states, ids, mask).argmax(1).tolist()
        self.details = f"by ITM {self.matched(states, ids, mask, captions, scenes):.3f}"
        return sum(captions[b] == scene.caption("shape") for b, scene in zip(best, scenes, strict=True)) / len(scenes)

    def matched(self, states: Tensor, ids: Tensor, mask: Tensor, captions: list[str], scenes: list[Scene]) -> float:
        """Return R@1 from image to text by ITM, among all captions."""
        right = 0
        for image_states, scene in zip(states, scenes, strict=True):
            scores = self.matching(image_states.expand(len(ids), -1, -1), ids, mask)[:, 1]
            right += captions[int(scores.argmax())] == scene.caption("shape")
        return right / len(scenes)


TASK_MODELS: dict[str, type[TaskModel]] = {"vqa": Vqa, "itm": Itm}


def from_tiny_blip(kind: type[TaskModel]) -> TaskModel:
    """Return a new model with the weights of tiny-blip's ViT and text layers. Weights that tiny-blip lacks are random."""
    parent = BlipForConditionalGeneration.from_pretrained(PARENT, dtype=torch.float32)
    processor = BlipProcessor.from_pretrained(PARENT)
    config = BlipConfig(**{**parent.config.to_dict(), "image_text_hidden_size": JOINT, "architectures": None})
    model = kind.kind(config)
    weights = {key: value for key, value in parent.state_dict().items() if key.startswith(("vision_model", "text_decoder"))}
    weights |= {key.replace("text_decoder.bert.", "text_encoder."): value for key, value in weights.items()}
    fitting = {key: value for key, value in weights.items() if key in model.state_dict()}
    model.load_state_dict(fitting, strict=False)
    return kind(model, processor)


def picture_batch(task_model: TaskModel, rng: random.Random, size: int) -> Batch:
    scenes = [flat_scene(rng) for _ in range(size)]
    drawn = [render_flat(scene, rng) for scene in scenes]
    classes = patch_classes([np.asarray(c) for _, c in drawn])
    return pixels([np.asarray(p) for p, _ in drawn], task_model.processor), classes, scenes


@torch.no_grad()
def mean_accuracy(task_model: TaskModel, seed: int, count: int) -> float:
    task_model.model.eval()
    rng, shares = random.Random(seed), []
    for _ in range(count // 100):
        values, _, scenes = picture_batch(task_model, rng, 100)
        shares.append(task_model.accuracy(task_model.model.vision_model(values).last_hidden_state, scenes, rng))
    task_model.model.train()
    return sum(shares) / len(shares)


def train(kind: str, out: Path, steps: int, seed: int, batch: int = 32, peak: float = 5e-4) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    task_model = from_tiny_blip(TASK_MODELS[kind])
    task_model.model.train()
    patch_head = nn.Linear(WIDTH, KINDS + ROLES)
    optimizer = optimizer_of(task_model.model, patch_head, peak)
    started = time.time()
    for step in range(steps):
        values, classes, scenes = picture_batch(task_model, rng, batch)
        states = task_model.model.vision_model(values).last_hidden_state  # (images, 1 + patches, width)
        picture_loss = patch_loss(patch_head, states, classes)
        loss = task_model.loss(states, scenes, rng)
        (loss + picture_loss).backward()
        advance(optimizer, learning_rate(step, steps, peak))
        if step % 100 == 0:
            print(f"{step}/{steps} loss {loss:.4f} patch {picture_loss:.4f} {time.time() - started:.0f} s", flush=True)
        if step % 500 == 499:
            print(f"{step + 1}/{steps} accuracy {mean_accuracy(task_model, 999, 200):.3f} {task_model.details}", flush=True)
    save(task_model, out, {"family": kind, "grown_from": "tiny-blip", "steps": steps, "seed": seed, "batch": batch, "lr": peak})


def save(task_model: TaskModel, out: Path, recipe: dict) -> None:
    """Write the fp16 weights, the processor, and the accuracy of the fp16 weights."""
    task_model.model.half().float()
    figures = {"right_on_world_a": mean_accuracy(task_model, 12345, 1000), "pictures": 1000}
    task_model.model.half().save_pretrained(out)
    task_model.processor.save_pretrained(out)
    figures["parameters"] = sum(p.numel() for p in task_model.model.parameters())
    (out / "pretraining.json").write_text(json.dumps({**recipe, **figures}, indent=1) + "\n", encoding="utf-8")
    print(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=tuple(TASK_MODELS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train(arguments.kind, arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    report_errors(main)
