"""Captioning: labels are answers, the loss is the definition's, generation equals Hugging Face's."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lora_blip.data.example import Example
from lora_blip.errors import ConfigError
from lora_blip.metrics.exact import exact_match
from lora_blip.models.token_rows import IGNORE, plain_ids, special_ids
from lora_blip.tasks.base import Generation
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.text_length import fit_generation
from lora_blip.tasks.text_task import token_loss
from lora_blip.tasks.vqa import VqaTask
from tests.support.models import TEXTS, batch_of

PROMPT = "a picture of"
ANY = Example(Path("x.png"), "", "x.png", 1)


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_labels_are_the_caption_and_the_end_and_nothing_else(backbone, prompt):
    """Law 8: the labels are the caption and its end token, without image, prompt or padding."""
    task = CaptionTask(backbone, prompt)
    rows = task.language.tokenize([prompt] * len(TEXTS), TEXTS).pad()
    for targets, text in zip(rows.targets, TEXTS, strict=True):
        labels = targets[targets != IGNORE]
        assert labels[-1] == task.language.end_id and backbone.tokenizer.decode(labels[:-1]).strip() == text


def test_padding_is_recognized_by_position_not_by_id(backbone):
    """A pad token inside a caption is a label, because padding is recognized by its position."""
    pad = backbone.tokenizer.pad_token
    rows = CaptionTask(backbone).language.tokenize(["", ""], [f"a {pad} cube", "a red cube on top of a blue cube"]).pad()
    assert backbone.tokenizer.pad_token_id in rows.targets[0].tolist()


def test_captions_are_padded_to_the_longest_and_no_further(backbone):
    """A batch is as wide as its longest caption. Every caption is complete, and its padding is masked."""
    language = CaptionTask(backbone).language
    rows = language.tokenize([""] * len(TEXTS), TEXTS).pad()
    lengths = [len(plain_ids(backbone.tokenizer, text)) + 1 for text in TEXTS]  # with the end token
    assert len(set(lengths)) > 1 and [int((targets != IGNORE).sum()) for targets in rows.targets] == lengths
    if rows.decoder_input_ids is None:
        start = len(language.prompt_ids(""))
        assert rows.attention_mask.sum(1).tolist() == [start + length for length in lengths]
        assert rows.targets.shape == rows.input_ids.shape == (len(TEXTS), start + max(lengths))
    else:
        assert rows.targets.shape == rows.decoder_input_ids.shape == (len(TEXTS), max(lengths))


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_the_loss_is_cross_entropy_by_definition(backbone, prompt):
    """The loss is −Σ log softmax at every target, in float64."""
    task = CaptionTask(backbone, prompt)
    batch = batch_of(task)
    logits = task.logits(batch).double()
    expected = sum(
        -logits[row, place].log_softmax(-1)[target]
        for row, targets in enumerate(batch.rows.padded().targets)
        for place, target in enumerate(targets)
        if target != IGNORE
    )
    torch.testing.assert_close(task.loss(batch).double(), expected, rtol=1e-6, atol=1e-6)
    assert batch.count == int((batch.rows.padded().targets != IGNORE).sum())


def test_the_loss_is_the_library_s_where_the_library_masks(backbone):
    """Hugging Face's own loss, given labels with −100 in the right places, is our sum over our count."""
    task = CaptionTask(backbone)
    batch = batch_of(task)
    rows = batch.rows.padded()
    extra = {}
    if rows.decoder_input_ids is None:
        labels = torch.cat([torch.full((len(TEXTS), 1), IGNORE), rows.targets[:, :-1]], dim=1)
    else:
        labels, extra = rows.targets, {"decoder_input_ids": rows.decoder_input_ids}
    theirs = backbone.model(
        pixel_values=batch.pixel_values, input_ids=rows.input_ids, attention_mask=rows.attention_mask, labels=labels, **extra
    )
    torch.testing.assert_close(task.loss(batch) / batch.count, theirs.loss, rtol=1e-5, atol=1e-6)


