"""A text with only unknown tokens is refused. A text with some unknown tokens is counted and reported."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import T5Tokenizer

from lora_blip.data import annotations
from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.errors import ConfigError, DataError
from lora_blip.inference.questions import examples_to_predict
from lora_blip.models.loading import Backbone
from lora_blip.models.token_rows import plain_ids
from lora_blip.models.unknown_tokens import UnknownTokens
from lora_blip.tasks.base import Task
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.retrieval import RetrievalTask
from lora_blip.tasks.text_task import HEADING
from lora_blip.tasks.vqa import VqaTask
from tests.support import tiny
from tests.support.runs import train_flags

CHINESE, KOREAN, HALF = "红色的立方体", "빨간 큐브", "a red 立方体 cube"
LONG = "x" * 150  # more letters than a word of word pieces may have
TEXTS = ["a red cube", HALF, "a blue cube", f"a {LONG} cube", "café", "a 红 and a 蓝 cube"]


def with_t5(backbone: Backbone) -> Backbone:
    """Return a backbone whose unigram tokenizer, like that of Flan-T5, has no Chinese tokens."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return replace(backbone, tokenizer=T5Tokenizer(vocab=[*vocabulary, *((chr(c), -5.0) for c in range(33, 127))]))


@pytest.fixture
def tasks(make: Any) -> dict[str, Task]:
    return {
        "blip": CaptionTask(make("blip")), "t5": CaptionTask(with_t5(make("t5"))), "opt": CaptionTask(make("opt")),
        "vqa": VqaTask(make("vqa")), "itm": RetrievalTask(make("itm")),
    }  # fmt: skip


def lines(task: Task, texts: list[str]) -> list[Example]:
    """Return one example for each text: a caption, or a question with the text as its answer."""
    question = "what is it?" if task.name == "vqa" else ""
    return [
        Example(Path("a.png"), "" if question else t, "a.png", n, "", question, (t,) * bool(question))
        for n, t in enumerate(texts, 1)
    ]


@pytest.mark.parametrize("kind", ["blip", "t5", "vqa", "itm"])
@pytest.mark.parametrize("text", [CHINESE, KOREAN, "😀"])
def test_a_text_of_which_nothing_is_left_is_refused_with_its_line(tasks, tmp_path, kind, text):
    """A text with only unknown tokens is refused, and the error names its line."""
    task = tasks[kind]
    assert not task.backbone.tokenizer.decode(
        [i for i in plain_ids(task.backbone.tokenizer, text) if i != task.backbone.tokenizer.unk_token_id]
    ).strip()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    entry = {"question": "what?", "answers": [text]} if kind == "vqa" else {"text": text}
    good = {"question": "what?", "answers": ["red"]} if kind == "vqa" else {"text": "red"}
    source = tmp_path / "lines.jsonl"
    source.write_text("\n".join(json.dumps({"image": "a.png", **each}) for each in (good, entry)))
    with pytest.raises(DataError, match=r"lines\.jsonl:2: the text .* has only tokens that .*Salesforce/blip2-opt-2\.7b"):
        annotations.read(source, check=task.check, pretokenize=task.pretokenize)


def test_a_byte_level_tokenizer_takes_every_text(tasks):
    task = tasks["opt"]
    some = lines(task, [CHINESE, KOREAN, "😀", HALF])
    task.pretokenize(some)
    assert [task.check(line) for line in some] == [""] * 4 and task.unknown_report(some) == ""


@pytest.mark.parametrize("kind", ["blip", "t5", "vqa", "itm"])
def test_the_share_of_unknown_tokens_is_that_of_counting_every_text(tasks, kind):
    """The report has the number of lines and tokens, the share and three examples, equal to a count over every text."""
    task = tasks[kind]
    some, tokenizer = lines(task, TEXTS * 3), task.backbone.tokenizer
    task.pretokenize(some)
    assert not any(map(task.check, some))
    lost = {
        t: (ids.count(tokenizer.unk_token_id), len(ids))
        for t in TEXTS
        if tokenizer.unk_token_id in (ids := plain_ids(tokenizer, t))
    }
    assert set(TEXTS[1::2]) - {TEXTS[3]} <= lost.keys() and (TEXTS[3] in lost) is (kind != "t5")
    report, (unknown, tokens) = task.unknown_report(some), (3 * sum(column) for column in zip(*lost.values(), strict=True))
    count = 3 * len(lost)
    assert f"{count} of 18 lines ({count / 18:.1%})" in report
    assert f"{unknown} of their {tokens} tokens ({unknown / tokens:.1%}) are lost" in report
    numbers = [line.line for line in some if {line.text, *line.answers} & lost.keys()][:3]
    assert [row.split(":")[0] for row in report.split("\n  ")[1:4]] == [f"line {number}" for number in numbers]
    assert report.split("\n  ")[4:] == [
        'a base with a byte-level tokenizer knows every text, such as "Salesforce/blip2-opt-2.7b"'
    ]


