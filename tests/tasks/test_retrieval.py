"""Retrieval features and heads equal those of transformers; losses, negatives and ranks equal their definitions."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch, HostBatch
from lora_blip.errors import ConfigError, PreflightError
from lora_blip.inference.captioner import Captioner
from lora_blip.inference.setup import apply_adapter, task_of
from lora_blip.lora import adapter_file, attached, injection, merging
from lora_blip.models import matching
from lora_blip.models.matching import cosines
from lora_blip.models.precision import autocasting
from lora_blip.tasks import retrieval
from lora_blip.tasks.losses import hard_negatives, itc_loss
from lora_blip.tasks.retrieval import TEMPERATURE, RetrievalTask, positives
from lora_blip.training import preflight, setup
from lora_blip.training.loop import train
from tests.support import tiny
from tests.support.models import WHOLE, every_target, inject
from tests.support.runs import settings

KINDS = ("itm", "itm2")
LINES = [  # two captions of one picture, and one caption of two pictures
    ("0.png", "a red cube"), ("0.png", "a single red cube on top of the table"), ("1.png", "nothing"),
    ("2.png", "a red cube"), ("3.png", "two blue cubes"), ("3.png", "cubes"),
]  # fmt: skip


@pytest.fixture(params=KINDS)
def task(request, make) -> RetrievalTask:
    return RetrievalTask(make(request.param))


def examples(lines=None) -> list[Example]:
    return [Example(Path(image), text, image, n + 1) for n, (image, text) in enumerate(lines or LINES)]


def pictures(some: list[Example], dtype=torch.float32) -> torch.Tensor:
    """Return one tensor (3, H, W) for each example. Examples of the same image have the same pixels."""
    generators = {e.image: torch.Generator().manual_seed(int(e.image.stem)) for e in some}
    drawn = {image: torch.randn(3, tiny.SIDE, tiny.SIDE, generator=generator) for image, generator in generators.items()}
    return torch.stack([drawn[e.image] for e in some]).to(dtype)


def batch_of(task: RetrievalTask, lines=None, dtype=torch.float32) -> DeviceBatch:
    some = examples(lines)
    return task.batch(HostBatch(some, pictures(some, dtype)))


@torch.no_grad()
def hugging_face(task: RetrievalTask, image: torch.Tensor, text: str, itm: bool) -> torch.Tensor:
    """Return transformers' score of one image (3, H, W) and one unpadded text: the cosine, or the two logits of ITM."""
    model = task.backbone.model
    ids = task.backbone.tokenizer(text, return_tensors="pt").input_ids
    if task.backbone.family == "blip":
        return model(ids, image[None], use_itm_head=itm, attention_mask=torch.ones_like(ids)).itm_score[0]
    if model.config.image_token_index is not None:  # its processor puts placeholders first, and forward cuts them off
        queries = torch.full((1, model.config.num_query_tokens), model.config.image_token_index)
        ids = torch.cat([queries, ids], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_image_text_matching_head": itm}
    return model(image[None], **inputs).logits_per_image[0]


# ---------------------------------------------------------------- features and heads


@pytest.mark.parametrize("placeholder", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_and_matching_are_hugging_face_s(task, dtype, placeholder):
    """Cosines and ITM odds of a padded batch equal those of transformers for each pair of image and text alone."""
    if task.backbone.family == "blip-2":
        task.backbone.model.config.image_token_index = placeholder
    task.backbone.model.to(dtype)
    batch = batch_of(task, dtype=dtype)
    matcher, states = task.matcher, task.matcher.encode_images(batch.pixel_values)
    assert (batch.rows.mask == 0).any()
    similarity = cosines(matcher.image_features(states), matcher.text_features(batch.rows))
    for i in range(len(states)):
        odds = matcher.matching(states[i].expand(len(states), *states[i].shape), batch.rows)
        for j, example in enumerate(batch.examples):
            cosine = hugging_face(task, batch.pixel_values[i], example.text, itm=False)
            two = hugging_face(task, batch.pixel_values[i], example.text, itm=True)
            assert float(similarity[i, j]) == pytest.approx(float(cosine), abs=2e-6)
            assert float(odds[j]) == pytest.approx(float(two[1] - two[0]), abs=1e-5)
            assert float(odds[j].sigmoid()) == pytest.approx(float(two.softmax(0)[1]), abs=1e-5)


def test_token_ids_in_the_padding_change_no_logits(task):
    batch = batch_of(task)
    other = replace(batch.rows, ids=batch.rows.ids.masked_fill(batch.rows.mask == 0, 77))
    logits = task.logits(batch)
    torch.testing.assert_close(task.logits(replace(batch, rows=other)), logits, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- losses by definition


def by_definition(similarity: list[list[float]], right: list[list[bool]], temperature: float) -> list[float]:
    """Return the mean of the image-to-text and text-to-image cross-entropies of each row, computed with loops."""
    rows = range(len(similarity))
    losses = []
    for i in rows:
        both = 0.0
        for scores, positive in (
            ([similarity[i][j] / temperature for j in rows], right[i]),
            ([similarity[j][i] / temperature for j in rows], [right[j][i] for j in rows]),
        ):
            total = math.log(sum(math.exp(score) for score in scores))
            both -= sum((score - total) / sum(positive) for score, yes in zip(scores, positive, strict=True) if yes)
        losses.append(both / 2)
    return losses


def test_itc_is_symmetric_cross_entropy_with_shared_positives():
    """Captions that share an image, and images that share a caption, divide the target of the ITC loss."""
    right = positives(examples())
    similarity = torch.rand(len(right), len(right), generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = by_definition(similarity.double().tolist(), right.tolist(), 0.3)
    assert itc_loss(similarity, right, 0.3).tolist() == pytest.approx(expected, rel=1e-5)
    assert itc_loss(similarity.T, right.T, 0.3).tolist() == pytest.approx(expected, rel=1e-5)


def test_positives_are_the_pairs_of_all_lines():
    """An image and a text are a positive pair if any line of the data has both."""
    right = positives(examples())
    lines = set(LINES)
    expected = [[(image, text) in lines for _, text in LINES] for image, _ in LINES]
    assert right.tolist() == expected and right.diagonal().all()
    assert right[1, 3] and right[0, 3] and not right[3, 1]  # picture 2 is not said to be "a single red cube on …"


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_itc_and_itm_by_definition(task, training):
    """The loss is ITC plus ITM. ITM is the mean of −log p of the right class over positive pairs and drawn negatives."""
    task.backbone.model.train(training)
    batch = batch_of(task)
    n, right, matcher = len(batch.examples), positives(batch.examples), task.matcher
    states = matcher.encode_images(batch.pixel_values)
    similarity = cosines(matcher.image_features(states), matcher.text_features(batch.rows))
    torch.manual_seed(5)
    text, image = hard_negatives(similarity, right, task.temperature, sampled=training)
    torch.manual_seed(5)
    loss = float(task.loss(batch).detach())
    terms = []
    pairs = [(i, i, 1) for i in range(n)] + [(i, int(text[i]), 0) for i in range(n)] + [(int(image[j]), j, 0) for j in range(n)]
    for i, j, label in pairs:
        two = hugging_face(task, batch.pixel_values[i], batch.examples[j].text, itm=True).double()
        terms.append(-float(two.log_softmax(0)[label]))
    expected = sum(by_definition(similarity.double().tolist(), right.tolist(), TEMPERATURE)) + n * sum(terms) / len(terms)
    assert len(terms) == 3 * n and loss == pytest.approx(expected, rel=1e-5) and batch.count == n


def test_the_temperature_gets_autograd_s_gradient_in_float64(task):
    batch = batch_of(task)
    task.backbone.model.eval()
    task.loss(batch).backward()
    states = task.matcher.encode_images(batch.pixel_values)
    similarity = cosines(task.matcher.image_features(states), task.matcher.text_features(batch.rows)).double().detach()
    log = torch.tensor(math.log(TEMPERATURE), dtype=torch.float64, requires_grad=True)
    targets_ = positives(batch.examples).double()
    for logits, y in ((similarity / log.exp(), targets_), (similarity.T / log.exp(), targets_.T)):
        (-(y / y.sum(1, keepdim=True) * logits.log_softmax(1)).sum() / 2).backward()
    assert float(task.log_temperature.grad) == pytest.approx(float(log.grad), rel=1e-4)


# ---------------------------------------------------------------- negatives


def test_no_negative_is_a_positive_and_rows_without_one_have_minus_one():
    right = positives(examples([*LINES, ("0.png", "cubes"), ("1.png", "a red cube")]))
    for seed in range(50):
        torch.manual_seed(seed)
        similarity = torch.rand(len(right), len(right)) * 2 - 1
        for sampled in (True, False):
            text, image = hard_negatives(similarity, right, 0.01, sampled)
            for row in range(len(right)):
                assert text[row] >= 0 and not right[row, text[row]]
                assert image[row] >= 0 and not right[image[row], row]
    everything = torch.tensor([[True, True], [True, False]])
    text, image = hard_negatives(torch.zeros(2, 2), everything, 0.07)
    assert text.tolist() == [-1, 1] and image.tolist() == [-1, 1]


def test_negatives_are_drawn_as_often_as_their_softmax():
    """The shares of 20,000 drawn negatives are within five standard deviations of softmax(similarity / temperature)."""
    draws, wrong = 20_000, torch.tensor([0.1, 0.5, 0.3])
    similarity = torch.cat([torch.tensor([0.9]), wrong]).expand(draws, 4)
    right = torch.tensor([True, False, False, False]).expand(draws, 4)
    drawn, _ = hard_negatives(similarity, right, 0.2)
    for text, chance in enumerate((wrong.double() / 0.2).softmax(0).tolist(), 1):
        share = float((drawn == text).double().mean())
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / draws)
    assert not (drawn == 0).any()


def test_the_likeliest_negatives_are_the_same_at_every_call():
    similarity = torch.rand(6, 6, generator=torch.Generator().manual_seed(2))
    right = torch.eye(6, dtype=torch.bool)
    text, image = hard_negatives(similarity, right, 0.07, sampled=False)
    wrong = similarity.masked_fill(right, -1)
    assert text.tolist() == wrong.argmax(1).tolist() and image.tolist() == wrong.argmax(0).tolist()


def test_scores_that_are_not_finite_still_give_negatives():
    """Drawing negatives from NaN or inf scores does not fail. Training then reports that the loss is not finite."""
    right = torch.eye(3, dtype=torch.bool)
    for value in (math.nan, math.inf):
        text, _ = hard_negatives(torch.full((3, 3), value), right, 0.07)
        assert all(t >= 0 and t != row for row, t in enumerate(text.tolist()))


def test_a_batch_of_one_image_is_refused_with_a_remedy(task):
    inject(task.backbone, trained=False)
    for lines in ([("0.png", "a red cube")], [("0.png", "a red cube"), ("0.png", "cubes")], [("0.png", "x"), ("1.png", "x")]):
        with pytest.raises(PreflightError, match=r"no wrong pair.*raise BATCH_SIZE"):
            preflight.check(task, batch_of(task, lines), nullcontext)


def test_a_micro_batch_of_one_image_has_no_loss(task):
    """A micro-batch of one image has no negatives, so its loss and gradients are 0."""
    inject(task.backbone)
    loss = task.loss(batch_of(task, LINES[:2]))
    loss.backward()
    adapters = attached.adapters(task.backbone.model)
    assert loss == 0 and not any(x.B.grad is not None and x.B.grad.any() for x in adapters.values())


def test_a_row_without_a_negative_of_its_own_learns_from_the_others(task):
    """A row without a wrong text is left out of the negatives. The loss of the batch is finite."""
    batch = batch_of(task, [("0.png", "a red cube"), ("0.png", "nothing"), ("1.png", "nothing")])
    right = positives(batch.examples)
    text, image = hard_negatives(torch.zeros(3, 3), right, 0.07)
    assert text.tolist() == [-1, -1, 0] and image.tolist() == [2, -1, -1]
    assert torch.isfinite(task.loss(batch)) and task.wrong_labels(batch) == ""


# ---------------------------------------------------------------- scores and ranks


def features(task: RetrievalTask, some: list[Example]) -> dict:
    return dict(zip(map(task.subject, some), task.predict(pictures(some), some), strict=True))


def test_recall_at_1_is_that_of_brute_force(task):
    """Recall@1 in both directions equals a search over all pairs, with shared captions and images of two captions."""
    some = examples()
    predictions = features(task, some)
    images, texts = list(dict.fromkeys(e.image for e in some)), list(dict.fromkeys(e.text for e in some))
    lines = {(e.image, e.text) for e in some}
    pixels = {image: pictures([e for e in some if e.image == image][:1])[0] for image in images}
    table = {(i, t): float(hugging_face(task, pixels[i], t, itm=False)) for i in images for t in texts}
    to_text = [(i, max(texts, key=lambda t: table[i, t])) in lines for i in images]
    to_image = [(max(images, key=lambda i: table[i, t]), t) in lines for t in texts]
    scores = task.scores(predictions, some)
    assert scores["image_to_text_r1"] == pytest.approx(sum(to_text) / len(images))
    assert scores["text_to_image_r1"] == pytest.approx(sum(to_image) / len(texts))
    assert scores["recall_at_1"] == pytest.approx((sum(to_text) / len(images) + sum(to_image) / len(texts)) / 2)
    assert "image_to_text_r5" in task.scores(predictions, some, "image_to_text_r5")


def test_equal_captions_of_different_images_are_right_for_both(task):
    """A caption that two images share counts as correct for both images."""
    some = examples([("0.png", "a red cube"), ("1.png", "a red cube")])
    assert task.scores(features(task, some), some)["recall_at_1"] == 1


def test_ranking_few_texts_is_itc_and_itm_of_each_pair(task):
    """The ranking of a few texts is softmax(cosine / temperature + ITM log-odds), computed by transformers for each pair."""
    some, texts = examples()[:3], list(dict.fromkeys(text for _, text in LINES))
    images = pictures(some)
    rankings = task.rank(images, some, texts)
    for row, image in zip(rankings, images, strict=True):
        scores = []
        for text in texts:
            two = hugging_face(task, image, text, itm=True).double()
            scores.append(float(hugging_face(task, image, text, itm=False).double() / TEMPERATURE + two[1] - two[0]))
        torch.testing.assert_close(row.double(), torch.tensor(scores, dtype=torch.float64).softmax(0), rtol=1e-3, atol=1e-6)


MANY = [f"{colour} cube number {n}" for colour in ("red", "blue") for n in range(10)]


def test_texts_beyond_the_reranked_keep_the_order_and_mass_of_the_contrast(task, monkeypatch):
    some = examples()[:2]
    images = pictures(some)
    states, rows = task.matcher.encode_images(images), task.matcher.tokenize(MANY)
    itc = cosines(task.matcher.image_features(states), task.matcher.text_features(rows)) / task.temperature
    monkeypatch.setattr(retrieval, "RERANKED", 6)
    rankings = task.rank(images, some, MANY)
    torch.testing.assert_close(rankings.sum(1), torch.ones(2))
    for n, (row, logits) in enumerate(zip(rankings, itc, strict=True)):
        top = logits.topk(6).indices
        rest = [j for j in range(len(MANY)) if j not in top.tolist()]
        torch.testing.assert_close(row[rest], logits.softmax(0)[rest])
        torch.testing.assert_close(row[top].sum(), logits.softmax(0)[top].sum())
        odds = task.matcher.matching(states[n].expand(6, *states[n].shape), rows[top])
        assert row[top].argsort().tolist() == (logits[top] + odds).argsort().tolist()


def test_chunks_change_nothing(task, monkeypatch):
    some = examples()[:2]
    images = pictures(some)
    whole, odds = task.rank(images, some, MANY), task.match(images, [MANY, MANY[:7]])
    monkeypatch.setattr(retrieval, "CHUNK", 3)
    torch.testing.assert_close(task.rank(images, some, MANY), whole, rtol=1e-4, atol=1e-6)
    for a, b in zip(task.match(images, [MANY, MANY[:7]]), odds, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-4, atol=1e-5)


def test_texts_encoded_beforehand_rank_the_same(task):
    """Texts that `encode_texts` encoded give the same ranking as texts that `rank` encodes."""
    texts = [f"a {colour} cube" for colour in ("red", "green", "blue")]
    some = examples()
    read = task.encode_texts(texts)
    assert torch.equal(task.rank(pictures(some), some, read), task.rank(pictures(some), some, texts))


def test_matching_is_hugging_face_s_for_texts_of_each_image(task):
    some = examples()[:2]
    images, texts = pictures(some), [["a red cube", "nothing"], ["two blue cubes on top of a table"]]
    for image, own_texts, odds in zip(images, texts, task.match(images, texts), strict=True):
        two = [hugging_face(task, image, text, itm=True) for text in own_texts]
        assert odds.tolist() == pytest.approx([float(t[1] - t[0]) for t in two], abs=1e-5)


# ---------------------------------------------------------------- what is refused


def test_bad_lines_are_one_clear_reason_with_file_and_line(task, tmp_path):
    tiny.write_photos(tmp_path, 1)
    bad = [
        ({"text": "a [SEP] cube"}, "special token"), ({"text": "a red cube " * 40}, "room for"),
        ({"text": "雪"}, "has only tokens"), ({"question": "what?", "answers": ["a cube"]}, "--model Salesforce/blip-vqa-base"),
    ]  # fmt: skip
    lines = [{"text": "a cube"}, *(line for line, _ in bad)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"image": "photos/0.png", **line}) for line in lines))
    examples_read, problems = annotations.read(path, on_bad_data="skip", check=task.check)
    assert len(examples_read) == 1 and [p.line for p in problems] == [2, 3, 4, 5]
    for problem, (_, reason) in zip(problems, bad, strict=True):
        assert reason in str(problem) and str(problem).startswith(f"{path}:") and "\n" not in str(problem)


