"""Texts ranked by what a model that writes makes of them: softmax of log-likelihoods, one law for every kind."""

from collections.abc import Callable

import pytest
import torch

from lora_blip.data.example import Example
from lora_blip.models.precision import autocasting
from lora_blip.tasks import text_task
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.text_task import TextTask, token_log_likelihoods
from lora_blip.tasks.vqa import VqaTask
from tests.support.models import inject
from tests.support.questions import examples, hugging_face, ids_of, pictures

CASES = [("blip", CaptionTask), ("opt", CaptionTask), ("t5", CaptionTask)]
CASES += [(kind, VqaTask) for kind in ("vqa", "blip", "opt", "t5")]
TEXTS = ["red", "a single blue cube on top of the table", "nothing", "two cubes", "a red cube", "no", "yes"]
PROMPT = "a picture of"


@pytest.fixture(params=CASES, ids=[f"{kind}-{task.name}" for kind, task in CASES])
def task(request, make: Callable) -> TextTask:
    kind, task = request.param
    text_task = task(make(kind), PROMPT if task is CaptionTask else "")
    inject(text_task.backbone)
    return text_task


@torch.no_grad()
def log_likelihoods(task: TextTask, image: torch.Tensor, example: Example, text: str) -> torch.Tensor:
    """log p of each token of a text and of its end, float64, from the whole model on that one row."""
    if isinstance(task, VqaTask):
        logits, ids = hugging_face(task, image, example.question, text)
    else:
        logits, ids = caption_logits(task, image, text)
    return logits[: len(ids)].double().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def caption_logits(task: TextTask, image: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    model, config = task.backbone.model, task.backbone.model.config.text_config
    prompt = ids_of(task, PROMPT)
    if task.backbone.family == "blip":
        start, ids, end = [config.bos_token_id, *prompt], ids_of(task, text), task.backbone.tokenizer.sep_token_id
    else:
        queries = [model.config.image_token_index] * model.config.num_query_tokens
        if not model.config.use_decoder_only_language_model:
            ids, end = ids_of(task, text), config.eos_token_id
            read, written = torch.tensor([[*queries, *prompt, end]]), torch.tensor([[config.pad_token_id, *ids]])
            logits = model(pixel_values=image[None], input_ids=read, decoder_input_ids=written).logits[0]
            return logits, torch.tensor([*ids, end])
        start, ids, end = [*queries, config.bos_token_id, *prompt], ids_of(task, f" {text}"), config.eos_token_id
    row = torch.tensor([[*start, *ids]])
    logits = model(pixel_values=image[None], input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
    return logits[len(start) - 1 :], torch.tensor([*ids, end])


def test_probabilities_are_the_softmax_of_likelihoods_in_float64(task):
    """Of the mean over a caption's tokens, of the sum over an answer's; text by text, unpadded, by Hugging Face."""
    task.backbone.model.double()
    some, images = examples()[:3], pictures(3).double()
    rankings = task.rank(images, some, TEXTS)
    for row, image, example in zip(rankings, images, some, strict=True):
        each = [log_likelihoods(task, image, example, text) for text in TEXTS]
        scores = torch.stack([x.sum() if isinstance(task, VqaTask) else x.mean() for x in each])
        torch.testing.assert_close(row.double(), scores.softmax(0), rtol=1e-4, atol=1e-7)


def test_chunks_and_their_padding_change_nothing(task, monkeypatch):
    """Ragged texts in one chunk, in chunks of three and one by one: the same distribution, every row of which sums to 1."""
    some, images = examples(), pictures(4)
    whole = task.rank(images, some, TEXTS)
    torch.testing.assert_close(whole.sum(1), torch.ones(4))
    for size in (3, 1):
        monkeypatch.setattr(text_task, "CHUNK", size)
        torch.testing.assert_close(task.rank(images, some, TEXTS), whole, rtol=1e-4, atol=1e-6)


def test_images_are_ranked_in_a_batch_as_alone(task):
    some, images = examples(), pictures(4)
    together = task.rank(images, some, TEXTS)
    for n in range(4):
        torch.testing.assert_close(task.rank(images[n : n + 1], some[n : n + 1], TEXTS)[0], together[n], rtol=1e-4, atol=1e-6)


def test_ranking_under_autocast_is_a_distribution_in_float32(task):
    exact, images = task.rank(pictures(2), examples()[:2], TEXTS), pictures(2)
    for precision in ("bf16", "fp16"):
        with autocasting(task.backbone.device, precision)():
            rankings = task.rank(images, examples()[:2], TEXTS)
        assert rankings.dtype == torch.float32
        torch.testing.assert_close(rankings.sum(1), torch.ones(2), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rankings, exact, rtol=0.3, atol=0.05)


def test_likelihoods_are_nan_where_nothing_counts():
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, 2, -100], [-100, -100, 4]])
    likelihoods = token_log_likelihoods(logits, targets)
    assert torch.equal(likelihoods.isnan(), targets == -100)
    assert float(likelihoods[1, 2]) == pytest.approx(float(logits[1, 2].double().log_softmax(-1)[4]), rel=1e-5)