@pytest.mark.parametrize("kind", ["blip", "opt", "vqa", "itm"])
def test_plain_english_is_not_tokenized_for_the_check(tasks, kind, monkeypatch):
    """ASCII texts are not tokenized for the check, and the report does not read them."""
    task = tasks[kind]
    task.pretokenize([])
    monkeypatch.setattr("lora_blip.models.text_check.many_ids", lambda *_: pytest.fail("tokenized"))
    task.pretokenize(lines(task, ["a red cube on top of a blue cube", "a white t-shirt, it's new", "an odd " * 20]))
    assert task.checker.unknown.report(iter(lambda: pytest.fail("read"), None)) == ""


def test_questions_prompts_and_texts_to_rank_are_refused_too(tasks, make):
    images = [example_of("a.png")]
    with pytest.raises(ConfigError, match=r"question .* has only tokens that"):
        examples_to_predict(tasks["vqa"], images, KOREAN, {}, [])
    with pytest.raises(ConfigError, match=r"question .* has only tokens that"):
        examples_to_predict(
            tasks["vqa"], images, "", {Path("a.png"): lines(tasks["vqa"], ["x"]) + [example_of("a.png", CHINESE)]}, []
        )
    for kind in ("itm", "t5"):
        with pytest.raises(ConfigError, match=r"texts: text 2: the text .* has only tokens that"):
            examples_to_predict(tasks[kind], images, "", {}, ["a cube", CHINESE])
    with pytest.raises(ConfigError, match=r"prompt = .* has only tokens that"):
        CaptionTask(make("blip"), CHINESE)
    with pytest.raises(ConfigError, match=r"prompt = .* has only tokens that"):
        VqaTask(with_t5(make("t5")), f"{CHINESE} {{question}}")


def test_a_part_that_is_lost_of_a_question_prompt_or_text_is_reported(tasks, make, capsys):
    images = [example_of("a.png")]
    examples_to_predict(tasks["vqa"], images, "what 红 is it?", {}, [])
    assert "1 of 1 line (100.0%)" in capsys.readouterr().out
    examples_to_predict(tasks["itm"], images, "", {}, ["a cube", HALF])
    assert "1 of 2 lines (50.0%)" in (printed := capsys.readouterr().out) and "line 2: " in printed
    examples_to_predict(CaptionTask(make("blip"), "a 红 picture"), images, "", {}, [])
    assert "1 of 1 prompt (100.0%)" in capsys.readouterr().out
    examples_to_predict(CaptionTask(make("blip"), "a picture"), images, "", {}, [])
    assert capsys.readouterr().out == ""


def test_training_reports_the_share_before_the_first_step(checkpoints, tmp_path, monkeypatch, capsys):
    from lora_blip.config import TrainConfig
    from lora_blip.flags import parse
    from lora_blip.training.loop import train

    monkeypatch.chdir(tmp_path)
    source = tiny.write_photos(tmp_path, len(TEXTS), TEXTS)
    train(parse(TrainConfig, {}, train_flags(checkpoints["blip"], source, **{"max-steps": 1})))
    printed = capsys.readouterr().out
    assert 0 < printed.index("3 of 6 lines (50.0%)") < printed.index(HEADING)


def test_only_texts_with_unknown_tokens_are_kept():
    """The checker stores only texts with unknown tokens. An unknown token that is also the end token does not count."""
    tokens = UnknownTokens(type("Tokenizer", (), {"unk_token_id": 3})(), set())
    tokens.note({"a": [3, 4], "b": [5]})
    assert tokens.counts == {"a": (1, 2)} and UnknownTokens(tokens.tokenizer, {3}).id is None
