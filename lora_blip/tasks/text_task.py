"""The base of captioning and question answering: a model reads a prompt and generates a text. Only the text has a loss."""

import unicodedata
from abc import abstractmethod
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.data.annotations import plain
from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.errors import ConfigError
from lora_blip.kernels.head_loss import head_loss, is_plain_head
from lora_blip.kernels.plain import is_plain
from lora_blip.models.blip import BlipLanguage, BlipVqaLanguage
from lora_blip.models.blip2 import OptLanguage, T5Language
from lora_blip.models.compilation import Loss, compile_loss, mark_sizes, uses_compiled_loss
from lora_blip.models.generation import check_for_model
from lora_blip.models.language import Language
from lora_blip.models.loading import Backbone
from lora_blip.models.packing import TextRows
from lora_blip.models.text_check import ONLY_UNKNOWN, TextChecker
from lora_blip.models.token_rows import IGNORE, plain_ids, take_rows, token_names
from lora_blip.runtime.counts import counted
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.tasks.base import Generation, Task

CHUNK = 64  # texts of one image that are ranked in one forward
WIDTH = 110  # characters of a line of the label table
HEADING = (
    "labels of the first texts: after each input token, the model learns to predict the label below it (. = not in the loss)"
)


class TextTask(Task[TextRows]):
    """A task that generates a text after a prompt. The prompt is never in the loss."""

    compiled_loss: Loss | None = None  # of `compile_loss`

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        self.language = self.encoder = language_of(backbone)
        options, vocabulary = self.generation.options, self.language.head.out_features
        check_for_model(options, backbone.architecture, vocabulary, self.language.reads_encoder_ids)
        self.checker = TextChecker(backbone.tokenizer, self.language.structural_ids)

    @abstractmethod
    def prompt_of(self, example: Example) -> str:
        """Return what the model reads before it generates a text."""

    @abstractmethod
    def texts_of(self, example: Example) -> list[tuple[str, float]]:
        """Return the right texts with the weight of each. The weights sum to 1."""

    @abstractmethod
    def check_prompt(self, example: Example) -> str:
        """Return why the prompt of a line cannot be used, or ""."""

    # ---- training

    def trim(self, example: Example) -> Example:
        """Return the example without the prompt at the start of its texts. The model reads the prompt before each text."""
        prompt = plain(self.prompt_of(example))
        if not prompt or prompt == example.question:  # BLIP's VQA model has the question in its encoder
            return example
        text, answers = after_prompt(example.text, prompt), tuple(after_prompt(answer, prompt) for answer in example.answers)
        return example if (text, answers) == (example.text, example.answers) else replace(example, text=text, answers=answers)

    def batch(self, host_batch: HostBatch, prefix: Any = None) -> DeviceBatch[TextRows]:
        examples, device = host_batch.examples, self.backbone.device
        weighted = [(number, *text) for number, example in enumerate(examples) for text in self.texts_of(example)]
        numbers, texts, weights = map(list, zip(*weighted, strict=True))
        tokens = self.language.tokenize([self.prompt_of(example) for example in examples], texts, numbers)
        if any(weight != 1 for weight in weights):
            tokens = replace(tokens, weights=weights)
        image = host_batch.image_index or range(len(examples))
        rows = self.language.arrange(tokens, image, self.packs) if self.backbone.fast else tokens.pad()
        return host_batch.to(device, rows.to(device), tokens.label_tokens, prefix)

    def logits(self, batch: DeviceBatch[TextRows]) -> Tensor:
        """Return the logits (texts, tokens, vocabulary)."""
        features = batch.per_example(batch.encode_images(self.encoder))
        return self.language.logits(features, batch.rows.padded())

    def loss(self, batch: DeviceBatch[TextRows], features: Tensor | None = None) -> Tensor:
        """Return Σ weight × cross-entropy over the label tokens."""
        if features is not None:
            return self.loss_from_features(features, batch.rows, batch.image_index)
        encode, images = batch.encoding(self.encoder)
        if self.compiled_loss is None or not uses_compiled_loss(self.backbone.model):
            return self.loss_from_features(encode(images), batch.rows, batch.image_index)
        mark_sizes(images, images=True)
        mark_sizes(batch.rows)
        mark_sizes(batch.image_index)
        return self.compiled_loss(encode, images, batch.rows, batch.image_index)

    def compile_loss(self, **options: Any) -> bool:
        """Compile the loss with its backward pass, from the images on, and return True. options: of `torch.compile`."""

        def loss(encode: Any, images: Tensor, rows: TextRows, image: Tensor | None) -> Tensor:
            return self.loss_from_features(encode(images), rows, image)

        self.compiled_loss = compile_loss(self.backbone.model, loss, **options)
        return True

    def loss_from_features(self, features: Tensor, rows: TextRows, image: Tensor | None) -> Tensor:
        """Return the loss, given the features of each image (images, states, width).

        image: (examples,) the image of each example; None: example i has image i.
        """
        labels, head = rows.labels, self.language.head
        if labels is None or is_plain():
            padded = rows.padded()
            logits = self.language.logits(take_rows(features, image), padded)
            return token_loss(logits, padded.targets, padded.weights)
        states = self.language.label_states(features, rows, image)
        if not is_plain_head(head):
            return token_loss(head(states)[:, None], labels.targets[:, None], labels.weights)
        return head_loss(states, head, labels.targets, labels.weights)

    # ---- prediction

    def output_modules(self) -> list[nn.Module]:
        return [self.language.head]

    @torch.no_grad()
    def predict(self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None) -> list[str]:
        prompts = [self.prompt_of(example) for example in examples]
        return self.language.generate(pixel_values, prompts, adapters, **self.generation.arguments())

    @torch.no_grad()
    def predict_scored(
        self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None
    ) -> list[list[tuple[str, float]]]:
        """Return the texts for each example with their scores, as `Language.generate_scored` defines them."""
        prompts = [self.prompt_of(example) for example in examples]
        return self.language.generate_scored(pixel_values, prompts, adapters, **self.generation.arguments())

    @torch.no_grad()
    def predict_from_features(self, features: Tensor, examples: list[Example]) -> list[str]:
        prompts = [self.prompt_of(example) for example in examples]
        images = [example.name for example in examples]
        return self.language.generate_from_features(features, prompts, images=images, **self.generation.arguments())

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
        rows = self.language.tokenize([prompt], texts, [0] * len(texts)).pad().to(self.backbone.device)
        return self.likelihood(token_log_likelihoods(self.language.logits_of_one_image(features, rows), rows.targets))

    @abstractmethod
    def likelihood(self, tokens: Tensor) -> Tensor:
        """Return one score for each text from log-likelihoods of tokens (texts, tokens), NaN at positions without a label."""

    # ---- checks

    def require_room(self, prompt: str) -> None:
        """Raise ConfigError if `prompt` has a special token or only unknown ones, or leaves too few positions for a text."""
        ids = plain_ids(self.backbone.tokenizer, prompt)
        only_unknown = prompt.strip() and self.checker.unknown.only_unknown(ids)
        if reason := self.checker.special_token_problem(prompt, ids) or (ONLY_UNKNOWN if only_unknown else ""):
            raise ConfigError(f"prompt = {quoted(prompt)}: {reason}")
        self.checker.unknown.note({prompt: ids})
        self.prompt_warning = self.checker.unknown.report([(0, (prompt,))], "prompt")
        room, needed = self.most_new_tokens(prompt), self.generation.max_new_tokens
        if room < needed:
            if room < 1:
                raise ConfigError(f"the prompt is {counted(1 - room, 'token')} too long for this model; shorten it")
            raise ConfigError(
                f"max_new_tokens = {needed}: the model has room for {room} after the prompt; shorten the prompt, or set "
                f"MAX_NEW_TOKENS = {room} (--max-new-tokens {room})"
            )

    def most_new_tokens(self, prompt: str) -> int:
        """Return how many tokens the model has room for after a prompt, with the end token."""
        return self.language.room(prompt) + 1

    def prompt_problem(self, prompt: str) -> str:
        """Return why the prompt of a line cannot be used, or ""."""
        if self.language.room(prompt) < 1:
            return f"the prompt has too many tokens for this model: {quoted(prompt)}; shorten it"
        return self.checker.special_token_problem(prompt, plain_ids(self.backbone.tokenizer, prompt))

    def wrong_labels(self, batch: DeviceBatch[TextRows]) -> str:
        """Return a message if the labels of a text are not its tokens and the end token, or ""."""
        tokenizer = self.backbone.tokenizer
        pairs = [(example, text) for example in batch.examples for text, _ in self.texts_of(example)]
        for labels, (example, text) in zip(batch.rows.label_ids(), pairs, strict=True):
            decoded = str(tokenizer.decode(labels[:-1]))
            if not labels or decoded.split() != str(tokenizer.decode(plain_ids(tokenizer, text))).split():
                return f"the labels of {example.name!r} decode to {decoded!r}, but its text is {text!r}"
        return ""

    def label_table(self, batch: DeviceBatch[TextRows], rows: int = 2) -> str:
        """Return the input tokens of the first texts above their labels, as words."""
        words, texts = partial(token_names, self.backbone.tokenizer), batch.rows.padded()
        lines = [HEADING]
        for row, target in enumerate(texts.targets[:rows]):
            inputs = texts.input_ids
            if texts.decoder_input_ids is not None:  # an encoder reads the prompt
                ids, mask = texts.per_text(texts.input_ids)[row], texts.per_text(texts.attention_mask)[row]
                lines.append(printable("  prompt  " + " ".join(words(ids[mask == 1].tolist()))))
                inputs = texts.decoder_input_ids
            labels = [words([int(t)])[0] if t != IGNORE else "." for t in target]
            lines += map(printable, aligned([*zip(words(inputs[row].tolist()), labels, strict=True)]))
        return "\n".join(lines)

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "prompt": self.prompt, "generation": self.generation.stored()}