@pytest.mark.parametrize("text", ["a [SEP] cube", "<image> a cube", " ".join(["cube"] * 600)])
def test_a_text_that_cannot_be_matched_is_one_error_from_python_too(task, text):
    """A text with a special token or too many tokens raises ConfigError in every method that takes texts."""
    task.backbone.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    task.checker.special.add(task.backbone.tokenizer.convert_tokens_to_ids("<image>"))
    pixels = torch.randn(1, 3, tiny.SIDE, tiny.SIDE)
    calls = (
        lambda: task.encode_texts(["a cube", text]), lambda: task.rank(pixels, [], ["a cube", text]),
        lambda: task.match(pixels, [["a cube", text]]), lambda: task.predict(pixels, examples([("0.png", text)])),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ConfigError, match="cannot be matched with an image"):
            call()


def test_a_text_as_long_as_the_room_can_be_read(task):
    tokenizer, room = task.backbone.tokenizer, task.matcher.max_tokens - 2
    text = " ".join(["a"] * room)
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == room and task.check_text(text) == ""
    assert torch.isfinite(task.logits(batch_of(task, [("0.png", text), ("1.png", "a")]))).all()
    assert "room for" in task.check_text(f"{text} a")


def test_a_prompt_is_refused(make):
    with pytest.raises(ConfigError, match="retrieval has no prompt"):
        RetrievalTask(make("itm"), "a photo of")


