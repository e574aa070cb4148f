"""What captioning and question answering share: a prompt is read, a text is the answer, and only the text is learned."""

import unicodedata
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lora_blip.data.annotations import plain
from lora_blip.data.example import Example
from lora_blip.data.loader import HostBatch
from lora_blip.errors import ConfigError
from lora_blip.kernels.head_loss import head_loss, is_plain_head
from lora_blip.kernels.plain import is_plain
from lora_blip.models.blip import BlipLanguage, BlipVqaLanguage
from lora_blip.models.blip2 import OptLanguage, T5Language
from lora_blip.models.language import Language
from lora_blip.models.loading import Backbone
from lora_blip.models.token_rows import IGNORE, plain_ids
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.tasks.base import ONLY_UNKNOWN, DeviceBatch, Generation, Task
from lora_blip.tasks.losses import token_loss

CHUNK = 64  # rows of one image's texts that are ranked at a time


class TextTask(Task):
    """The prompt stands before every text and is never in the loss."""

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.language = language_of(backbone)
        self.special_ids = self.language.structural_ids

    def prompt_of(self, example: Example) -> str:
        """What the model reads before it writes."""
        raise NotImplementedError

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        """What it may write, with the weight of each; the weights sum to 1."""
        raise NotImplementedError

    # ---- training

    def trim(self, example: Example) -> Example:
        """The prompt is read before every text: a text that begins with it would hold it twice."""
        prompt = plain(self.prompt_of(example))
        if not prompt or prompt == example.question:  # BLIP's own VQA reads the question apart from the answer
            return example
        text, answers = after_prompt(example.text, prompt), tuple(after_prompt(answer, prompt) for answer in example.answers)
        return example if (text, answers) == (example.text, example.answers) else replace(example, text=text, answers=answers)

    def batch(self, host_batch: HostBatch) -> DeviceBatch:
        device, prompts = self.backbone.device, [self.prompt_of(example) for example in host_batch.examples]
        about = host_batch.image_index or range(len(host_batch.examples))
        texts = [(i, text, weight) for i, e in enumerate(host_batch.examples) for text, weight in self.texts_of(e)]
        image, said, weights = map(list, zip(*texts, strict=True))
        rows = self.language.tokenize(prompts, said, image).weighing(weights)
        packed = self.language.pack(rows, image, [about[i] for i in image]) if self.backbone.fast else None
        packed = packed and packed.to(device)
        return DeviceBatch(
            host_batch.examples, rows=rows.to(device), packed=packed, count=rows.label_tokens, **self.image_tensors(host_batch)
        )

    def logits(self, batch: DeviceBatch) -> Tensor:
        """(rows, tokens, vocabulary)."""
        return self.language.logits(batch.per_example(self.encode_batch(batch)), batch.rows)

    def loss(self, batch: DeviceBatch, seen: Tensor | None = None) -> Tensor:
        """Σ weight × cross-entropy over the label tokens."""
        seen = self.encode_batch(batch) if seen is None else seen
        if batch.packed is None or is_plain():
            return token_loss(self.language.logits(batch.per_example(seen), batch.rows), batch.rows.targets, batch.rows.weights)
        head, packed = self.language.head, batch.packed
        states = self.language.label_states(seen, batch.per_example, batch.rows, packed)
        if not is_plain_head(head):
            return token_loss(head(states)[:, None], packed.targets[:, None], packed.weights)
        return head_loss(states, head, packed.targets, packed.weights)

    # ---- prediction

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.language.encode_images(pixel_values)

    def project_vision(self, states: Tensor) -> Tensor:
        return self.language.project_vision(states)

    @torch.no_grad()
    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[str]:
        prompts = [self.prompt_of(example) for example in examples]
        return self.language.generate(pixel_values, prompts, adapters, **asdict(self.generation))

    @torch.no_grad()
    def predict_from_features(self, seen: Tensor, examples: list[Example]) -> list[str]:
        return self.language.generate_from_features(
            seen, [self.prompt_of(example) for example in examples], **asdict(self.generation)
        )

    @torch.no_grad()
    def rank(self, pixel_values: Tensor, examples: list[Example], texts: list[str]) -> Tensor:
        """softmax over the texts of their log-likelihoods; see `likelihood` of each task."""
        seen, found = self.language.encode_unique_images(pixel_values), []
        for states, example in zip(seen.split(1), examples, strict=True):
            parts = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
            found.append(torch.cat([self.scored(states, self.prompt_of(example), part) for part in parts]))
        return torch.stack(found).softmax(1)

    def scored(self, seen: Tensor, prompt: str, texts: list[str]) -> Tensor:
        """The log-likelihood of each text after a prompt, over one image seen (1, states, width): (texts,)."""
        rows = self.language.tokenize([prompt], texts, [0] * len(texts)).to(self.backbone.device)
        return self.likelihood(token_log_likelihoods(self.language.logits_of_one_image(seen, rows), rows.targets))

    def likelihood(self, tokens: Tensor) -> Tensor:
        """Per-token log-likelihoods (rows, tokens), NaN where nothing counts → one score a text."""
        raise NotImplementedError

    # ---- checks

    def require_room(self, prompt: str) -> None:
        """ConfigError if `prompt` holds a special token or only unknown ones, or leaves too few positions."""
        ids = plain_ids(self.backbone.tokenizer, prompt)
        if reason := self.special_token_problem(prompt, ids) or (
            ONLY_UNKNOWN if prompt.strip() and self.unknown_tokens.nothing_left(ids) else ""
        ):
            raise ConfigError(f"prompt = {quoted(prompt)}: {reason}")
        self.unknown_tokens.note({prompt: ids})
        self.prompt_warning = self.unknown_tokens.report([(0, (prompt,))], "prompt")
        room, wanted = self.most_new_tokens(prompt), self.generation.max_new_tokens
        if room < wanted:
            raise ConfigError(f"max_new_tokens = {wanted}: beside the prompt, the model has room for {room}")

    def most_new_tokens(self, prompt: str) -> int:
        """Return how many tokens the model has room for after a prompt, with the end token."""
        return self.language.room(prompt) + 1

    def prompt_fault(self, prompt: str) -> str:
        """Why a line's own prompt cannot be used, or ""."""
        if self.language.room(prompt) < 1:
            return f"the prompt has too many tokens for this model: {quoted(prompt)}"
        return self.special_token_problem(prompt, plain_ids(self.backbone.tokenizer, prompt))

    def wrong_labels(self, batch: DeviceBatch) -> str:
        """Each row's labels are its text's tokens and the end token, and nothing else."""
        tokenizer = self.backbone.tokenizer
        pairs = [(example, text) for example in batch.examples for text, _ in self.texts_of(example)]
        for row, (example, text) in zip(batch.rows.targets, pairs, strict=True):
            labels = row[row != IGNORE].tolist()
            read = str(tokenizer.decode(labels[:-1]))
            if not labels or read.split() != str(tokenizer.decode(plain_ids(tokenizer, text))).split():
                return f"the labels of {example.name!r} read {read!r}, and its text is {text!r}"
        return ""

    def label_table(self, batch: DeviceBatch, rows: int = 2) -> str:
        """What the model reads and what it must say, decoded, for the first rows: . is a position that does not count."""
        words, texts = self.backbone.tokenizer.convert_ids_to_tokens, batch.rows
        lines = ["what the model reads | must say next (. does not count)"]
        for row, target in enumerate(texts.targets[:rows]):
            read, prompt = texts.input_ids, ""
            if texts.decoder_input_ids is not None:  # an encoder reads the prompt apart
                asked, there = texts.per_row(texts.input_ids)[row], texts.per_row(texts.attention_mask)[row]
                read, prompt = texts.decoder_input_ids, " ".join(words(asked[there == 1].tolist())) + "  →  "
            said = [words(int(t)) if t != IGNORE else "." for t in target]
            pairs = zip(words(read[row].tolist()), said, strict=True)
            lines.append(printable(f"  {prompt}" + "  ".join(f"{word}|{after}" for word, after in pairs)))
        return "\n".join(lines)

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "prompt": self.prompt, "generation": asdict(self.generation)}


def after_prompt(text: str, prompt: str) -> str:
    """Return what follows the prompt in a text that begins with it, in letters of any case; else the text."""
    start, rest = text[: len(prompt)], text[len(prompt) :]
    if start.casefold() != prompt.casefold() or (is_word(prompt[-1:]) and is_word(rest[:1])):
        return text
    return rest.strip()


def is_word(character: str) -> bool:
    """Whether a character continues a word; a Chinese or Japanese one is a word of its own."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """log p of each target: (rows, tokens), float32, NaN where nothing counts."""
    counts = targets != IGNORE
    log_p = logits.float().log_softmax(-1).gather(-1, targets.masked_fill(~counts, 0)[..., None]).squeeze(-1)
    return log_p.masked_fill(~counts, torch.nan)


def language_of(backbone: Backbone) -> Language:
    if backbone.architecture == "BlipForQuestionAnswering":
        return BlipVqaLanguage(backbone)
    if backbone.family == "blip":
        return BlipLanguage(backbone)
    return OptLanguage(backbone) if backbone.model.config.use_decoder_only_language_model else T5Language(backbone)
