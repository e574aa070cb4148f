"""The base of captioning and question answering: the model reads a prompt and generates a text. Only the text is learned."""

import unicodedata
from dataclasses import asdict, replace
from itertools import groupby
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

CHUNK = 64  # texts of one image that are ranked in one forward
WIDTH = 110  # characters of a line of the label table
HEADING = (
    "labels of the first texts: after each input token, the model learns to predict the label below it (. = not in the loss)"
)


class TextTask(Task):
    """The prompt comes before every text. It is never in the loss."""

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.language = language_of(backbone)
        self.special_ids = self.language.structural_ids

    def prompt_of(self, example: Example) -> str:
        """Return what the model reads before it generates a text."""
        raise NotImplementedError

    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        """Return the right texts with the weight of each. The weights sum to 1."""
        raise NotImplementedError

    # ---- training

    def trim(self, example: Example) -> Example:
        """Return the example without the prompt at the start of its texts, because the prompt comes before every text."""
        prompt = plain(self.prompt_of(example))
        if not prompt or prompt == example.question:  # BLIP's VQA model has the question in its encoder
            return example
        text, answers = after_prompt(example.text, prompt), tuple(after_prompt(answer, prompt) for answer in example.answers)
        return example if (text, answers) == (example.text, example.answers) else replace(example, text=text, answers=answers)

    def batch(self, host_batch: HostBatch) -> DeviceBatch:
        device, prompts = self.backbone.device, [self.prompt_of(example) for example in host_batch.examples]
        picture = host_batch.image_index or range(len(host_batch.examples))
        weighted = [(i, text, weight) for i, e in enumerate(host_batch.examples) for text, weight in self.texts_of(e)]
        image, texts, weights = map(list, zip(*weighted, strict=True))
        rows = self.language.tokenize(prompts, texts, image).with_weights(weights)
        packed = self.language.pack(rows, image, [picture[i] for i in image]).to(device) if self.backbone.fast else None
        tensors = self.image_tensors(host_batch)
        return DeviceBatch(host_batch.examples, rows=rows.to(device), packed=packed, count=rows.label_tokens, **tensors)

    def logits(self, batch: DeviceBatch) -> Tensor:
        """Return the logits (rows, tokens, vocabulary)."""
        return self.language.logits(batch.per_example(self.encode_batch(batch)), batch.rows)

    def loss(self, batch: DeviceBatch, features: Tensor | None = None) -> Tensor:
        """Return Σ weight × cross-entropy over the label tokens."""
        features = self.encode_batch(batch) if features is None else features
        rows, packed, head = batch.rows, batch.packed, self.language.head
        if packed is None or is_plain():
            return token_loss(self.language.logits(batch.per_example(features), rows), rows.targets, rows.weights)
        states = self.language.label_states(features, batch.per_example, rows, packed)
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
    def predict_scored(
        self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None
    ) -> list[tuple[str, float]]:
        """Return what `predict` does, each text with its score as `Language.generate_scored` defines it."""
        prompts = [self.prompt_of(example) for example in examples]
        return self.language.generate_scored(pixel_values, prompts, adapters, **asdict(self.generation))

    @torch.no_grad()
    def predict_from_features(self, features: Tensor, examples: list[Example]) -> list[str]:
        prompts = [self.prompt_of(example) for example in examples]
        return self.language.generate_from_features(features, prompts, **asdict(self.generation))

    @torch.no_grad()
    def rank(self, pixel_values: Tensor, examples: list[Example], texts: list[str]) -> Tensor:
        """Return the softmax over the texts of their log-likelihoods, which each task defines in `likelihood`."""
        features, scores = self.language.encode_unique_images(pixel_values), []
        for states, example in zip(features.split(1), examples, strict=True):
            parts = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
            scores.append(torch.cat([self.text_scores(states, self.prompt_of(example), part) for part in parts]))
        return torch.stack(scores).softmax(1)

    def text_scores(self, features: Tensor, prompt: str, texts: list[str]) -> Tensor:
        """Return the log-likelihood (texts,) of each text after a prompt, for one image: features (1, states, width)."""
        rows = self.language.tokenize([prompt], texts, [0] * len(texts)).to(self.backbone.device)
        return self.likelihood(token_log_likelihoods(self.language.logits_of_one_image(features, rows), rows.targets))

    def likelihood(self, tokens: Tensor) -> Tensor:
        """Return one score for each text from log-likelihoods of tokens (rows, tokens), NaN at positions without a label."""
        raise NotImplementedError

    # ---- checks

    def require_room(self, prompt: str) -> None:
        """Raise ConfigError if `prompt` has a special token or only unknown ones, or leaves too few positions for a text."""
        ids = plain_ids(self.backbone.tokenizer, prompt)
        only_unknown = prompt.strip() and self.unknown_tokens.nothing_left(ids)
        if reason := self.special_token_problem(prompt, ids) or (ONLY_UNKNOWN if only_unknown else ""):
            raise ConfigError(f"prompt = {quoted(prompt)}: {reason}")
        self.unknown_tokens.note({prompt: ids})
        self.prompt_warning = self.unknown_tokens.report([(0, (prompt,))], "prompt")
        room, needed = self.most_new_tokens(prompt), self.generation.max_new_tokens
        if room < needed:
            raise ConfigError(
                f"max_new_tokens = {needed}: the model has room for {room} after the prompt; shorten the prompt, or set a "
                "smaller MAX_NEW_TOKENS"
            )

    def most_new_tokens(self, prompt: str) -> int:
        """Return how many tokens the model has room for after a prompt, with the end token."""
        return self.language.room(prompt) + 1

    def prompt_fault(self, prompt: str) -> str:
        """Return why the prompt of a line cannot be used, or ""."""
        if self.language.room(prompt) < 1:
            return f"the prompt has too many tokens for this model: {quoted(prompt)}"
        return self.special_token_problem(prompt, plain_ids(self.backbone.tokenizer, prompt))

    def wrong_labels(self, batch: DeviceBatch) -> str:
        """Return a message if the labels of a row are not the tokens of its text and the end token, or ""."""
        tokenizer = self.backbone.tokenizer
        pairs = [(example, text) for example in batch.examples for text, _ in self.texts_of(example)]
        for row, (example, text) in zip(batch.rows.targets, pairs, strict=True):
            labels = row[row != IGNORE].tolist()
            decoded = str(tokenizer.decode(labels[:-1]))
            if not labels or decoded.split() != str(tokenizer.decode(plain_ids(tokenizer, text))).split():
                return f"the labels of {example.name!r} decode to {decoded!r}, but its text is {text!r}"
        return ""

    def label_table(self, batch: DeviceBatch, rows: int = 2) -> str:
        """Return the input tokens of the first rows above their labels, as words."""
        words, texts = self.backbone.tokenizer.convert_ids_to_tokens, batch.rows
        lines = [HEADING]
        for row, target in enumerate(texts.targets[:rows]):
            inputs = texts.input_ids
            if texts.decoder_input_ids is not None:  # an encoder reads the prompt
                ids, mask = texts.per_row(texts.input_ids)[row], texts.per_row(texts.attention_mask)[row]
                lines.append(printable("  prompt  " + " ".join(words(ids[mask == 1].tolist()))))
                inputs = texts.decoder_input_ids
            labels = [words(int(t)) if t != IGNORE else "." for t in target]
            lines += map(printable, aligned([*zip(words(inputs[row].tolist()), labels, strict=True)]))
        return "\n".join(lines)

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "prompt": self.prompt, "generation": asdict(self.generation)}