def test_padding_changes_no_row(backbone):
    """A caption's loss is the same alone and beside a longer one."""
    task = CaptionTask(backbone)
    together = batch_of(task)
    logits = task.logits(together)
    for row, text in enumerate(TEXTS):
        alone = batch_of(task, [text])
        alone = type(alone)(alone.examples, together.pixel_values[row : row + 1], alone.rows, alone.count)
        expected = token_loss(logits[row : row + 1], together.rows.padded().targets[row : row + 1])
        torch.testing.assert_close(task.loss(alone), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_generated_text_is_the_likeliest_continuation_without_the_prompt(backbone, prompt):
    """Against the argmax of teacher-forced logits, step by step; beams are compared in test_fast_inference."""
    task = CaptionTask(backbone, prompt, Generation(max_new_tokens=6))
    images = torch.randn(3, 3, 32, 32)
    texts = task.predict(images, [ANY] * 3)
    assert len(texts) == 3 and all(texts) and not any(text.startswith(PROMPT) for text in texts)
    for row, text in enumerate(texts):
        assert text == greedy(task, images[row : row + 1], prompt, 6)


@torch.no_grad()
def greedy(task: CaptionTask, image: torch.Tensor, prompt: str, steps: int) -> str:
    """Argmax over the model's full forward, one token after another."""
    model, language = task.backbone.model, task.language
    start = language.tokenize([prompt], [""]).pad()
    kept = int((start.targets[0] != IGNORE).nonzero()[0]) + 1
    if start.decoder_input_ids is None:
        ids, written = start.input_ids[:, :kept], []
    else:
        ids, written = start.decoder_input_ids[:, :1], []
    for _ in range(steps):
        if start.decoder_input_ids is None:
            logits = model(pixel_values=image, input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        else:
            logits = model(pixel_values=image, input_ids=start.input_ids, decoder_input_ids=ids).logits
        token = logits[0, -1].argmax()
        if token == language.end_id:
            break
        written.append(int(token))
        ids = torch.cat([ids, token.view(1, 1)], dim=1)
    return " ".join(task.backbone.tokenizer.decode(written, skip_special_tokens=True).split())


def test_generation_stops_at_its_length(backbone):
    """With room for 20 tokens, the same images have longer texts."""
    images, lengths = torch.randn(2, 3, 32, 32), {}
    for most in (2, 20):
        texts = CaptionTask(backbone, "", Generation(max_new_tokens=most)).predict(images, [ANY, ANY])
        lengths[most] = [len(backbone.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert max(lengths[2]) <= 3 < max(lengths[20])


@pytest.mark.parametrize("kind", ["blip", "opt"])
def test_exact_match_can_be_reached_by_every_caption(make, kind):
    """What the tokenizer itself writes of a text counts as that text."""
    tokenizer = make(kind).tokenizer
    for text in ("a t-shirt, it's red-and-white", "café", "1.5 m", "a man (left)", "cube; no", 'A "STOP" sign.'):
        written = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        assert exact_match([written], [[text]]) == 1, written
    assert exact_match(["its red"], [["it is red"]]) == 0


def test_texts_and_prompts_with_special_tokens_are_refused(backbone):
    task = CaptionTask(backbone)
    end = backbone.tokenizer.sep_token or "<image>"
    assert "special token" in task.checker.problem(f"a cube {end} here", 9) and not task.checker.problem("a cube", 9)
    with pytest.raises(ConfigError, match=r"prompt = .*special token"):
        CaptionTask(backbone, f"a {end}")


def test_a_caption_longer_than_the_model_s_positions_is_refused_at_once(make):
    for kind in ("blip", "opt"):
        with pytest.raises(ConfigError, match="max_new_tokens = 70: the model has room for"):
            CaptionTask(make(kind), "", Generation(max_new_tokens=70))
        with pytest.raises(ConfigError, match=r"the prompt is \d+ tokens too long for this model; shorten it"):
            CaptionTask(make(kind), "a red cube " * 40)


def test_exact_match_by_hand():
    assert exact_match(["A red  cube.", "blue", "x"], [["a red cube"], ["green", "Blue"], ["y"]]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError):
        exact_match([], [])
    with pytest.raises(ValueError):
        exact_match(["a"], [])


def test_float_cross_entropy_is_taken_in_float32():
    logits = torch.randn(2, 3, 11, dtype=torch.bfloat16)
    targets = torch.tensor([[1, 2, IGNORE], [IGNORE, IGNORE, 5]])
    expected = F.cross_entropy(logits.float().view(-1, 11), targets.view(-1), ignore_index=IGNORE, reduction="sum")
    assert torch.equal(token_loss(logits, targets), expected) and expected.dtype == torch.float32


@pytest.mark.parametrize("kind", ["blip", "opt", "t5", "vqa"])
def test_tokens_that_a_user_added_are_learned_and_written(make, kind):
    """A token added with special_tokens=True is a word: allowed in a text, in the labels, and in what is generated."""
    backbone = make(kind)
    backbone = replace(backbone, tokenizer=deepcopy(backbone.tokenizer))
    tokenizer = backbone.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<cube>"]}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(["<sphere>"], special_tokens=True)
    tokenizer.add_tokens(["<plain>"])
    task = VqaTask(backbone) if kind == "vqa" else CaptionTask(backbone)
    text = "a red <cube> on a <sphere> and a <plain>"
    assert not task.checker.problem(text, 60) and not task.checker.special_token_problem(text, task.checker.ids(text))
    rows = task.language.tokenize(["what?" if kind == "vqa" else ""], [text]).pad()
    labels = rows.targets[0][rows.targets[0] != IGNORE]
    added = tokenizer.convert_tokens_to_ids(["<cube>", "<sphere>", "<plain>"])
    assert [i for i in labels.tolist() if i in added] == added
    ends = torch.tensor(sorted(special_ids(tokenizer)))
    (written,) = task.language.texts_of(torch.cat([ends, labels, ends])[None])
    assert written.replace(" ", "") == text.replace(" ", "")


def test_without_added_tokens_a_text_is_decoded_as_transformers_does(backbone):
    """Any ids: what `skip_special_tokens=True` leaves, of a tokenizer to which nothing was added."""
    tokenizer = backbone.tokenizer
    ids = torch.randint(len(tokenizer), (20, 30), generator=torch.Generator().manual_seed(5))
    assert any(i in special_ids(tokenizer) for i in ids.flatten().tolist())
    assert CaptionTask(backbone).language.texts_of(ids) == tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["blip", "opt", "t5"])
def test_the_longest_generated_text_is_the_longest_of_the_data_and_a_margin(make, kind, capsys):
    """Every text of the data fits with its end token, counted by the tokenizer; a smaller number is reported."""
    task = CaptionTask(make(kind))
    texts = ["a cube", "a red cube on top of a blue cube " * 2, "two cubes", "two cubes"]
    examples = [Example(Path("x.png"), text, "x.png", 1) for text in texts]
    limit = fit_generation(task, examples, 0)
    assert limit == task.generation.max_new_tokens
    assert limit >= max(len(task.checker.ids(text.strip())) + 1 for text in texts) + 8 or limit == task.language.room("")
    assert not capsys.readouterr().out
    least = len(task.checker.ids("two cubes")) + 2
    assert fit_generation(task, examples, least) == least
    assert f"max_new_tokens = {least} cuts 1 of 4 texts" in capsys.readouterr().out


def test_a_question_says_how_to_train_on_it_and_how_its_answer_becomes_a_caption(make):
    """Chats of LLaVA ask for captions in words ("Describe the image."), so their answers may be captions."""
    example = Example(Path("1.png"), "", "1.png", 1, question="Describe the image.", answers=("a cube",))
    reason = CaptionTask(make("blip")).check(example)
    assert 'set TASK = "vqa" (--task vqa)' in reason
    assert reason.endswith(
        'if its answer is a caption, write it as "text"; in a chat, write only <image> in the turn of the user'
    )
