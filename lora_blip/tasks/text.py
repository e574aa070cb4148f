"""What captioning and question answering share: a prompt is read, a text is the answer, and only the text is learned."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lora_blip.config import ConfigError
from lora_blip.data.annotations import Example
from lora_blip.data.batches import Stack
from lora_blip.models import Backbone
from lora_blip.tasks.losses import IGNORE, token_loss
from lora_blip.tasks.sequences import Rows, language_of, plain_ids
from lora_blip.tasks.task import Batch, Generation, Task

CHUNK = 64  # rows of one image's texts that are ranked at a time


class TextTask(Task):
    """The prompt stands before every text and is never in the loss."""

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.language = language_of(backbone)
        tokenizer, config = backbone.tokenizer, backbone.model.config
        special = {*tokenizer.all_special_ids, getattr(config, "image_token_index", None)}
        self.special_ids = special - {tokenizer.unk_token_id, None}

    def prompt_of(self, example: Example) -> str:
        """What the model reads before it writes."""
        raise NotImplementedError

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        """What it may write, with the weight of each; the weights sum to 1."""
        raise NotImplementedError

    # ---- training

    def batch(self, stack: Stack) -> Batch:
        device = self.backbone.device
        triples = [(i, e, text) for i, e in enumerate(stack.examples) for text in self.texts_of(e)]
        rows = self.language.rows([self.prompt_of(e) for _, e, _ in triples], [text for _, _, (text, _) in triples])
        rows = rows.about([i for i, _, _ in triples], [weight for _, _, (_, weight) in triples])
        return Batch(stack.examples, stack.pixel_values.to(device, non_blocking=True), rows.to(device), rows.label_tokens)

    def logits(self, batch: Batch) -> Tensor:
        """(rows, tokens, vocabulary)."""
        seen, rows = self.language.see(batch.pixel_values), batch.rows
        return self.language.logits(seen if rows.image is None else seen[rows.image], rows)

    def loss(self, batch: Batch) -> Tensor:
        """Σ weight × cross-entropy over the label tokens."""
        return token_loss(self.logits(batch), batch.rows.targets, batch.rows.weights)

    # ---- prediction

    @torch.no_grad()
    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[str]:
        prompts = [self.prompt_of(example) for example in examples]
        return self.language.generate(pixel_values, prompts, adapters, **asdict(self.generation))

    @torch.no_grad()
    def rank(self, pixel_values: Tensor, examples: list[Example], texts: list[str]) -> Tensor:
        """softmax over the texts of their log-likelihoods; see `likelihood` of each task."""
        seen, device = self.language.see(pixel_values), self.backbone.device
        found = []
        for states, example in zip(seen, examples, strict=True):
            prompt, scores = self.prompt_of(example), []
            for start in range(0, len(texts), CHUNK):
                part = texts[start : start + CHUNK]
                rows = self.language.rows([prompt] * len(part), part).to(device)
                logits = self.language.logits(states.expand(len(part), *states.shape), rows)
                scores.append(self.likelihood(token_log_likelihoods(logits, rows.targets)))
            found.append(torch.cat(scores))
        return torch.stack(found).softmax(1)

    def likelihood(self, tokens: Tensor) -> Tensor:
        """Per-token log-likelihoods (rows, tokens), NaN where nothing counts → one score a text."""
        raise NotImplementedError

    # ---- checks

    def require_room(self, prompt: str) -> None:
        """ConfigError if `prompt` holds a special token, or leaves too few positions."""
        if reason := self.special(prompt, plain_ids(self.backbone.tokenizer, prompt)):
            raise ConfigError(f"prompt = {prompt!r}: {reason}")
        room, wanted = self.language.room(prompt), self.generation.max_new_tokens
        if room < wanted:
            raise ConfigError(f"max_new_tokens = {wanted}: beside the prompt, the model has room for {room}")

    def check_text(self, text: str, prompt: str) -> str:
        """Why a text cannot be learned, or ""."""
        tokenizer = self.backbone.tokenizer
        ids = plain_ids(tokenizer, text)
        if not set(ids) - {tokenizer.unk_token_id}:
            return f"the text {text!r} is only unknown tokens for this model's tokenizer"
        room = self.language.room(prompt)
        if len(ids) > room:
            return f"the text has {len(ids)} tokens, and the model has room for {room}"
        return self.special(text, ids)

    def special(self, text: str, ids: list[int]) -> str:
        """Why a text with a special token in it, <image> or [SEP], cannot be used, or ""."""
        found = [i for i in ids if i in self.special_ids]
        tokens = self.backbone.tokenizer.convert_ids_to_tokens(found[:1])
        return f"{text!r} holds {tokens[0]!r}, which means something else here" if found else ""

    def wrong_labels(self, batch: Batch) -> str:
        """Each row's labels are its text's tokens and the end token, and nothing else."""
        tokenizer = self.backbone.tokenizer
        pairs = [(example, text) for example in batch.examples for text, _ in self.texts_of(example)]
        for row, (example, text) in zip(batch.rows.targets, pairs, strict=True):
            labels = row[row != IGNORE].tolist()
            read = str(tokenizer.decode(labels[:-1]))
            if not labels or read.split() != str(tokenizer.decode(plain_ids(tokenizer, text))).split():
                return f"the labels of {example.name!r} read {read!r}, and its text is {text!r}"
        return ""

    def label_table(self, batch: Batch, rows: int = 2) -> str:
        """What the model reads and what it must say, decoded, for the first rows: . is a position that does not count."""
        words, lines = (
            self.backbone.tokenizer.convert_ids_to_tokens,
            ["what the model reads | must say next (. does not count)"],
        )
        texts: Rows = batch.rows
        for row, target in enumerate(texts.targets[:rows]):
            said = [words(int(t)) if t != IGNORE else "." for t in target]
            read, question = texts.input_ids[row], ""
            if texts.decoder_input_ids is not None:  # an encoder reads the prompt apart
                question = " ".join(words(read[texts.attention_mask[row] == 1].tolist())) + "  →  "
                read = texts.decoder_input_ids[row]
            pairs = zip(words(read.tolist()), said, strict=True)
            lines.append(f"  {question}" + "  ".join(f"{word}|{after}" for word, after in pairs))
        return "\n".join(lines)

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "prompt": self.prompt, "generation": asdict(self.generation)}


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target: (rows, tokens), float32, NaN where nothing counts."""
    counts = targets != IGNORE
    log_p = logits.float().log_softmax(-1).gather(-1, targets.masked_fill(~counts, 0)[..., None]).squeeze(-1)
    return log_p.masked_fill(~counts, torch.nan)
