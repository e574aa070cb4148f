"""Question answering learns only the answers, weighted by votes. Logits and answers equal those of transformers."""

import copy
import json
import pickle
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.loader import DeviceBatch
from lora_blip.errors import ConfigError, DataError
from lora_blip.inference.setup import task_of
from lora_blip.lora import adapter_file, merging
from lora_blip.lora.routing import disable_adapters, use_adapters
from lora_blip.models.packing import PackedRows
from lora_blip.models.token_rows import IGNORE
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.registry import default_task
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.tasks.text_task import HEADING
from lora_blip.tasks.vqa import TEMPLATE, VqaTask
from lora_blip.training import loop, preflight, setup
from tests.support import tiny
from tests.support.models import WHOLE, every_target, inject
from tests.support.questions import ASKED, batch_of, examples, hugging_face, pictures
from tests.support.runs import one_step, settings

KINDS = ("vqa", "blip", "opt", "t5")


@pytest.fixture(params=KINDS)
def task(request, make) -> VqaTask:
    return VqaTask(make(request.param))


def answered(some: list[Example]) -> list[tuple[int, str]]:
    """Return (example, answer) for each distinct answer of each example, in order."""
    return [(n, answer) for n, e in enumerate(some) for answer in dict.fromkeys(e.answers)]


# ---------------------------------------------------------------- labels, logits, loss


def test_labels_are_the_answers_and_their_ends_and_nothing_else(task):
    """Law 8: the labels are the answers and their end tokens. Each distinct answer is a row."""
    batch = batch_of(task)
    pairs = answered(batch.examples)
    assert len(batch.rows.padded().targets) == len(pairs)
    for row, (_, answer) in zip(batch.rows.padded().targets, pairs, strict=True):
        labels = row[row != IGNORE].tolist()
        assert labels[-1] == task.language.end_id
        assert task.backbone.tokenizer.decode(labels[:-1]).strip() == answer
    assert task.wrong_labels(batch) == ""
    text = task.label_table(batch)
    assert "what" in text and "cube" in text and task.language.end_id not in (None, IGNORE)


