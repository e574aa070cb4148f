"""Image-text retrieval: which text belongs to which image, by contrast (ITC) and by matching (ITM)."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.data.example import FILE, Example, many_objects
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.data.paths import resolved
from lora_blip.errors import ConfigError
from lora_blip.metrics.retrieval import RECALLS, recalls
from lora_blip.models.loading import Backbone
from lora_blip.models.matching import TokenizedTexts, cosines, matcher_of
from lora_blip.models.text_check import TextChecker
from lora_blip.models.token_rows import special_ids, token_names
from lora_blip.runtime.row_selection import select_rows
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.tasks.base import Generation, Task
from lora_blip.tasks.losses import hard_negatives, itc_loss

TEMPERATURE = 0.07  # before training, as in CLIP and BLIP
RERANKED = 16  # texts with the highest ITC similarity, for which ITM is computed too
CHUNK = 64  # pairs in one forward of ITM
IS_QUESTION = "it is a question, and retrieval needs texts; "
FOR_QUESTIONS = "to train on questions, choose a checkpoint for questions (--model Salesforce/blip-vqa-base)"


class Features(NamedTuple):
    """An image and a text in the joint space."""

    image: Tensor  # (views, width)
    text: Tensor  # (width,)


class EncodedTexts(NamedTuple):
    """Texts with their ITC features, on the CPU, so that they stay valid after an error of the device."""

    rows: TokenizedTexts
    features: Tensor  # (texts, width)


class RetrievalTask(Task[TokenizedTexts]):
    """Lines are {"image": …, "text": …}. An image matches the texts of all its lines.

    The temperature of the contrast is trained with the adapters and saved in their file. Negatives (wrong pairs) come from the
    micro-batch of one process: a larger batch_size gives more of them, and more accumulation or more processes do not.
    """

    name = "retrieval"
    architectures = ("BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval")
    example_checkpoint = "Salesforce/blip-itm-base-coco"
    writes_text = False
    correctness_name = "R@1 image→text"
    needs_negatives = True
    score_names = ("recall_at_1", *(f"{way}_r{most}" for way in ("image_to_text", "text_to_image") for most in RECALLS))

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        if self.prompt:
            raise ConfigError(f"prompt = {self.prompt!r}: retrieval has no prompt; leave it empty")
        self.matcher = self.encoder = matcher_of(backbone)
        image = getattr(backbone.model.config, "image_token_index", None)
        self.checker = TextChecker(backbone.tokenizer, special_ids(backbone.tokenizer) | ({image} - {None}))
        self.texts_of_image: dict[str, tuple[str, ...]] = {}  # image → the texts of all its lines, if there are several
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE), dtype=torch.float32, device=backbone.device))

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_temperature]

    # ---- training

    def prepare_data(self, examples: list[Example]) -> None:
        with many_objects():
            files = resolved(dict.fromkeys(map(FILE, examples)))  # two spellings of a path are one image
            texts: dict[str, tuple[str, ...]] = {}
            for example in examples:
                earlier = texts.get(files[example.file], ())
                if example.text not in earlier:
                    texts[files[example.file]] = (*earlier, example.text)
            self.texts_of_image = {image: texts[file] for image, file in files.items() if len(texts[file]) > 1}

    def check(self, example: Example) -> str:
        if example.prompt:
            return 'the line has a prompt, which retrieval does not use; remove the key "prompt"'
        if example.text:
            return self.check_text(example.text)
        return IS_QUESTION + FOR_QUESTIONS if example.question else 'no text: retrieval needs one; add the key "text"'

    def check_text(self, text: str) -> str:
        """Return why a text cannot be matched, or ""."""
        return self.checker.problem(text, self.matcher.max_tokens - 2)

    def batch(self, host_batch: HostBatch, prefix: Any = None) -> DeviceBatch[TokenizedTexts]:
        examples, device = host_batch.examples, self.backbone.device
        rows = self.matcher.tokenize([example.text for example in examples]).to(device)
        count = 0 if positives(examples, self.texts_of_image).all() else len(examples)
        return host_batch.to(device, rows, count, prefix)

    def repeatable_loss(self, batch: DeviceBatch[TokenizedTexts]) -> Tensor:
        return self.loss(batch, drawn=False)

    def loss(self, batch: DeviceBatch[TokenizedTexts], features: Tensor | None = None, drawn: bool = True) -> Tensor:
        """Return rows × (mean ITC + mean ITM over the right pair, a wrong text and a wrong image of each row).

        If a micro-batch has no wrong pair, its loss and its count are 0, because ITM would only learn to answer "match".
        The last micro-batch of an epoch has no wrong pair if it has one line.

        drawn: draw the negatives by similarity.
        """
        matcher, texts = self.matcher, batch.rows
        states = batch.per_example(batch.encode_images(self.encoder) if features is None else features)
        similarity = cosines(matcher.image_features(states), matcher.text_features(texts))  # (rows, rows)
        right = positives(batch.examples, self.texts_of_image)
        if right.all():
            return 0 * similarity.sum()
        # which rows have a wrong text or image is known here, so it is not read from the GPU
        with_text, with_image = ((~right.all(way)).nonzero().flatten() for way in (1, 0))
        right, with_text, with_image = (
            each.to(similarity.device, non_blocking=True) for each in (right, with_text, with_image)
        )
        likely = similarity if drawn else torch.zeros_like(similarity)  # not drawn: the first negatives
        text, image = hard_negatives(likely, right, self.temperature, sampled=drawn and self.backbone.model.training)
        every = torch.arange(len(texts), device=text.device)
        images = torch.cat([every, with_text, image[with_image]])  # image of each pair, (pairs,); right pairs first
        odds = matcher.matching(select_rows(states, images), texts[torch.cat([every, text[with_text], with_image])])
        labels = (torch.arange(len(odds), device=odds.device) < len(texts)).float()
        matching = F.binary_cross_entropy_with_logits(odds, labels)  # equal to the cross-entropy of two logits
        return itc_loss(similarity, right, self.temperature).sum() + len(texts) * matching

    def logits(self, batch: DeviceBatch[TokenizedTexts]) -> Tensor:
        """Return ITC's logits of all pairs, then ITM's log-odds of the right pairs: (rows · rows + rows,)."""
        states = batch.per_example(batch.encode_images(self.encoder))
        similarity = cosines(self.matcher.image_features(states), self.matcher.text_features(batch.rows))
        return torch.cat([(similarity / self.temperature).flatten(), self.matcher.matching(states, batch.rows)])

    def wrong_labels(self, batch: DeviceBatch[TokenizedTexts]) -> str:
        return NO_NEGATIVES if positives(batch.examples, self.texts_of_image).all() else ""

    def label_table(self, batch: DeviceBatch[TokenizedTexts], rows: int = 2) -> str:
        right = positives(batch.examples, self.texts_of_image)
        lines = ["the first texts, and the images of this batch that each of them describes"]
        for row in range(min(rows, len(batch.examples))):
            ids = batch.rows.ids[row][batch.rows.mask[row] == 1].tolist()
            names = dict.fromkeys(batch.examples[i].name for i in right[:, row].nonzero().flatten().tolist())
            text = " ".join(token_names(self.backbone.tokenizer, ids))
            lines += [printable(f"  text    {text}"), printable(f"  images  {', '.join(names)}")]
        return "\n".join(lines)

    # ---- prediction

    def subject(self, example: Example) -> tuple[Path, str]:
        return example.image, example.text

    def output_modules(self) -> list[nn.Module]:
        names = ("vision_proj", "text_proj", "vision_projection", "text_projection")
        return [module for name in names if (module := getattr(self.backbone.model, name, None)) is not None]

    @torch.no_grad()
    def predict(
        self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None
    ) -> list[Features]:
        """Return each image and text in the joint space, on the CPU, for `scores`."""
        if adapters is not None:
            raise ConfigError(
                "retrieval uses one adapter for the whole batch: call it inside lora_blip.use_adapters(model, name)"
            )
        return self.predict_from_features(self.encoder.encode_images(pixel_values), examples)

    @torch.no_grad()
    def predict_from_features(self, features: Tensor, examples: list[Example]) -> list[Features]:
        texts = self.tokenize_checked([example.text for example in examples]).to(self.backbone.device)
        images = self.matcher.image_features(features).cpu()
        return [Features(*pair) for pair in zip(images, self.matcher.text_features(texts).cpu(), strict=True)]

    def tokenize_checked(self, texts: list[str]) -> TokenizedTexts:
        """Return the token rows of texts. Raise ConfigError if one is too long or contains a special token."""
        for text in texts:
            if reason := self.check_text(text):
                raise ConfigError(f"the text {quoted(text)} cannot be matched with an image: {reason}")
        return self.matcher.tokenize(texts)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        rows, device = self.tokenize_checked(texts), self.backbone.device
        parts = (rows[start : start + CHUNK].to(device) for start in range(0, len(rows), CHUNK))
        return EncodedTexts(rows, torch.cat([self.matcher.text_features(part).cpu() for part in parts]))

    @torch.no_grad()
    def rank(self, pixel_values: Tensor, examples: list[Example], texts: list[str] | EncodedTexts) -> Tensor:  # noqa: ARG002
        """Return the softmax of ITC's logits, but rerank the RERANKED most probable texts by ITC and ITM.

        The sum of these texts' probabilities stays the same. The softmax of ITC logit + ITM log-odds divides it among them.
        """
        rows, text_features = texts if isinstance(texts, EncodedTexts) else self.encode_texts(texts)
        states, device = self.matcher.encode_images(pixel_values), self.backbone.device
        logits = cosines(self.matcher.image_features(states), text_features.to(device)) / self.temperature
        rows = rows.to(device)
        return torch.stack([self.reranked(*one, rows) for one in zip(logits, states, strict=True)])

    def reranked(self, logits: Tensor, states: Tensor, texts: TokenizedTexts) -> Tensor:
        """Return the probabilities (texts,) of one image from its ITC logits (texts,) and ITM of the best texts."""
        chances = logits.softmax(0)
        best = logits.topk(min(RERANKED, len(texts))).indices
        odds = self.matcher.matching(states.expand(len(best), *states.shape), texts[best])
        return chances.index_copy(0, best, chances[best].sum() * (logits[best] + odds).softmax(0))

    @torch.no_grad()
    def match(self, pixel_values: Tensor, texts: list[list[str]]) -> list[Any]:
        """Return ITM's log-odds of the given texts of each image: one float32 array for each image."""
        result = []
        for states, own in zip(self.matcher.encode_images(pixel_values), texts, strict=True):
            rows = self.tokenize_checked(own).to(self.backbone.device)
            parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            odds = [self.matcher.matching(states.expand(len(part), *states.shape), part) for part in parts]
            result.append(torch.cat(odds).cpu().numpy())
        return result

    def scores(self, predictions: dict[Any, Any], examples: list[Example], extra: str = "") -> dict[str, float]:
        """Return recall at 1 by ITC among the images and texts, both ways and their mean. `extra`: recall at 5 or 10."""
        images = list(dict.fromkeys(example.image for example in examples))
        texts = list(dict.fromkeys(example.text for example in examples))
        by_image = {example.image: predictions[self.subject(example)].image for example in examples}
        by_text = {example.text: predictions[self.subject(example)].text for example in examples}
        similarity = cosines(torch.stack([by_image[i] for i in images]), torch.stack([by_text[text] for text in texts]))
        all_scores = recalls(similarity.float().cpu().numpy(), relevance(examples, images, texts))
        keys = [key for key in dict.fromkeys(("image_to_text_r1", "text_to_image_r1", extra)) if key in all_scores]
        mean = (all_scores["image_to_text_r1"] + all_scores["text_to_image_r1"]) / 2
        return {"recall_at_1": mean, **{key: all_scores[key] for key in keys}}

    # ---- the task's entry in an adapter file

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name, "prompt": "", "generation": self.generation.stored(), "temperature": self.temperature.item(),
        }  # fmt: skip

    def load_metadata(self, metadata: dict[str, Any]) -> None:
        temperature = metadata.get("temperature", TEMPERATURE)
        if isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0:
            self.log_temperature.data.fill_(math.log(temperature))


NO_NEGATIVES = (
    "the first batch has no wrong pair to learn from, because all its rows have the same image or the same text; raise "
    "BATCH_SIZE (--batch-size 8), or give data with several images and texts"
)


def positives(examples: list[Example], known: Mapping[str, Collection[str]] = MappingProxyType({})) -> Tensor:
    """Return (rows, rows), True if text j describes image i by a line of `examples` or of all the data (`known`)."""
    texts: dict[str, set[str]] = {}
    for example in examples:
        texts.setdefault(example.file, set(known.get(example.file, ()))).add(example.text)
    return torch.tensor([[other.text in right for other in examples] for right in (texts[one.file] for one in examples)])


def relevance(examples: list[Example], images: list[Path], texts: list[str]) -> Any:
    """Return (images, texts), True if the text describes the image."""
    rows, columns = ({item: number for number, item in enumerate(items)} for items in (images, texts))
    right = np.zeros((len(images), len(texts)), dtype=np.bool_)
    for example in examples:
        right[rows[example.image], columns[example.text]] = True
    return right