# ---------------------------------------------------------------- training


def photos(folder: Path) -> Path:
    """Write eight images with two lines each. Return the annotation file."""
    path = tiny.write_photos(folder, 8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    more = [{**line, "text": f"{line['text']}, number {n}"} for n, line in enumerate(lines)]
    path.write_text("\n".join(map(json.dumps, [*lines, *more])) + "\n")
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_moves_every_b_and_the_temperature_and_nothing_else(checkpoints, make, tmp_path, kind, precision, monkeypatch):
    """Law 2, in each precision: training changes the adapters and the temperature only.

    Inference loads the saved temperature.
    """
    opened = {}
    real = setup.open_backbone
    monkeypatch.setattr(setup, "open_backbone", lambda *a, **k: opened.setdefault("opened", real(*a, **k)))
    path = train(settings(checkpoints[kind], photos(tmp_path), targets=WHOLE[kind], precision=precision, epochs=1))
    dtype = precision if kind == "itm2" else "fp32"
    fresh = make(kind, dtype=dtype).model.state_dict()
    after = {key: value for key, value in opened["opened"][0].model.state_dict().items() if ".lora." not in key}
    assert list(after) == list(fresh) and all(torch.equal(after[key], fresh[key].to(after[key].dtype)) for key in fresh)
    saved = adapter_file.read(path)
    assert all(saved.tensors[key].any() for key in saved.tensors)
    temperature = saved.task["temperature"]
    assert temperature != pytest.approx(TEMPERATURE, rel=1e-3) and 0.01 < temperature < 0.5
    drift = saved.metadata["merge_drift"]
    bound = {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.02}[precision]
    assert drift["largest_difference"] < bound * drift["largest_logit"]

    backbone = make(kind)
    for merge in (False, True):
        task = task_of(backbone, saved)
        assert task.temperature.item() == pytest.approx(TEMPERATURE)  # the base has its own
        apply_adapter(task, saved, merge)
        assert task.temperature.item() == pytest.approx(temperature, rel=1e-6)
        assert merge or task_of(backbone, saved).temperature.item() == pytest.approx(temperature, rel=1e-6)
        if not merge:
            injection.eject(backbone.model)
    captioner = Captioner.from_adapter(path, base=make(kind))  # its adapter has another name than "default"
    assert captioner.runner.task.temperature.item() == pytest.approx(temperature, rel=1e-6)


def test_no_weight_decay_pulls_at_the_temperature(checkpoints, tmp_path, monkeypatch):
    groups = []
    real = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **k: (groups.extend(parameters), real(parameters, **k))[1])
    train(settings(checkpoints["itm"], photos(tmp_path), targets="vit.q", max_steps=1, weight_decay=0.3, val_fraction=0.0))
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert sorted(set(decay.values())) == [0.0, 0.3] and list(decay.values()).count(0.0) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_merged_is_hooked(make, kind, precision):
    """Law 5: merged logits equal hooked logits within 1e-5 in float32, and within a few last bits in 16 bits."""
    task = RetrievalTask(make(kind, dtype=precision if kind == "itm2" else "fp32"))
    inject(task.backbone)
    batch = batch_of(task)
    with autocasting(task.backbone.device, precision)(), torch.no_grad():
        hooked = task.logits(batch)
        merging.merge(task.backbone.model)
        merged = task.logits(batch)
    assert hooked.dtype == torch.float32
    bits = {"fp32": 1e-5, "bf16": 0.1, "fp16": 0.02}[precision]
    assert float((hooked - merged).abs().max()) < bits * float(hooked.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_ranks_and_predicts_in_float32(make, kind, precision):
    """Under autocast, rankings sum to 1, features are float32 unit vectors, and cosines are near those of float32."""
    exact, half = RetrievalTask(make(kind)), RetrievalTask(make(kind, dtype=precision if kind == "itm2" else "fp32"))
    some = examples()
    images, texts = pictures(some), [text for _, text in LINES]
    with autocasting(half.backbone.device, precision)():
        rankings, predictions = half.rank(images, some, texts), half.predict(images, some)
        again = half.match(images, [texts] * len(some))
        near = cosines(torch.stack([f.image for f in predictions]), torch.stack([f.text for f in predictions]))
    assert rankings.dtype == near.dtype == torch.float32 and again[0].dtype == "float32"
    torch.testing.assert_close(rankings.sum(1), torch.ones(len(some)), rtol=1e-5, atol=1e-5)
    assert all(f.image.dtype == f.text.dtype == torch.float32 for f in predictions)
    assert all(float(f.text.norm()) == pytest.approx(1, abs=1e-5) for f in predictions)
    sure = exact.predict(images, some)
    far = cosines(torch.stack([f.image for f in sure]), torch.stack([f.text for f in sure]))
    torch.testing.assert_close(near, far, rtol=0, atol=0.05 if precision == "bf16" else 0.01)


def test_cosines_are_of_the_best_view_and_keep_float32_under_autocast(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", 2)  # of three images
    images, texts = torch.randn(3, 2, 16), torch.randn(4, 16)
    expected = torch.stack(
        [torch.stack([max(view @ text for view in views) for text in texts.double()]) for views in images.double()]
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            similarity = cosines(images, texts)
        torch.testing.assert_close(similarity, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_preflight_passes_with_every_target_of_the_architecture(make, kind):
    """Adapters on every target pass the preflight check, because one of the two heads reaches each linear."""
    for what in every_target(make(kind).model, kind):
        task = RetrievalTask(make(kind))
        inject(task.backbone, what, trained=False)
        assert "images of this batch" in preflight.check(task, batch_of(task), nullcontext)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(make, kind):
    gradients = []
    for frugal in (False, True):
        task = RetrievalTask(make(kind, checkpointing=frugal))
        adapters = inject(task.backbone)
        task.backbone.model.train()
        torch.manual_seed(0)
        task.loss(batch_of(task)).backward()
        gradients.append([x.B.grad for x in adapters.values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_positive_of_another_batch_is_no_negative(task):
    """A pair of the data that is split over two batches is not used as a negative in either batch."""
    a, b = Path("folder/a.png"), Path("folder/b.png")
    lines = [(a, "a red cube"), (Path("folder/../folder/a.png"), "a cube"), (b, "a red cube")]
    some = [Example(image, text, image.name, n) for n, (image, text) in enumerate(lines)]
    assert positives(some[1:]).tolist() == [[True, False], [False, True]]
    task.prepare_data(some)
    assert positives(some[1:], task.texts_of_image).tolist() == [[True, True], [False, True]]


def test_a_batch_without_a_wrong_pair_weighs_nothing(task):
    alone = batch_of(task, [("1.png", "a red cube")])
    assert alone.count == 0 and float(task.loss(alone)) == 0
