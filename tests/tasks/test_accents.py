"""Accents that the tokenizer of a base removes are reported, with the number of texts and an example."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_blip.data.example import Example
from lora_blip.data.image_folders import example_of
from lora_blip.models.loading import load_backbone
from lora_blip.tasks.accents import lost_accents
from lora_blip.tasks.caption import CaptionTask
from lora_blip.tasks.registry import TASKS

TEXTS = ["ein Würfel für Köln", "a cube", "E\u0301cole", "立方体", "한국어"]


def test_texts_that_lose_accents_are_counted_with_an_example():
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-blip")
    assert tokenizer.decode(tokenizer("für", add_special_tokens=False).input_ids) == "fur"  # what is reported
    assert "in 2 of 5 texts: Würfel → Wurfel." in lost_accents(tokenizer, TEXTS)
    assert lost_accents(tokenizer, TEXTS[1:2]) == lost_accents(tokenizer, TEXTS[3:]) == lost_accents(tokenizer, []) == ""


def test_a_tokenizer_that_keeps_accents_has_no_report():
    tokenizer = AutoTokenizer.from_pretrained("assets/tiny-blip2")
    assert tokenizer.decode(tokenizer("für", add_special_tokens=False).input_ids).strip() == "für"
    assert lost_accents(tokenizer, TEXTS) == ""


@pytest.mark.parametrize("text", ["ein Würfel", "a cube"])
def test_a_task_reports_lost_accents_with_the_unknown_tokens(text):
    task = CaptionTask(load_backbone("assets/tiny-blip", "cpu"))
    examples = [Example(Path("a.png"), text, "a.png", 1)]
    task.pretokenize(examples)
    assert ("removes accents, in 1 of 1 text:" in task.unknown_report(examples)) is (text != "a cube")


def test_only_texts_that_are_generated_are_counted(make):
    """A question is not generated. Before, its accents were reported as lost in the generated texts."""
    task = TASKS["vqa"](make("vqa"))
    lines = [replace(example_of("1.png", "wie viele Würfel?"), answers=(answer,)) for answer in ("zwei", "fünf")]
    report = task.unknown_report(lines)
    assert "in 1 of 2 texts: fünf → funf" in report and "Würfel" not in report