def aligned(pairs: list[tuple[str, str]]) -> list[str]:
    """Return (input token, label) pairs as columns in two lines. Start two new lines if a line is longer than WIDTH.

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


def token_loss(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ wᵣ · −log p(target) over the positions that have a label, float32.

    logits: (rows, tokens, vocabulary). targets: (rows, tokens), IGNORE at positions without a label. weights: (rows,); None: 1.
    """
    flat = logits.flatten(0, 1).float(), targets.flatten()
    if weights is None:
        return F.cross_entropy(*flat, ignore_index=IGNORE, reduction="sum")
    losses = F.cross_entropy(*flat, ignore_index=IGNORE, reduction="none").view(targets.shape)
    return (losses.sum(1) * weights).sum()


def token_log_likelihoods(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log p of each target, (rows, tokens), float32, NaN at positions without a label."""
    has_label = targets != IGNORE
    log_p = logits.float().log_softmax(-1).gather(-1, targets.masked_fill(~has_label, 0)[..., None]).squeeze(-1)
    return log_p.masked_fill(~has_label, torch.nan)


def language_of(backbone: Backbone) -> Language[Any]:
    """Return the language side of a backbone."""
    if backbone.architecture == "BlipForQuestionAnswering":
        return BlipVqaLanguage(backbone)
    if backbone.family == "blip":
        return BlipLanguage(backbone)
    return OptLanguage(backbone) if backbone.model.config.use_decoder_only_language_model else T5Language(backbone)