def test_labels_that_are_not_the_answers_are_noticed(task):
    batch = batch_of(task)
    targets = batch.rows.padded().targets
    for wrong in (targets.roll(1, 0), torch.full_like(targets, IGNORE), targets.masked_fill(targets == IGNORE, 40)):
        bad = DeviceBatch(batch.examples, batch.pixel_values, replace(batch.rows.padded(), targets=wrong), 1.0)
        assert "but its text is" in task.wrong_labels(bad)
    if isinstance(batch.rows, PackedRows):  # the labels that are trained on are checked, not the texts that they come from
        rolled = replace(batch.rows.labels, targets=batch.rows.labels.targets.roll(1))
        assert "but its text is" in task.wrong_labels(replace(batch, rows=replace(batch.rows, labels=rolled)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_are_those_of_hugging_face_row_by_row_unpadded(task, dtype):
    """Logits of a padded batch equal those of transformers for each unpadded row alone."""
    task.backbone.model.to(dtype)
    batch = batch_of(task, dtype=dtype)
    logits = task.logits(batch)
    tight = 1e-10 if dtype == torch.float64 else 2e-4
    for row, (example, answer) in enumerate(answered(batch.examples)):
        expected, ids = hugging_face(task, batch.pixel_values[example], batch.examples[example].question, answer)
        counts = batch.rows.padded().targets[row] != IGNORE
        assert batch.rows.padded().targets[row][counts].tolist() == ids.tolist()
        torch.testing.assert_close(logits[row][counts], expected[: len(ids)], rtol=tight, atol=tight)


def test_the_loss_is_votes_times_log_likelihood(task):
    """The loss is Σ over answers of votes / all votes × −log p(answer), from transformers' logits in float64."""
    task.backbone.model.double()
    some = examples([("what is it?", ("a red cube",) * 7 + ("a cube",) * 2 + ("nothing",)), *ASKED])
    batch = batch_of(task, some, dtype=torch.float64)
    expected = count = 0.0
    for example, answer in answered(some):
        e = some[example]
        logits, ids = hugging_face(task, batch.pixel_values[example], e.question, answer)
        log_p = logits[: len(ids)].log_softmax(-1).gather(1, ids[:, None]).sum()
        share = e.answers.count(answer) / len(e.answers)
        expected, count = expected - share * float(log_p), count + share * len(ids)
    assert float(task.loss(batch)) == pytest.approx(expected, rel=1e-6)
    assert batch.count == pytest.approx(count, rel=1e-6)


def test_the_weights_of_a_question_sum_to_one(task):
    """The weights of the answers are their shares of the votes, and sum to 1 for each question."""
    votes = ("red",) * 7 + ("blue",) * 2 + ("green",)
    rows = batch_of(task, examples([("what colour?", votes), ("how many?", ("one", "two")), ("red?", ("no",))])).rows.padded()
    assert rows.weights.tolist() == pytest.approx([0.7, 0.2, 0.1, 0.5, 0.5, 1])
    assert rows.example.tolist() == [0, 0, 0, 1, 1, 2]
    single = batch_of(task, examples([("what colour?", ("red",) * 3), ("red?", ("no",))])).rows.padded()
    assert single.weights is None and single.example is None


def test_token_ids_in_the_padding_change_no_logits(task):
    """The token ids in the padding do not change the logits of the labels."""
    batch = batch_of(task)
    logits, rows = task.logits(batch), batch.rows.padded()
    scribbled = {"input_ids": rows.input_ids.masked_fill(rows.attention_mask == 0, 77)}
    if rows.decoder_input_ids is not None:
        past = torch.arange(rows.targets.shape[1]) >= (rows.targets != IGNORE).sum(1, keepdim=True)
        scribbled["decoder_input_ids"] = rows.decoder_input_ids.masked_fill(past, 77)
    other = DeviceBatch(batch.examples, batch.pixel_values, replace(rows, **scribbled), batch.count)
    counts = rows.targets != IGNORE
    assert (rows.attention_mask == 0).any()
    torch.testing.assert_close(task.logits(other)[counts], logits[counts], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_equal_those_of_one_batch(make, kind):
    """Law 7: micro-batches of 1, 2 and 1 questions with uneven answers and votes equal one batch of 4."""
    results = []
    for cuts in ((0, 4), (0, 1, 3, 4)):
        task = VqaTask(make(kind))
        inject(task.backbone)
        micro = [batch_of(task, examples()[a:b], first=a) for a, b in pairwise(cuts)]
        whole = pictures(4)
        micro = [DeviceBatch(m.examples, whole[a:b], m.rows, m.count) for m, (a, b) in zip(micro, pairwise(cuts), strict=True)]
        update, moved = one_step(task, micro)
        results.append((update.loss, moved))
    (one_loss, one), (many_loss, many) = results
    assert many_loss == pytest.approx(one_loss, rel=1e-5)
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_images_encoded_once_give_the_logits_of_the_whole_forward(task):
    """Adapter gradients with images encoded once equal those of the model's own forward on each row."""
    adapters = inject(task.backbone)
    batch = batch_of(task)
    task.loss(batch).backward()
    ours = {key: x.B.grad.clone() for key, x in adapters.items()}
    task.backbone.model.zero_grad()
    loss = torch.zeros(())
    with torch.enable_grad():
        for row, (example, answer) in enumerate(answered(batch.examples)):
            e = batch.examples[example]
            logits, ids = hugging_face.__wrapped__(task, batch.pixel_values[example], e.question, answer)
            weight = 1.0 if batch.rows.padded().weights is None else float(batch.rows.padded().weights[row])
            loss = loss - weight * logits[: len(ids)].log_softmax(-1).gather(1, ids[:, None]).sum()
    loss.backward()
    for key, x in adapters.items():
        torch.testing.assert_close(ours[key], x.B.grad, rtol=1e-3, atol=1e-4)


def test_an_image_is_encoded_once_for_any_number_of_answers(task):
    """A batch encodes each image once, and a text encoder encodes each question once."""
    model, image_counts, question_counts = task.backbone.model, [], []
    model.vision_model.register_forward_pre_hook(
        lambda _m, _a, k: image_counts.append(len(k["pixel_values"])), with_kwargs=True
    )
    if hasattr(model, "text_encoder"):
        model.text_encoder.register_forward_pre_hook(
            lambda _m, _a, k: question_counts.append(len(k["input_ids"])), with_kwargs=True
        )
    batch = batch_of(task)
    task.logits(batch)
    assert (
        len(batch.rows.padded().targets) > len(ASKED) and image_counts == [len(ASKED)] and question_counts in ([], [len(ASKED)])
    )


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize("beams", [1, 3])
def test_ragged_questions_in_a_batch_are_answered_as_each_alone(task, beams):
    task.generation = Generation(max_new_tokens=8, num_beams=beams)
    some, images = examples(), pictures(len(ASKED))
    together = task.predict(images, some)
    alone = [task.predict(images[n : n + 1], some[n : n + 1])[0] for n in range(len(some))]
    assert together == alone and any(together)
    assert not any("question" in text.lower() or "answer" in text.lower() for text in together)


def test_greedy_answers_are_the_argmax_of_hugging_face_s_logits(task):
    """Greedy answers are the argmax of transformers' logits, token by token, and do not contain the prompt."""
    task.generation = Generation(max_new_tokens=5)
    some, images = examples(), pictures(len(ASKED))
    tokenizer, end = task.backbone.tokenizer, task.language.end_id
    for n, answer in enumerate(task.predict(images, some)):
        ids: list[int] = []
        for _ in range(5):
            token = int(argmax_after(task, images[n], some[n].question, ids))
            if token == end:
                break
            ids.append(token)
        assert answer == " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def argmax_after(task: VqaTask, image: torch.Tensor, question: str, ids: list[int]) -> torch.Tensor:
    """Return the likeliest next token after a question and `ids`, from transformers' logits."""
    tokenizer = task.backbone.tokenizer

    class Fixed:
        """A tokenizer that returns `ids` for the text "…"."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            return type("", (), {"input_ids": ids})() if text.strip() == "…" else tokenizer(text, **options)

    task.backbone.tokenizer = Fixed()
    try:
        logits, _ = hugging_face(task, image, question, "…")
    finally:
        task.backbone.tokenizer = tokenizer
    return logits[len(ids)].argmax()


@pytest.mark.parametrize("beams", [1, 3])
def test_an_answer_is_that_of_hugging_face_s_own_generate(make, beams):
    """An answer equals that of transformers' `generate` for one unpadded question."""
    task = VqaTask(make("vqa"), "", Generation(max_new_tokens=8, num_beams=beams))
    model, tokenizer = task.backbone.model, task.backbone.tokenizer
    some, images = examples(), pictures(len(ASKED))
    expected = []
    for n, example in enumerate(some):
        question = tokenizer(example.question, return_tensors="pt")
        ids = model.generate(question.input_ids, images[n : n + 1], question.attention_mask, max_new_tokens=8, num_beams=beams)
        expected.append(" ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split()))
    assert task.predict(images, some) == expected


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("kind", ["blip", "opt", "vqa"])
def test_a_long_question_is_answered_in_the_room_that_is_left(make, kind, beams):
    """The longest accepted question is answered up to the model's last position. A longer one raises ConfigError."""
    task = VqaTask(make(kind), "", Generation(max_new_tokens=20, num_beams=beams))
    task.language.end_id = -1  # nothing ends an answer before its room does
    candidates = (examples([("a " * count, ("no",))]) for count in range(64, 0, -1))
    longest = next(some for some in candidates if not task.check(some[0]))
    assert task.language.room(task.prompt_of(longest[0])) < 20 or kind == "vqa"
    assert isinstance(task.predict(pictures(1), longest)[0], str)
    with pytest.raises(ConfigError, match="too many tokens"):
        task.predict(pictures(1), examples([("a " * 64, ("no",))]))


# ---------------------------------------------------------------- what is refused


def bad_lines(task: VqaTask) -> list[tuple[dict, str]]:
    special = "[SEP]" if "Blip2" not in task.backbone.architecture else "<image>"
    return [
        ({"question": "what is it?", "answers": [f"a {special} cube"]}, "special token"),
        ({"question": f"what {special} is it?", "answers": ["a cube"]}, "special token"),
        ({"question": "what is it?", "answers": ["a cube", "a red cube " * 300]}, "room for"),
        ({"text": "a red cube"}, "question"),
    ]


def test_bad_lines_are_one_clear_reason_with_file_and_line(task, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    bad = bad_lines(task)
    if task.backbone.architecture != "Blip2ForConditionalGeneration" or hasattr(task.language, "image"):
        bad.append(({"question": "is it " * 400, "answers": ["a cube"]}, "question has too many tokens"))
    good = {"image": "x.png", "question": "what is it?", "answers": ["a cube"]}
    lines = [good, *({"image": "x.png", **line} for line, _ in bad)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    examples_read, problems = annotations.read(path, on_bad_data="skip", check=task.check)
    assert len(examples_read) == 1 and [problem.line for problem in problems] == list(range(2, len(lines) + 1))
    for problem, (_, reason) in zip(problems, bad, strict=True):
        assert reason in str(problem) and str(problem).startswith(f"{path}:") and "\n" not in str(problem)
    with pytest.raises(DataError, match=r"lines\.jsonl:2: "):
        annotations.read(path, check=task.check)


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_end_token_written_out_is_refused(make, kind):
    """A question or answer that contains </s> is refused, because it would end the answer early."""
    task = VqaTask(make(kind))
    assert "special token" in task.check(examples([("what?", ("a </s> cube",))])[0])
    assert "special token" in task.check(examples([("what </s>?", ("a cube",))])[0])


def test_a_line_without_question_or_answers_is_refused(task):
    (without_answers,) = examples([("what is it?", ())])
    (without_question,) = examples([("", ("a cube",))])
    assert "no answer" in task.check(without_answers)
    only_answers = task.backbone.architecture == "BlipForQuestionAnswering"
    fix = "--model Salesforce/blip-image-captioning-base" if only_answers else "(--task caption)"
    message = task.check(without_question)
    assert message.startswith("no question: the task is vqa") and message.endswith(fix)
    assert task.check(examples()[0]) == ""


def test_templates_that_cannot_hold_a_question_are_refused(make):
    for kind in KINDS:
        for prompt in ("what is it?", "{question} {question}"):
            with pytest.raises(ConfigError, match=r"contains \{question\} once"):
                VqaTask(make(kind), prompt)
    with pytest.raises(ConfigError, match="special token"):
        VqaTask(make("blip"), "[SEP] {question}")
    assert VqaTask(make("vqa")).prompt == "{question}" and VqaTask(make("opt")).prompt == TEMPLATE


def test_braces_in_a_question_are_its_own(make):
    task = VqaTask(make("blip"))
    assert task.prompt_of(examples([("is {question} 1?", ("no",))])[0]) == "Question: is {question} 1? Answer:"


@pytest.mark.parametrize(
    ("kind", "task", "named"),
    [
        ("itm", VqaTask, "BlipForQuestionAnswering.*Salesforce/blip-vqa-base"),
        ("itm2", VqaTask, "Salesforce/blip-vqa-base"),
        ("vqa", CaptionTask, "BlipForConditionalGeneration.*Salesforce/blip-image-captioning"),
        ("itm", CaptionTask, "Salesforce/blip-image-captioning"),
        ("blip", RetrievalTask, "BlipForImageTextRetrieval.*Salesforce/blip-itm-base-coco"),
        ("t5", RetrievalTask, "Salesforce/blip-itm-base-coco"),
    ],
)
def test_a_checkpoint_for_another_task_is_refused_with_one_to_give(make, kind, task, named):
    with pytest.raises(ConfigError, match=rf"task = '{task.name}': .* is a Blip.*give .*{named}"):
        task(make(kind))


def test_the_default_task_of_each_checkpoint(make):
    names = {kind: default_task(make(kind).architecture) for kind in ("blip", "opt", "t5", "vqa", "itm", "itm2")}
    assert names == dict.fromkeys(("blip", "opt", "t5"), "caption") | {"vqa": "vqa", "itm": "retrieval", "itm2": "retrieval"}


def test_scores_are_votes(task):
    """Three of ten who said it make an answer wholly right; one alone makes a third of it, by leave-one-out 0.3."""
    some = examples([("a?", ("yes",) * 3 + ("no",) * 7), ("b?", ("one",) + ("two",) * 9), ("c?", ("x",) * 10)])
    predictions = {task.subject(e): answer for e, answer in zip(some, ("yes", "one", "wrong"), strict=True)}
    yes = (3 * min(2 / 3, 1) + 7 * 1) / 10  # each of ten annotators is left out once
    one = (1 * 0 + 9 * (1 / 3)) / 10
    assert task.scores(predictions, some)["vqa_accuracy"] == pytest.approx((yes + one + 0) / 3)
    assert task.correctness("yes", some[:1]) == pytest.approx(yes)


# ---------------------------------------------------------------- adapters and training


@pytest.mark.parametrize("beams", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_each_row_is_answered_by_the_adapter_it_names(make, beams):
    """A batch of mixed adapters gives each row the answer of its own adapter."""
    for kind in KINDS:
        task = VqaTask(make(kind), "", Generation(max_new_tokens=6, num_beams=beams))
        inject(task.backbone, name="one")
        for x in inject(task.backbone, name="two").values():
            x.B.data.mul_(-3)
        some, images = examples(), pictures(len(ASKED))
        mixed: list[str | None] = ["two", None, "one", "two"]
        texts = task.predict(images, some, mixed)
        apart = {}
        for name in ("one", "two", None):
            with use_adapters(task.backbone.model, name) if name else disable_adapters(task.backbone.model):
                apart[name] = [task.predict(images[n : n + 1], some[n : n + 1])[0] for n in range(len(some))]
        assert texts == [apart[name][n] for n, name in enumerate(mixed)]
        assert len({tuple(answers) for answers in apart.values()}) > 1


def test_merged_is_hooked(task):
    """Law 5: merged logits equal hooked logits in float32."""
    inject(task.backbone)
    batch = batch_of(task)
    with torch.no_grad():
        hooked = task.logits(batch)
        merging.merge(task.backbone.model)
        torch.testing.assert_close(task.logits(batch), hooked, rtol=1e-4, atol=1e-4)


def test_the_encoder_mask_hook_is_added_once_and_survives_copies(make):
    """Two tasks on one backbone, a deepcopy and a pickle: one hook a layer, and the same logits."""
    backbone = make("vqa")
    task = VqaTask(backbone)
    VqaTask(backbone)
    attention = backbone.model.text_decoder.bert.encoder.layer[0].crossattention.self
    assert len(attention._forward_pre_hooks) == 1
    logits = task.logits(batch_of(task))
    for copied in (copy.deepcopy(backbone.model), pickle.loads(pickle.dumps(backbone.model))):
        other = VqaTask(replace(backbone, model=copied))
        assert torch.equal(other.logits(batch_of(other)), logits)


def test_checkpointing_gives_the_same_gradients(make):
    """Gradient checkpointing gives the same gradients: recomputed activations use the question's mask."""
    gradients = []
    for frugal in (False, True):
        task = VqaTask(make("vqa", checkpointing=frugal))
        adapters = inject(task.backbone)
        task.backbone.model.train()
        task.loss(batch_of(task)).backward()
        gradients.append([x.B.grad for x in adapters.values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_preflight_passes_with_every_target_of_the_architecture(make, kind):
    """Adapters on every target pass the preflight check, also on each row block of fused linears."""
    for what in every_target(make(kind).model, kind):
        task = VqaTask(make(kind))
        inject(task.backbone, what, trained=False)
        assert HEADING in preflight.check(task, batch_of(task), nullcontext)


def questions(folder: Path) -> Path:
    """Write eight images with a question of uneven length and one to five answers each. Return the annotation file."""
    path = tiny.write_photos(folder, 8)
    lines = []
    for n, line in enumerate(map(json.loads, path.read_text().splitlines())):
        question = "what is it?" if n % 2 else "what is the colour of the picture on the table?"
        answers = [line["text"]] * (1 + n % 3) + ["a picture"] * (n % 4)
        lines.append(json.dumps({"image": line["image"], "question": question, "answers": answers}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("kind", "precision"), [("vqa", "fp32"), ("vqa", "bf16"), ("vqa", "fp16"), ("opt", "fp16"), ("t5", "bf16")]
)
def test_training_moves_every_b_and_nothing_else(checkpoints, make, tmp_path, kind, precision, monkeypatch):
    """Law 2, in each precision: training changes only the adapters. The adapter file stores the template for inference."""
    opened = {}
    real = setup.open_backbone
    monkeypatch.setattr(setup, "open_backbone", lambda *a, **k: opened.setdefault("opened", real(*a, **k)))
    template = "" if kind == "vqa" else "Q: {question} A:"
    path = loop.train(
        settings(
            checkpoints[kind],
            questions(tmp_path),
            task="vqa",
            targets=WHOLE[kind],
            precision=precision,
            epochs=1,
            prompt=template,
        )
    )
    fresh = make(kind, dtype="fp32" if kind == "vqa" else precision).model.state_dict()
    after = {key: value for key, value in opened["opened"][0].model.state_dict().items() if ".lora." not in key}
    assert list(after) == list(fresh) and all(torch.equal(after[key], fresh[key].to(after[key].dtype)) for key in fresh)
    saved = adapter_file.read(path)
    assert all(saved.tensors[key].any() for key in saved.tensors)
    task = task_of(make(kind), saved)
    assert isinstance(task, VqaTask) and task.prompt == (template or "{question}") and task.generation.max_new_tokens == 5


def test_answers_on_lines_of_their_own_are_answers_to_one_question(make):
    """Lines with the same image and question score as one question with all their answers."""
    task = VqaTask(make("vqa"))
    together = Example(Path("a.png"), "", "a.png", 1, "", "how many?", ("two", "two", "two", "one"))
    apart = [replace(together, answers=(answer,)) for answer in together.answers]
    for prediction in ("two", "one", "three"):
        scores = [task.scores({task.subject(together): prediction}, lines) for lines in ([together], apart)]
        assert scores[0] == scores[1] == {"vqa_accuracy": task.correctness(prediction, apart)}