def aligned(pairs: list[tuple[str, str]]) -> list[str]:
    """Return (input token, label) pairs as two lines of columns, or four and more if they are longer than WIDTH.

    Equal neighbors, such as padding, are one column.
    """
    columns = [
        (f"{token} ×{count}" if (count := len([*same])) > 1 else token, label) for (token, label), same in groupby(pairs)
    ]
    widths = [max(map(len, column)) for column in columns]
    lines, start = [], 0
    while start < len(columns):
        stop = start + 1
        while stop < len(columns) and sum(widths[start : stop + 1]) + 2 * (stop - start) <= WIDTH:
            stop += 1
        for name, cells in zip(("input", "label"), zip(*columns[start:stop], strict=True), strict=True):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths[start:stop], strict=True))
            lines.append(f"  {name}   {'  '.join(padded)}".rstrip())
        start = stop
    return lines


def after_prompt(text: str, prompt: str) -> str:
    """Return the rest of a text that begins with the prompt, in letters of any case. Return other texts as they are."""
    start, rest = text[: len(prompt)], text[len(prompt) :]
    if start.casefold() != prompt.casefold() or (is_word(prompt[-1:]) and is_word(rest[:1])):
        return text
    return rest.strip()


def is_word(character: str) -> bool:
    """Return True if a character continues a word. A Chinese or Japanese character does not: it is a word itself."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p of each target, (rows, tokens), float32, NaN at positions without a label."""
    has_label = targets != IGNORE
    log_p = logits.float().log_softmax(-1).gather(-1, targets.masked_fill(~has_label, 0)[..., None]).squeeze(-1)
    return log_p.masked_fill(~has_label, torch.nan)


def language_of(backbone: Backbone) -> Language:
    """Return the language side of a backbone."""
    if backbone.architecture == "BlipForQuestionAnswering":
        return BlipVqaLanguage(backbone)
    if backbone.family == "blip":
        return BlipLanguage(backbone)
    return OptLanguage(backbone) if backbone.model.config.use_decoder_only_language_model else T5Language(backbone)
