"""Image-text retrieval: which text belongs to which image, by contrast (ITC) and by matching (ITM)."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_blip.data.annotations import many_objects
from lora_blip.data.example import FILE, Example
from lora_blip.data.loader import HostBatch
from lora_blip.data.paths import resolved
from lora_blip.errors import ConfigError
from lora_blip.metrics.retrieval import RECALLS, recalls
from lora_blip.models.loading import Backbone
from lora_blip.models.matching import TokenizedTexts, cosines, matcher_of
from lora_blip.runtime.untrusted import printable, quoted
from lora_blip.tasks.base import DeviceBatch, Generation, Task
from lora_blip.tasks.losses import hard_negatives, itc_loss

TEMPERATURE = 0.07  # where training starts, as CLIP and BLIP do
RERANKED = 16  # of the texts that the contrast likes best, ITM looks at so many again
CHUNK = 64  # pairs that ITM reads at a time


class Features(NamedTuple):
    image: Tensor  # (views, width)
    text: Tensor  # (width,)


class EncodedTexts(NamedTuple):
    """TokenizedTexts that were read without an image, kept on the CPU, which outlives every fault of a device."""

    rows: TokenizedTexts
    features: Tensor  # (texts, width)


class RetrievalTask(Task):
    """Lines are {"image": …, "text": …}; several lines of one image are all right for it.

    The temperature of the contrast is learned beside the adapters and kept in their file. Negatives come
    from the micro-batch: a larger batch_size makes the contrast harder, accumulation only averages.
    """

    name = "retrieval"
    architectures = ("BlipForImageTextRetrieval", "Blip2ForImageTextRetrieval")
    example_checkpoint = "Salesforce/blip-itm-base-coco"
    one_pass_per_image = False  # two lines of an image are no negatives of each other
    score_names = ("recall_at_1", *(f"{way}_r{most}" for way in ("image_to_text", "text_to_image") for most in RECALLS))

    def __init__(self, backbone: Backbone, prompt: str = "", generation: Generation | None = None) -> None:
        super().__init__(backbone, prompt, generation)
        if self.prompt:
            raise ConfigError(f"prompt = {self.prompt!r}: retrieval has no prompt; leave it empty")
        self.matcher = matcher_of(backbone)
        self.texts_of_image: dict[str, tuple[str, ...]] = {}  # image → the texts of all its lines, where there are several
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE), device=backbone.device))

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_temperature]

    # ---- training

    def prepare_data(self, examples: list[Example]) -> None:
        with many_objects():
            files = resolved(dict.fromkeys(map(FILE, examples)))  # one image, however spelled
            texts: dict[str, tuple[str, ...]] = {}
            for example in examples:
                said = texts.get(files[example.file], ())
                if example.text not in said:
                    texts[files[example.file]] = (*said, example.text)
            self.texts_of_image = {image: texts[file] for image, file in files.items() if len(texts[file]) > 1}

    def check(self, example: Example) -> str:
        if example.prompt:
            return 'the line has a prompt, and retrieval reads none; remove the key "prompt"'
        return self.check_text(example.text) if example.text else "no text: retrieval needs one"

    def check_text(self, text: str) -> str:
        """Why a text cannot be matched, or ""."""
        return self.text_problem(text, self.matcher.max_tokens - 2)

    def batch(self, host_batch: HostBatch) -> DeviceBatch:
        device = self.backbone.device
        texts = self.matcher.tokenize([example.text for example in host_batch.examples]).to(device)
        count = 0 if positives(host_batch.examples, self.texts_of_image).all() else len(host_batch.examples)
        return DeviceBatch(host_batch.examples, rows=texts, count=count, **self.image_tensors(host_batch))

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        return self.matcher.encode_images(pixel_values)

    def project_vision(self, states: Tensor) -> Tensor:
        return states

    def repeatable_loss(self, batch: DeviceBatch) -> Tensor:
        return self.loss(batch, drawn=False)

    def loss(self, batch: DeviceBatch, seen: Tensor | None = None, drawn: bool = True) -> Tensor:
        """Rows × (mean ITC + mean ITM over the right pair, a wrong text and a wrong image of each row).

        0 for a micro-batch without any wrong pair, such as the last line of an epoch left alone, whose count is
        0 too: ITM would only learn from it to say yes. `drawn`: draw the wrong ones by similarity.
        """
        matcher, texts = self.matcher, batch.rows
        seen = batch.per_example(self.encode_batch(batch) if seen is None else seen)
        similarity = cosines(matcher.image_features(seen), matcher.text_features(texts))  # (rows, rows)
        right = positives(batch.examples, self.texts_of_image)
        if right.all():
            return 0 * similarity.sum()
        right = right.to(similarity.device)
        likely = similarity if drawn else torch.zeros_like(similarity)  # not drawn: the first wrong ones
        text, image = hard_negatives(likely, right, self.temperature, sampled=drawn and self.backbone.model.training)
        every = torch.arange(len(texts), device=text.device)
        images = torch.cat([every, every[text >= 0], image[image >= 0]])  # (pairs,), the right ones first
        odds = matcher.matching(seen[images], texts[torch.cat([every, text[text >= 0], every[image >= 0]])])
        labels = (torch.arange(len(odds), device=odds.device) < len(texts)).float()
        matching = F.binary_cross_entropy_with_logits(odds, labels)  # of two logits: the softmax's cross-entropy
        return itc_loss(similarity, right, self.temperature).sum() + len(texts) * matching

    def logits(self, batch: DeviceBatch) -> Tensor:
        """ITC's logits of all pairs, then ITM's log-odds of the right ones: (rows · rows + rows,)."""
        seen = batch.per_example(self.encode_batch(batch))
        similarity = cosines(self.matcher.image_features(seen), self.matcher.text_features(batch.rows))
        return torch.cat([(similarity / self.temperature).flatten(), self.matcher.matching(seen, batch.rows)])

    def wrong_labels(self, batch: DeviceBatch) -> str:
        return NO_NEGATIVES if positives(batch.examples, self.texts_of_image).all() else ""

    def label_table(self, batch: DeviceBatch, rows: int = 2) -> str:
        right = positives(batch.examples, self.texts_of_image)
        lines = ["what the model reads | images of this batch that it belongs to"]
        for row in range(min(rows, len(batch.examples))):
            kept = batch.rows.ids[row][batch.rows.mask[row] == 1].tolist()
            names = dict.fromkeys(batch.examples[i].name for i in right[:, row].nonzero().flatten().tolist())
            text = " ".join(self.backbone.tokenizer.convert_ids_to_tokens(kept))
            lines.append(printable(f"  {text}  |  {', '.join(names)}"))
        return "\n".join(lines)

    # ---- prediction

    def subject(self, example: Example) -> tuple[Path, str]:
        return example.image, example.text

    @torch.no_grad()
    def predict(
        self, pixel_values: Tensor, examples: list[Example], adapters: list[str | None] | None = None
    ) -> list[Features]:
        """Image and text in the joint space, on the CPU, for `scores`."""
        if adapters is not None:
            raise ConfigError("retrieval ranks with one adapter at a time: lora_blip.use_adapters(model, name)")
        return self.predict_from_features(self.encode_images(pixel_values), examples)

    @torch.no_grad()
    def predict_from_features(self, seen: Tensor, examples: list[Example]) -> list[Features]:
        texts = self.tokenize_checked([example.text for example in examples]).to(self.backbone.device)
        images = self.matcher.image_features(seen).cpu()
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
        """softmax of ITC's logits, the mass of the RERANKED likeliest given out anew by ITC and ITM together."""
        rows, features = texts if isinstance(texts, EncodedTexts) else self.encode_texts(texts)
        seen, device = self.matcher.encode_images(pixel_values), self.backbone.device
        logits = cosines(self.matcher.image_features(seen), features.to(device)) / self.temperature
        rows = rows.to(device)
        return torch.stack([self.reranked(row, states, rows) for row, states in zip(logits, seen, strict=True)])

    def reranked(self, logits: Tensor, states: Tensor, texts: TokenizedTexts) -> Tensor:
        """One image's ITC logits (texts,) → probabilities, after ITM has looked at the likeliest."""
        chances = logits.softmax(0)
        best = logits.topk(min(RERANKED, len(texts))).indices
        odds = self.matcher.matching(states.expand(len(best), *states.shape), texts[best])
        return chances.index_copy(0, best, chances[best].sum() * (logits[best] + odds).softmax(0))

    @torch.no_grad()
    def match(self, pixel_values: Tensor, texts: list[list[str]]) -> list[Any]:
        """ITM's log-odds of some texts of each image: a float32 array an image."""
        found = []
        for states, mine in zip(self.matcher.encode_images(pixel_values), texts, strict=True):
            rows = self.tokenize_checked(mine).to(self.backbone.device)
            parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
            odds = [self.matcher.matching(states.expand(len(part), *states.shape), part) for part in parts]
            found.append(torch.cat(odds).cpu().numpy())
        return found

    def scores(self, predictions: dict[Any, Any], examples: list[Example], wanted: str = "") -> dict[str, float]:
        """Recall at 1 by ITC among all the images and texts given, each way and their mean; at 5 or 10 if wanted."""
        images = list(dict.fromkeys(example.image for example in examples))
        some = {example.image: self.subject(example) for example in examples}  # a subject of each image
        texts = list(dict.fromkeys(example.text for example in examples))
        read = {example.text: self.subject(example) for example in examples}
        similarity = cosines(
            torch.stack([predictions[some[image]].image for image in images]),
            torch.stack([predictions[read[text]].text for text in texts]),
        )
        found = recalls(similarity.float().cpu().numpy(), belongs(examples, images, texts))
        ways = {key: found[key] for key in dict.fromkeys(("image_to_text_r1", "text_to_image_r1", wanted)) if key in found}
        return {"recall_at_1": (found["image_to_text_r1"] + found["text_to_image_r1"]) / 2, **ways}

    # ---- what an adapter file says of its task

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name, "prompt": "", "generation": asdict(self.generation), "temperature": self.temperature.item(),
        }  # fmt: skip

    def load_metadata(self, metadata: dict[str, Any]) -> None:
        temperature = metadata.get("temperature", TEMPERATURE)
        if isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0:
            self.log_temperature.data.fill_(math.log(temperature))


NO_NEGATIVES = (
    "the first batch holds no wrong pair to learn from: its rows are all one image or one text; raise batch_size, "
    "or give data with more than one image"
)


def positives(examples: list[Example], known: Mapping[str, Collection[str]] = MappingProxyType({})) -> Tensor:
    """(rows, rows) bool: text j describes image i, as some line here says it does, or `known`, of all the data."""
    said: dict[str, set[str]] = {}
    for example in examples:
        said.setdefault(example.file, set(known.get(example.file, ()))).add(example.text)
    return torch.tensor([[other.text in own for other in examples] for own in (said[one.file] for one in examples)])


def belongs(examples: list[Example], images: list[Path], texts: list[str]) -> Any:
    """(images, texts) booleans: which texts are an image's own."""
    rows, columns = ({item: number for number, item in enumerate(items)} for items in (images, texts))
    right = np.zeros((len(images), len(texts)), dtype=np.bool_)
    for example in examples:
        right[rows[example.image], columns[example.text]] = True
    return right
