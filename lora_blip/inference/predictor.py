"""Predict a batch of images: one text for each image, or a ranking of given texts."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_blip.data.example import Example
from lora_blip.inference.prediction import Prediction, generated, prediction_of
from lora_blip.inference.shared_base import SharedBase
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.tasks import verification
from lora_blip.tasks.base import PredictionTask


class Predictor:
    """Predict one text for each image, or rank the given texts. Encode the texts once per device."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.encoded: Any = None  # the encoded texts
        self.device: Any = None  # the device of `encoded`

    def for_check(self) -> "Predictor":
        """Return a predictor with only the first texts, for the check that compares the fast path with the plain one."""
        return Predictor(self.texts[: verification.TEXTS])

    def __call__(self, task: PredictionTask, pictures: Tensor, examples: list[Example]) -> list[Prediction]:
        """Return one prediction per image. pictures has the shape (images, 3, H, W)."""
        if not self.texts:
            if task.generation.texts > 1:
                return self._scored(task, pictures, examples)
            texts = task.predict(pictures, examples)
            return [prediction_of(e, text) for e, text in zip(examples, texts, strict=True)]
        if self.device != task.backbone.device:
            self.encoded, self.device = task.encode_texts(self.texts), task.backbone.device
        rankings = [self._ranking(row) for row in task.rank(pictures, examples, self.encoded).cpu().tolist()]
        return [prediction_of(e, order[0][0], order) for e, order in zip(examples, rankings, strict=True)]

    def _scored(self, task: PredictionTask, pictures: Tensor, examples: list[Example]) -> list[Prediction]:
        """Return one prediction per image, with its score and its other texts."""
        return [generated(e, texts) for e, texts in zip(examples, task.predict_scored(pictures, examples), strict=True)]

    def _ranking(self, row: list[float]) -> list[tuple[str, float]]:
        """Return (text, probability) for each text, the most probable first. row: the probability of each text."""
        return sorted(zip(self.texts, row, strict=True), key=lambda pair: -pair[1])


class AdapterPredictor(Predictor):
    """Predict with one adapter of a shared base, and compute the score of each prediction.

    by_group: use the adapter of the caller whose name is the `group` of the example, or the base if it is "".
    """

    def __init__(self, texts: list[str], base: SharedBase, adapter: str | None, by_group: bool = False) -> None:
        super().__init__(texts)
        self.base, self.adapter, self.by_group = base, adapter, by_group

    def for_check(self) -> "AdapterPredictor":
        return AdapterPredictor(self.texts[: verification.TEXTS], self.base, self.adapter, self.by_group)

    def __call__(self, task: PredictionTask, pictures: Tensor, examples: list[Example]) -> list[Prediction]:
        if self.by_group:
            return self._predict_groups(task, pictures, examples)
        if self.adapter is None:  # the caller may have chosen other adapters since the last batch
            self.device = None
        # A block that is entered with gradients on sets `routing.recorded`. A training of the caller with activation
        # checkpointing would then need `checkpoint_context`.
        with torch.no_grad(), self.base.active(task.backbone.model, self.adapter):
            if self.texts:
                return [replace(p, score=p.ranking[0][1]) for p in super().__call__(task, pictures, examples)]
            return self._scored(task, pictures, examples)

    def _predict_groups(self, task: PredictionTask, pictures: Tensor, examples: list[Example]) -> list[Prediction]:
        """Return one prediction per image. Each adapter predicts its images in a batch of their own."""
        model, results = task.backbone.model, dict[int, Prediction]()
        for name in dict.fromkeys(example.group for example in examples):
            rows = [row for row, example in enumerate(examples) if example.group == name]
            predict = AdapterPredictor(self.texts, self.base, None)  # each adapter encodes the texts
            with torch.no_grad(), use_adapters(model, name) if name else disable_adapters(model):
                results |= zip(rows, predict(task, pictures[rows], [examples[row] for row in rows]), strict=True)
        return [results[row] for row in range(len(examples))]
